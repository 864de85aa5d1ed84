"""A site's own records and folder, for its page and for `evaluate`; checked against the bundle that they meet."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.place import Place, find_place
from client_app.records import load_records
from common.errors import ConfigError, DataError
from common.evaluation.clinical import ClinicalScores, clinical_scores
from common.evaluation.scores import Split
from common.evaluation.splits import split_by_unit
from common.publishing.bundle import Bundle
from common.publishing.worth import prepared
from common.records import among_all
from common.wire.identity import compare
from deploy.classifier.file import TrainedHead
from deploy.site.folder import SiteFolder
from embeddings.store.sets import EmbeddingSet


@dataclasses.dataclass(frozen=True)
class OwnRows:
    """A site's records: embeddings (n, d), scaled as the run scaled them, labels (n,), and what goes with them.

    `splits` (n,) are the file's own, or else those by which a site divides it for training.
    """

    records: EmbeddingSet
    embeddings: Tensor
    labels: Tensor
    splits: NDArray[np.str_]

    @property
    def groups(self) -> Tensor | None:
        """Patient of each row, where known."""
        return None if self.records.groups is None else torch.from_numpy(self.records.groups)

    def groups_of(self, *parts: Tensor) -> tuple[Tensor, ...] | None:
        """Patient of each row of some parts, where known."""
        groups = self.groups
        return None if groups is None else tuple(groups[rows] for rows in parts)

    def rows_of(self, *names: str) -> Tensor:
        """Indices of the rows in these splits."""
        return torch.from_numpy(np.flatnonzero(np.isin(self.splits, names)))

    def split(self, name: str) -> Split:
        """Embeddings and labels of one split."""
        rows = self.rows_of(name)
        return self.embeddings[rows], self.labels[rows]


def open_site(folder: Path, bundle: Bundle) -> Place:
    """The site of a folder: a deployed one, by its policy; or one of a simulated run, by its name.

    Args:
        folder: the site's folder.
        bundle: what its run published; a simulated site's records follow from that run's settings.

    Raises:
        ConfigError: it is neither.
    """
    if (folder / "policy.toml").is_file():
        node: dict[str, str | int | float | bool] = {"data-dir": str(folder)}
        if (folder / "site.toml").is_file():
            settings = SiteFolder(folder).settings
            node |= {"site-name": settings.name, "data-file": settings.data_file}
        return find_place(node, bundle.config)
    number = re.fullmatch(r"site-(\d+)", folder.name)
    sites = bundle.context.problem.num_sites
    if number is None or not 1 <= int(number[1]) <= sites or not (folder / "ledger.db").is_file():
        raise ConfigError(
            f"{folder} is no site's folder: expected one with policy.toml (made by `fedhypevae site init`), or sites/"
            "site-N of a simulated run"
        )
    place = find_place({"partition-id": int(number[1]) - 1, "num-partitions": sites}, bundle.config)
    return dataclasses.replace(place, folder=folder)


def own_rows(records: EmbeddingSet, bundle: Bundle) -> OwnRows:
    """A site's records, once they are known to come from the encoder and classes of the bundle.

    Raises:
        DataError: another task, encoder, weights, preprocessing or class list; the text names the first difference.
    """
    identity, task = records.metadata.identity, bundle.context.problem.task
    if records.metadata.task != task:
        raise DataError(
            f"the bundle has labels of a {task} task, this file those of {records.metadata.task}: embed with "
            f"--task {task}"
        )
    labels, own = torch.from_numpy(records.labels), records.metadata.class_names
    if task == "multilabel" and set(own) <= set(bundle.class_names):
        labels = among_all(labels, own, bundle.class_names)
        identity = dataclasses.replace(identity, class_names=bundle.class_names)
    elif own != bundle.class_names:
        raise DataError("the bundle has another class list than this file: embed with the federation's class list")
    if bundle.encoder is not None:
        wrong = compare({"bundle": bundle.encoder, "file": identity})
        if wrong:
            raise DataError(
                f"the file's embeddings are not of the bundle's encoder: {wrong[0].field} is {wrong[0].found}, the "
                f"bundle has {wrong[0].expected}; embed the images with the bundle's encoder"
            )
    embeddings, labels = prepared(bundle, torch.from_numpy(records.embeddings), labels)
    splits = split_by_unit(records.embeddings, records.groups) if records.splits is None else records.splits
    return OwnRows(records, embeddings, labels, splits)


def as_classes(labels: Tensor, names: Sequence[str], counted: Tensor | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Labels for a table or a figure that has one class a row: of findings the rarest that a row has.

    Args:
        labels: (n,) classes or grades, or findings (n, K).
        names: of the K.
        counted: (m, K) findings whose counts say which is rarer; default: `labels`.

    Returns:
        (n,) classes, and their names: behind the findings one for rows without any.
    """
    if labels.ndim == 1:
        return labels, tuple(names)
    order = ((labels if counted is None else counted) == 1).sum(0).argsort(stable=True)
    place = torch.cat([labels[:, order] == 1, torch.ones(len(labels), 1, dtype=torch.bool)], 1).int().argmax(1)
    return torch.cat([order, torch.tensor([len(names)])])[place], (*names, "none known")


def measured(trained: TrainedHead, own: OwnRows) -> ClinicalScores:
    """The scores of a classifier on a site's own test records, which stay at the site."""
    rows, labels = own.split("test")
    units = None if own.groups is None else own.groups[own.rows_of("test")]
    return clinical_scores(labels, trained.probabilities(rows), trained.class_names, task=trained.task, units=units)


def site_rows(place: Place, bundle: Bundle) -> OwnRows:
    """The records of a site, with its splits."""
    return own_rows(load_records(place.records, place.cache_dir), bundle)

"""What a federation published, ready for use: load it, look at its promises, draw from it, judge it.

    from common.publishing.bundle import load_bundle
    bundle = load_bundle("bundle")                    # a bundle, a run's output folder, or a generator's file
    embeddings, labels = bundle.published()           # the published synthetic set
    for embeddings, labels in bundle.sample(1_000_000, seed=1): ...

Drawing more is free of privacy cost: it is post-processing. The generator was released under differential privacy, a
sample is a function of it and of fresh randomness alone, and no function of a released value tells more of the records
than the value does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.assurance.statement import why_not_private
from common.config.run import RunConfig
from common.durable import sha256_of
from common.errors import ConfigError, DataError, FedHypeVAEError
from common.evaluation.scores import Split
from common.generator.label_tree import LabelTree
from common.generator.row_numbers import row_key
from common.generator.row_sets import MOST_TRIES, RowSet
from common.methods import get_method
from common.methods.base import Artifact, RunContext
from common.methods.published import Code, class_weights, interleaved_labels, published_set, wanted_counts, with_code
from common.publishing.generator_file import FORCED, GENERATOR, ROWS
from common.publishing.parquet import set_notes, stream_rows
from common.tensor_file import read_tensors
from common.texts import read_object
from common.wire.allow_list import load_context
from common.wire.identity import EncoderIdentity

STATEMENT = "privacy_statement.json"
FREE_OF_COST = (
    "Drawing more rows costs no privacy: they are a function of the released generator alone (post-processing)."
)
Balance = Literal["uniform", "dp-counts", "given"]


@dataclass(frozen=True)
class Bundle:
    """A published generator with what belongs to it.

    Attributes:
        path: the folder (or the generator's file) that it was read from.
        context: the run's public context: configuration, width, class names, privacy plan.
        artifact: kind, tensors and settings that the method published.
        encoder: the encoder that embeddings must come from; None where an older run did not note it.
        statement: the privacy statement; None where only the generator is there.
        rows_format: how its rows are drawn; empty where an older version of this program wrote it.
        not_private: why there is no end-to-end guarantee; empty where there is one.
    """

    path: Path
    context: RunContext
    artifact: Artifact
    encoder: EncoderIdentity | None
    statement: Mapping[str, Any] | None
    rows_format: str
    not_private: tuple[str, ...]

    @property
    def config(self) -> RunConfig:
        """The run's whole configuration."""
        return self.context.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0..K-1."""
        return self.context.problem.class_names

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.context.problem.dim

    @property
    def can_sample(self) -> bool:
        """Whether the method publishes something that samples can be drawn from."""
        return get_method(self.config.method).law is not None

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def generator_file(self) -> Path:
        """The generator's file."""
        return self.path / GENERATOR if self.path.is_dir() else self.path

    @property
    def due_set(self) -> RowSet | None:
        """The set that the run's generator, settings and seed give: what the published one has to be."""
        return published_set(self.context, self.artifact)

    def published_files(self) -> tuple[Path, ...]:
        """The parquet files of the published set, in order; empty where there are none."""
        found = sorted((self.folder / "data").glob("*.parquet")) or sorted(self.folder.glob("synthetic.parquet"))
        return tuple(found)

    def published(self) -> Split:
        """The published set: embeddings (n, d) float32 and labels (n,) int64, all in memory.

        Raises:
            DataError: there is none, or a file does not hold what it should.
        """
        if not self.published_files():
            raise DataError(f"{self.path} holds no published set: draw one with `sample`, or `fedhypevae synthesize`")
        parts = list(self.stream_published())
        return torch.cat([rows for rows, _ in parts]), torch.cat([labels for _, labels in parts])

    def stream_published(self) -> Iterator[Split]:
        """The published set block by block; nothing where there is none. Raises DataError as `published`."""
        for file in self.published_files():
            yield from stream_rows(file, self.dim, len(self.class_names), self.context.problem.task)

    def sample(
        self,
        rows: int | None = None,
        *,
        labels: Tensor | None = None,
        balance: Balance = "uniform",
        shares: Sequence[float] | None = None,
        code: Code = None,
        seed: int = 0,
        threads: int | None = None,
        as_drawn: bool = False,
    ) -> Iterator[Split]:
        """Draw rows, in blocks, so that each class has as many as it should.

        Where the generator's own posterior relabels rows, each row is tried again until it has its class, at most 128
        times. A class that can't be had so stays short, and others fill its places: count the labels.

        Args:
            rows: how many; left out where `labels` are given.
            labels: (n,) the class wanted for each row, in place of `balance`.
            balance: "uniform" over the classes; "dp-counts", by the noised class counts; "given", by `shares`.
            shares: (K,) weights of the classes.
            code: None as published, "meta", "mixture", or the number of a code.
            seed: the same seed gives the same rows, on any machine but for the last digit of float32. They are others
                than those of the published set.
            threads: at most so many; default: one a core, at most 4.
            as_drawn: leave each row the class that the generator gave it, however uneven the classes become: the rows
                then follow the generator's own law.

        Returns:
            Blocks of embeddings (m, d) float32, in the place of an encoder's (scaled to unit length where the run did
            so: scale yours too), and labels (m,) int64. Post-processing: no privacy cost.

        Raises:
            ConfigError: the method publishes nothing to sample from, or an argument is out of range.
        """
        law = get_method(self.config.method).law
        if law is None:
            raise ConfigError(
                f"method {self.config.method} publishes a {self.artifact.kind}, which no embeddings can be drawn from: "
                "take a run of fedhypevae, dp_gauss, dp_cvae or dp_cgan"
            )
        artifact, classes = with_code(self.artifact, code), len(self.class_names)
        tree = LabelTree.of(artifact.tensors)
        if tree is not None:
            if rows is None or labels is not None or shares is not None or balance != "uniform":
                raise ConfigError(
                    "rows with findings have them as often as the run released: say how many rows, no labels and shares"
                )
            drawn = partial(tree.draw, "more", seed)
            return RowSet(law(self.context, artifact), row_key("more", seed), rows, drawn, 1).blocks(threads)
        if labels is not None:
            total = _check_labels(labels, rows, classes)

            def labels_of(numbers: Tensor) -> Tensor:
                return labels[numbers]
        else:
            if rows is None:
                raise ConfigError("say how many rows to draw, or which labels")
            counts, total = wanted_counts(rows, self._weights(balance, shares)), rows

            def labels_of(numbers: Tensor) -> Tensor:
                return interleaved_labels(counts, numbers)

        tries = 1 if as_drawn else MOST_TRIES
        rows_asked = RowSet(law(self.context, artifact), row_key("more", seed), total, labels_of, tries)
        return rows_asked.blocks(threads)

    def draw(self, rows: int | None = None, **options: Any) -> Split:
        """As `sample`, but all rows at once in memory."""
        parts = list(self.sample(rows, **options))
        return torch.cat([values for values, _ in parts]), torch.cat([labels for _, labels in parts])

    def notes(self, reasons: Sequence[str], sampling: Mapping[str, Any]) -> dict[str, Any]:
        """What further rows say of themselves in their file: `reasons` why they are not private, and how drawn."""
        return {
            **set_notes(self.context, reasons),
            "encoder": None if self.encoder is None else self.encoder.to_json(),
            "generator_sha256": sha256_of(self.generator_file),
            "sampling": dict(sampling),
        }

    def _weights(self, balance: Balance, shares: Sequence[float] | None) -> list[float]:
        classes = len(self.class_names)
        if (balance == "given") != (shares is not None):
            raise ConfigError("the balance `given` goes with shares of the classes, and shares go with no other")
        if shares is not None:
            if len(shares) != classes:
                raise ConfigError(f"expected shares of {classes} classes, found {len(shares)}")
            return [float(share) for share in shares]
        if balance == "uniform":
            return [1.0] * classes
        if balance != "dp-counts":
            raise ConfigError(f"balance must be uniform, dp-counts or given, found {balance!r}")
        return class_weights(self.artifact)


def load_bundle(path: Path | str) -> Bundle:
    """Read a published bundle, a run's output folder, or a generator's file alone. No code of theirs is run.

    Args:
        path: the folder, or its generator.safetensors.

    Returns:
        The bundle. Signature and checksums are not checked here: `fedhypevae release verify` does.

    Raises:
        DataError: no generator is there, or it can't be read.
    """
    path = Path(path)
    file = path / GENERATOR if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"no {GENERATOR} at {path}: name a bundle, the output folder of a completed run, or the generator's file"
        )
    metadata, tensors = read_tensors(file)
    try:
        context = load_context(metadata["context"])
        artifact = Artifact(metadata["kind"], tensors, json.loads(metadata["settings"]))
        stored = json.loads(metadata.get("encoder", "null"))
        encoder = None if stored is None else EncoderIdentity.from_json(stored)
        forced = tuple(str(reason) for reason in json.loads(metadata.get(FORCED, "[]")))
    except (KeyError, ValueError, TypeError, RecursionError, FedHypeVAEError) as error:
        raise DataError(f"{file} is no generator of this project, or of another version ({error})") from None
    reasons = (*why_not_private(context), *forced)
    beside = file.with_name(STATEMENT)
    statement = read_object(beside, "fetch it again") if beside.is_file() else None
    return Bundle(path, context, artifact, encoder, statement, metadata.get(ROWS, ""), reasons)


def _check_labels(labels: Tensor, rows: int | None, num_classes: int) -> int:
    if labels.ndim != 1 or labels.shape[0] == 0 or labels.dtype != torch.int64:
        raise ConfigError(f"expected labels (n,) of int64 with n >= 1, found {tuple(labels.shape)} of {labels.dtype}")
    if rows is not None and rows != labels.shape[0]:
        raise ConfigError(f"rows is {rows} but {labels.shape[0]} labels are given: leave rows out")
    if not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ConfigError(
            f"expected labels from 0 to {num_classes - 1}, found {int(labels.min())}..{int(labels.max())}"
        )
    return int(labels.shape[0])

"""A trained classifier as one safetensors file: its numbers, and in its metadata all that is needed to use it.

The file names the encoder whose embeddings it reads, so that `predict` can refuse another. It is no pickle: to open a
file from elsewhere runs none of its code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from common.durable import NAME_ANOTHER, write_output
from common.errors import ConfigError, DataError
from common.evaluation.clinical import finding_names
from common.evaluation.heads import LinearHead
from common.evaluation.nonlinear_heads import MLPHead
from common.evaluation.scores import HEAD_SCALE, Split
from common.names import TASKS, Task
from common.publishing.bundle import Bundle
from common.publishing.worth import Head, HeadKind, fit_head
from common.records import on_sphere
from common.tensor_file import read_tensors
from common.wire.identity import EncoderIdentity

FORMAT = "fedhypevae-head/1"
KINDS = ("linear", "mlp")
_LINEAR = ("weight", "bias")
_MLP = ("center", "scale", "hidden_weight", "hidden_bias", "weight", "bias")


@dataclass(frozen=True)
class TrainedHead:
    """A classifier and what it belongs to.

    Attributes:
        head: gives class probabilities for embeddings of unit length.
        class_names: classes, findings or grades, in order.
        encoder: whose embeddings it reads; None where the bundle did not note it.
        run: the run whose set it learned from.
        own_rows: how many rows of a site's own it learned from without noise; above 0 it stays at the site.
        not_private: why the published set has no guarantee; empty where it has one.
        task: what the labels are.
    """

    head: LinearHead | MLPHead
    class_names: tuple[str, ...]
    encoder: EncoderIdentity | None
    run: str
    own_rows: int = 0
    not_private: tuple[str, ...] = ()
    task: Task = "multiclass"

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """Probabilities of an encoder's embeddings (n, d), as they come from it.

        Returns:
            (n, K) of the classes, rows summing to one, or of each finding. Of K grades (n, K - 1): that the grade is
            k + 1 or higher; `grade_probabilities` makes one probability a grade of them.

        Raises:
            DataError: another width than the classifier was trained on.
        """
        width = int((self.head.weight if isinstance(self.head, LinearHead) else self.head.hidden_weight).shape[1])
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            raise DataError(f"expected embeddings (n, {width}), found {tuple(embeddings.shape)}")
        return self.head.probabilities(on_sphere(embeddings.to(torch.float32)))


def train_head(bundle: Bundle, kind: str, own: Split | None, seed: int) -> TrainedHead:
    """Train a classifier on a published set, and on a site's own rows where they are given.

    Args:
        bundle: what was published.
        kind: one of `KINDS`.
        own: a site's rows, prepared as the bundle's are.
        seed: of a network's first weights and the order of its rows.

    Returns:
        The classifier, its logits flattened by `HEAD_SCALE`: the decisions are the same, but a classifier of
        a noised set is too sure of itself (on the demonstration's 6,000 images: confidence 0.92 at accuracy 0.79; 0.76
        once it is flattened).

    Raises:
        ConfigError: an unknown kind. DataError: the bundle holds no set.
    """
    if kind not in KINDS:
        raise ConfigError(f"--head must be {' or '.join(KINDS)}, found {kind!r}")
    rows, labels = bundle.published()
    if own is not None:
        rows, labels = torch.cat([rows, own[0]]), torch.cat([labels, own[1]])
    task, asked = bundle.context.problem.task, cast(HeadKind, kind)
    head = fit_head(asked, rows, labels, len(bundle.class_names), seed=seed, task=task)
    return TrainedHead(
        head=_flattened(head, HEAD_SCALE),
        class_names=bundle.class_names,
        encoder=bundle.encoder,
        run=str((bundle.statement or {}).get("run", "")),
        own_rows=0 if own is None else len(own[1]),
        not_private=bundle.not_private,
        task=task,
    )


def save_head(path: Path, trained: TrainedHead) -> None:
    """Write the classifier, whole or not at all (DataError if the disk refuses)."""
    from safetensors.torch import save

    names = _LINEAR if isinstance(trained.head, LinearHead) else _MLP
    tensors = {name: torch.as_tensor(getattr(trained.head, name), dtype=torch.float32).contiguous() for name in names}
    metadata = {
        "format": FORMAT,
        "kind": "linear" if isinstance(trained.head, LinearHead) else "mlp",
        "class_names": json.dumps(trained.class_names),
        "encoder": json.dumps(None if trained.encoder is None else trained.encoder.to_json()),
        "run": trained.run,
        "own_rows": json.dumps(trained.own_rows),
        "not_private": json.dumps(trained.not_private),
        "task": trained.task,
    }
    write_output(path, save(tensors, metadata), kind=DataError, cure=NAME_ANOTHER)


def load_head(path: Path) -> TrainedHead:
    """Read a classifier.

    Raises:
        DataError: the file is missing, damaged, or no classifier of this project.
    """
    if not path.is_file():
        raise DataError(f"no classifier at {path}: make one with `fedhypevae train BUNDLE --out {path}`")
    notes, tensors = read_tensors(path)
    try:
        if notes.get("format") != FORMAT:
            raise DataError(f"{path} is no classifier of this project (format {notes.get('format')!r})")
        encoder = json.loads(notes["encoder"])
        task = notes.get("task", TASKS[0])  # classifiers from before there were tasks tell classes
        if task not in TASKS:
            raise ValueError(f"an unknown task {task!r}")
        trained = TrainedHead(
            head=_head(notes["kind"], tensors, findings=task != "multiclass"),
            class_names=tuple(str(name) for name in json.loads(notes["class_names"])),
            encoder=None if encoder is None else EncoderIdentity.from_json(encoder),
            run=notes["run"],
            own_rows=int(json.loads(notes["own_rows"])),
            not_private=tuple(str(reason) for reason in json.loads(notes["not_private"])),
            task=task,
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} can't be read as a classifier ({type(error).__name__}): train it again") from None
    if trained.head.bias.shape != (len(finding_names(trained.class_names, trained.task)),):
        raise DataError(f"{path} names {len(trained.class_names)} classes, its numbers are of another: train it again")
    return trained


def _flattened(head: Head, factor: float) -> LinearHead | MLPHead:
    if isinstance(head, LinearHead):
        return head.scaled(factor)
    if isinstance(head, MLPHead):
        return replace(head, weight=head.weight * factor, bias=head.bias * factor)
    raise ConfigError(f"a {type(head).__name__} can't be saved")


def _head(kind: str, tensors: Mapping[str, Tensor], *, findings: bool) -> LinearHead | MLPHead:
    if kind == "linear":
        return LinearHead(tensors["weight"], tensors["bias"], findings)
    if kind != "mlp":
        raise ValueError(f"an unknown kind {kind!r}")
    values: dict[str, Any] = {name: tensors[name] for name in _MLP}
    return MLPHead(**{**values, "scale": float(values["scale"])}, findings=findings)

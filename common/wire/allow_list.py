"""What may cross between server and sites: the allow-list of names, shapes and dtypes of every message.

Checked at the site before anything is sent and at the server when it arrives. Whatever is not on the list is refused
whole. Contexts travel as JSON text: configuration, problem and privacy plan, all of them public.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from common.config.operation import OPERATION
from common.errors import WireError
from common.methods.base import PrivacyPlan, Problem, RunContext
from common.names import Task
from common.wire.context_fields import read_context
from common.wire.identity import EncoderIdentity

Kind = Literal[
    "hello",
    "consent",
    "statistics",
    "train",
    "evaluate",
    "secagg_keys",
    "secagg_shares",
    "secagg_check",
    "secagg_masked",
    "secagg_unmask",
]

# The one tensor of a masked vector: integers modulo a power of two, as bytes.
MASKED = "masked"


def dtype_of(kind: Kind) -> torch.dtype:
    """Type of the tensors in a site's reply of a kind."""
    return torch.uint8 if kind == "secagg_masked" else torch.float32


def num_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of float32 tensors of these shapes, without headers."""
    return 4 * sum(math.prod(shape) for shape in shapes.values())


# Scores travel only where the site's policy declares its data public.
SCORE_NAMES = ("local_only", "statistics_only", "synthetic_only", "mixed", "own_lambda", "personal")
SCORE_PARTS = ("accuracy", "balanced_accuracy")
# Fields that a server's message may hold, by kind: those that must be there, and those that may.
_PLACE = frozenset({"seed", "alpha", "output_dir", "pool", "data_is_public", "epsilon", "unit"})
_TASK = frozenset({"context", "run", "index"})
_SUM = _TASK | {"what", "attempt"}
_RECEIPT = frozenset({"receipt", "seal"})
REQUEST_FIELDS: dict[Kind, tuple[frozenset[str], frozenset[str]]] = {
    "hello": (_PLACE, frozenset()),
    "consent": (_TASK, _RECEIPT),
    "statistics": (_TASK, _RECEIPT),
    "train": (_TASK | {"round"}, _RECEIPT),
    "evaluate": (_TASK | {"mixing"}, _RECEIPT),
    "secagg_keys": (_SUM, _RECEIPT | {"round"}),
    "secagg_shares": (_SUM | {"cards"}, _RECEIPT | {"round"}),
    "secagg_check": (_SUM | {"boxes", "commitments"}, _RECEIPT | {"round"}),
    "secagg_masked": (_SUM, _RECEIPT | {"round"}),
    "secagg_unmask": (_SUM | {"survivors"}, _RECEIPT | {"round"}),
}


@dataclass(frozen=True)
class SiteFacts:
    """What a site tells about itself before a run; no counts.

    Attributes:
        site: its name.
        position: its index in a simulation, or -1.
        identity: encoder, revision, width, preprocessing and class list.
        canary: its embedding of the project's canary image, as text; empty for an imported set.
        public: whether its policy declares its data public.
        task: what its labels are.
    """

    site: str
    position: int
    identity: EncoderIdentity
    canary: str
    public: bool
    task: Task = "multiclass"


def check_tensors(kind: Kind, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a set of tensors that is not exactly the one allowed.

    Args:
        kind: of the message, for the error's text.
        tensors: what is to be sent, or has arrived.
        shapes: allowed name -> shape; every one must be there, and no other.

    Raises:
        WireError: names the first tensor that is missing, unknown, of another shape or dtype, or not finite. Its text
            holds names and shapes, never values.
    """
    check_names(kind, tensors, shapes)
    wanted = dtype_of(kind)
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != wanted:
            raise WireError(
                f"message {kind}: tensor {name!r} must be {_word(wanted)} of shape {tuple(shape)}, found "
                f"{_word(tensor.dtype)} of shape {tuple(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise WireError(f"message {kind}: tensor {name!r} has values that are not finite")


def check_names(kind: Kind, tensors: Iterable[str], shapes: Iterable[str]) -> None:
    """Refuse other tensors than those allowed (WireError), by their names alone."""
    unknown, missing = sorted(set(tensors) - set(shapes)), sorted(set(shapes) - set(tensors))
    if unknown:
        raise WireError(f"message {kind}: tensor {unknown[0][:40]!r} is not on the allow-list; nothing of it is used")
    if missing:
        raise WireError(f"message {kind}: tensor {missing[0]!r} is missing; nothing of it is used")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def encode_events(events: Sequence[str]) -> str:
    """What a site was charged, as the word of a reply: each event once with how often it follows itself.

    A ledger holds an event for every round; listed one by one they would outgrow the sums that they are about.
    """
    return json.dumps([[event, len(list(same))] for event, same in groupby(events)])


def check_scores(scores: Mapping[str, object]) -> None:
    """Refuse scores with names other than those of SCORE_NAMES and SCORE_PARTS (WireError)."""
    allowed = {f"{name}.{part}" for name in SCORE_NAMES for part in SCORE_PARTS}
    unknown = sorted(set(scores) - allowed)
    if unknown:
        raise WireError(f"message evaluate: score {unknown[0]!r} is not on the allow-list; nothing of it is used")


def dump_context(context: RunContext) -> str:
    """A run's public context as JSON text."""
    return json.dumps(
        {
            "config": context.config.to_flat(),
            "problem": {**asdict(context.problem), "class_names": list(context.problem.class_names)},
            "plan": asdict(context.plan),
        },
        sort_keys=True,
    )


def run_identity(context: str) -> dict[str, Any]:
    """What makes a run this run and no other: its context (as JSON text) without the settings of operation."""
    values: dict[str, Any] = json.loads(context)
    values["config"] = {key: value for key, value in values["config"].items() if key not in OPERATION}
    return values


def settings_digest(context: RunContext) -> str:
    """SHA-256 of `run_identity`, hexadecimal: the same for every message of a run, whenever it is resumed."""
    return hashlib.sha256(json.dumps(run_identity(dump_context(context)), sort_keys=True).encode()).hexdigest()


def load_context(text: str) -> RunContext:
    """The inverse of `dump_context`, for a text that anybody may have written.

    Raises:
        ConfigError: the text is not a context, or a field is out of its public range (`common.wire.context_fields`).
    """
    config, problem, plan = read_context(text)
    facts = problem.model_dump()
    sequences: dict[str, tuple[Any, ...]] = {name: tuple(facts[name]) for name in ("class_names", "site_dims")}
    sequences["label_sets"] = tuple(map(tuple, facts["label_sets"]))
    return RunContext(config, Problem(**{**facts, **sequences}), PrivacyPlan(**plan.model_dump()))

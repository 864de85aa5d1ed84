"""The server's state on disk: written after every round, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from common.durable import write_output
from common.errors import ConfigError
from common.methods.base import ServerState
from common.names import STATUS
from common.privacy.combined import ReleasedStatistics
from common.texts import object_or_empty
from server_app.progress import read_events

_FILE = "checkpoint.safetensors"
_PARTS = ("params", "memory")
_STATISTICS = (
    "centre",
    "class_counts",
    "class_means",
    "covariance",
    "class_features",
    "class_offsets",
    "site_counts",
    "site_indices",
    "known_counts",
    "pair_counts",
)


@dataclass(frozen=True)
class Progress:
    """What a resumed run needs to know beside the tensors.

    Attributes:
        run_name: lasting name of the run, under which sites charge it.
        context: the run's public context as JSON text; a resumed run must have the same.
        taken_part: for each round, the sites whose sums were used.
        missing: for each round, site -> why it was not.
        history: for each round, its seconds, bytes and each site's ε by then (see `RoundRecord.history`).
        charged: site -> JSON list of the events in its own ledger, as it last said: each mechanism once.
        receipts: site -> head of its ledger after its last release: shows, later, whether an old ledger was put back.
        members: index of every site that ever was in the run, by name.
        bytes_up: site -> bytes received. bytes_down: site -> bytes sent.
        seconds: time spent so far.
        refused: replies that broke a rule, see `Refusals.found`.
        left_out: site -> the lie for which secure sums do without it.
        lost_sums: secure sums that came to nothing after sites were charged for them.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # a field of another version's checkpoint is refused

    run_name: str
    context: str
    taken_part: tuple[tuple[str, ...], ...] = ()
    missing: tuple[Mapping[str, str], ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    charged: Mapping[str, str] = field(default_factory=dict)
    receipts: Mapping[str, str] = field(default_factory=dict)
    members: Mapping[str, int] = field(default_factory=dict)
    bytes_up: Mapping[str, int] = field(default_factory=dict)
    bytes_down: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    refused: tuple[Mapping[str, Any], ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    lost_sums: int = 0


def check_own(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that a run may not write to: each run has one of its own, and a completed run stays as it is.

    A run that ended before its first checkpoint, as one that no sites came to, left nothing: its folder is free.

    Args:
        folder: where the run would write.
        resume: whether it goes on with the run that is there.

    Raises:
        ConfigError: another run, or a completed one, is there; nothing was changed.
    """
    state = object_or_empty(folder / STATUS).get("status")
    if resume and state == "completed":
        raise ConfigError(f"the run in {folder} is complete: leave resume out to start a new one")
    if not resume and (state not in {None, "failed"} or (folder / _FILE).exists()):
        raise ConfigError(f"{folder} holds a run ({state}): name a new folder with output-dir, or go on with resume")


def save_checkpoint(folder: Path, state: ServerState, progress: Progress) -> None:
    """Write state and progress as one file, by way of a temporary one.

    Raises:
        FedHypeVAEError: the disk refuses; the last checkpoint is untouched.
    """
    tensors = {f"{part}/{name}": value for part in _PARTS for name, value in getattr(state, part).items()}
    notes: dict[str, Any] = {"round": state.round, "progress": asdict(progress)}
    statistics = state.statistics
    if statistics is not None:
        for name in _STATISTICS:
            value = getattr(statistics, name)
            if value is not None:
                tensors[f"statistics/{name}"] = value
        notes["statistics"] = {"total": statistics.total, "noise_std": dict(statistics.noise_std)}
    content = save(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        {"notes": json.dumps(notes)},
    )
    write_output(folder / _FILE, content)


def load_checkpoint(folder: Path) -> tuple[ServerState, Progress]:
    """Read the last checkpoint: the server's state, and what was done.

    Raises:
        ConfigError: there is none, or it can't be read: damaged, or of another version.
    """
    path = folder / _FILE
    if not path.is_file():
        raise ConfigError(f"no checkpoint at {path}: start the run without resume, or name its output-dir")
    try:
        return _read(path)
    except Exception as error:
        raise ConfigError(
            f"checkpoint {path} can't be read ({type(error).__name__}): it is damaged, or of another version: restore "
            "it, or start a new run"
        ) from error


def _read(path: Path) -> tuple[ServerState, Progress]:
    with safe_open(path, framework="pt") as file:
        notes = json.loads(file.metadata()["notes"])
        names = file.keys()
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "memory": {}, "statistics": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    statistics = None
    if "statistics" in notes:
        found: dict[str, Any] = {name: parts["statistics"].get(name) for name in _STATISTICS}
        statistics = ReleasedStatistics(**found, **notes["statistics"])
    state = ServerState(notes["round"], parts["params"], parts["memory"], statistics)
    progress = _PROGRESS.validate_python(notes["progress"])
    for text in progress.charged.values():
        read_events(text)
    if state.round != len(progress.taken_part):
        raise ValueError("its state is of another round than its progress")
    return state, progress


def with_round(
    progress: Progress, taken_part: tuple[str, ...], missing: Mapping[str, str], history: Mapping[str, Any]
) -> Progress:
    """Progress after one more round."""
    return replace(
        progress,
        taken_part=(*progress.taken_part, taken_part),
        missing=(*progress.missing, dict(missing)),
        history=(*progress.history, dict(history)),
    )


_PROGRESS = TypeAdapter(Progress)

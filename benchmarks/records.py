"""What the performance scripts share: where results go, under which conditions, and a measurement beside its goal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.durable import write_atomically

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, Any]:
    """The machine and its load at the start: a shared machine makes times longer, and ratios less so."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu_name(),
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }


def gpu_name() -> str:
    """The card that is here; the scripts of a step and of rounds use the processor all the same."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none at hand"


def write_result(name: str, result: object, out: Path | None = None) -> Path:
    """Write `results/NAME.json` beside the scripts, or another file."""
    path = RESULTS / f"{name}.json" if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
    return path


def record(
    name: str, value: float, goal: str, unit: str, met: bool, *, spread: Sequence[float] = (), reason: str = ""
) -> dict[str, Any]:
    """One measurement beside its goal.

    Args:
        name: what was measured.
        value: the figure.
        goal: what it should be, in words, such as "<= 1.3".
        unit: of the figure.
        met: whether it is.
        spread: lowest and highest, or the quartiles.
        reason: why it is not met, or what the figure leaves out.
    """
    found: dict[str, Any] = {"name": name, "value": value, "goal": goal, "unit": unit, "met": met}
    if spread:
        found["spread"] = [round(one, 4) for one in spread]
    if reason:
        found["reason"] = reason
    return found

"""A flame graph of one call: pyinstrument's samples of the stack, drawn as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_LEAST_SHARE = 0.004  # narrower boxes are left out
_LEAST_NAMED = 0.03  # and narrower ones bear no name
_DEEPEST = 18  # calls above the first; what lies deeper is inside a library
_COLOURS = {"common": "#e07b39", "torch": "#6c9bd2", "numpy": "#7fb77e"}


def sample_stack(work: Callable[[], object], interval: float = 0.001) -> Any:
    """Run a call under the sampler; its root frame, in which a caller's calls of one function are one frame."""
    from pyinstrument import Profiler
    from pyinstrument.processors import aggregate_repeated_calls

    profiler = Profiler(interval=interval, async_mode="disabled")
    profiler.start()
    try:
        work()
    finally:
        session = profiler.stop()
    root = session.root_frame(trim_stem=True)
    if root is None:
        raise RuntimeError("the sampler saw no frame: the call was too short")
    return aggregate_repeated_calls(root, {})


def own_times(root: Any, count: int = 12) -> list[dict[str, Any]]:
    """Functions by the share of samples that were in them and in nothing below them."""
    own: dict[str, float] = {}

    def walk(frame: Any) -> None:
        name = _label(frame)
        own[name] = own.get(name, 0.0) + frame.total_self_time
        for child in _called(frame):
            walk(child)

    walk(root)
    ranked = sorted(own.items(), key=lambda item: -item[1])[:count]
    return [{"function": name, "share": round(seconds / root.time, 3)} for name, seconds in ranked]


def draw_flame(root: Any, path: Path, title: str) -> None:
    """Draw boxes whose width is time, callers below what they call."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    boxes: list[tuple[float, int, float, Any]] = []

    def place(frame: Any, left: float, depth: int) -> None:
        share = frame.time / root.time
        if share < _LEAST_SHARE or depth > _DEEPEST:
            return
        boxes.append((left, depth, share, frame))
        for child in _called(frame):
            place(child, left, depth + 1)
            left += child.time / root.time

    place(root, 0.0, 0)
    depth = 1 + max(box[1] for box in boxes)
    figure, axes = plt.subplots(figsize=(12, 0.32 * depth + 0.8))
    for left, level, share, frame in boxes:
        file = str(frame.file_path or "")
        colour = next((value for part, value in _COLOURS.items() if f"/{part}/" in file), "#cfcfcf")
        axes.add_patch(Rectangle((left, level), share, 0.94, facecolor=colour, edgecolor="white", linewidth=0.4))
        if share >= _LEAST_NAMED:
            text = f"{frame.function} {100 * share:.0f} %"
            axes.text(left + 0.003, level + 0.45, text[: int(share * 150)], va="center", fontsize=7)
    axes.set(xlim=(0, 1), ylim=(0, depth), yticks=[], title=f"{title} ({root.time:.1f} s)")
    axes.set_xlabel("share of the time; orange: this project's common/, blue: torch, green: numpy")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _called(frame: Any) -> list[Any]:
    """What a frame called, the longest first; the sampler's stand-ins for a frame's own time are none."""
    return [child for child in frame.children if not child.is_synthetic]


def _label(frame: Any) -> str:
    file = Path(str(frame.file_path or "built-in")).name
    return f"{file}:{frame.function}"

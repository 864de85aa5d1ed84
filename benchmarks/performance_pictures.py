"""Pictures of the performance results: the private step by size, a message by parts, cost by number of sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def draw_pictures(folder: Path) -> None:
    """Draw performance-*.png beside the results; a result that is not there gets no picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for name, draw in (("step_cost", _step), ("round", _message), ("server", _server)):
        path = folder / f"{name}.json"
        if path.is_file():
            figure = draw(json.loads(path.read_text(encoding="utf-8")), plt)
            figure.tight_layout()
            figure.savefig(folder / f"performance-{name}.png", dpi=110)
            plt.close(figure)


def _step(result: dict[str, Any], plt: Any) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(12, 4))
    sizes = result["sizes"]
    names = [f"{one['decoder'].split('-')[0]}\n{one['dim']}\n{one['batch']}" for one in sizes]
    for way, colour in (("private", "#e07b39"), ("opacus ghost", "#6c9bd2")):
        for panel, key in zip(panels, ("ratio_to_plain", "memory_to_plain"), strict=True):
            panel.plot([one["ways"][way][key] for one in sizes], "o-", color=colour, label=way)
    for panel, what, goal in zip(panels, ("time", "memory"), (1.3, 1.2), strict=True):
        panel.axhline(goal, color="grey", linestyle="--", label=f"goal {goal}")
        panel.set(title=f"One step: {what} over the plain step", xticks=range(len(sizes)), ylim=(0, None))
        panel.set_xticklabels(names, fontsize=6)
        panel.set_xlabel("decoder, width, batch")
        panel.legend()
    return figure


def _message(result: dict[str, Any], plt: Any) -> Any:
    figure, (panel, rounds) = plt.subplots(1, 2, figsize=(13, 3), width_ratios=(3, 2))
    message = result["message"]
    parts = message["our_parts_cpu_seconds"]
    inner = {name.split(": ", 1)[1]: value for name, value in parts.items() if name.startswith("handler: ")}
    outer = {name: value for name, value in parts.items() if not name.startswith("handler")}
    rest = parts["handler"] - sum(inner.values())
    left = 0.0
    for name, value in {**outer, **inner, "rest of the handler": rest}.items():
        if value >= 0.004:
            panel.barh("ours", value, left=left, label=f"{name} {1e3 * value:.0f} ms")
            left += value
    panel.barh("floor", message["floor_cpu_seconds"], color="lightgrey")
    panel.set(xlabel="processor seconds of a fresh process for one training message")
    panel.legend(fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    _rounds(result, rounds)
    return figure


def _rounds(result: dict[str, Any], panel: Any) -> None:
    """Seconds of the rounds over real processes: one point a round."""
    if "loopback" not in result:
        panel.set_axis_off()
        return
    warm = result["loopback"]
    kinds = {"warm sites": warm["ours_seconds"], "fresh processes": warm["cold"]["ours_seconds"]}
    for name, seconds in {**kinds, "floor": warm["floor_seconds"]}.items():
        panel.plot(seconds, [name] * len(seconds), "o", color="lightgrey" if name == "floor" else "#e07b39")
    panel.set(xlabel=f"seconds of a round of {result['sites']} sites, over real processes", xlim=(0, None))
    panel.margins(y=0.3)


def _server(result: dict[str, Any], plt: Any) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4))
    rows = result["loop"]
    panels[0].semilogx([row["sites"] for row in rows], [row["milliseconds_per_site_round"] for row in rows], "o-")
    panels[0].set(title="plain loop", xlabel="sites", ylabel="ms a site and round", ylim=(0, 7))
    alone = result["server_alone"]
    panels[1].semilogx([row["sites"] for row in alone], [row["peak_memory_mib"] for row in alone], "o-")
    panels[1].set(title="the server alone", xlabel="sites", ylabel="peak memory, MiB", ylim=(0, None))
    return figure

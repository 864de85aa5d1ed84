"""The demonstration around its run: a check before it, a table and a picture after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.config.run import RunConfig
from common.durable import lock_file
from common.errors import ConfigError
from deploy.console import console

if TYPE_CHECKING:
    from rich.table import Table

_ROWS = {
    "local_only": "own data",
    "statistics_only": "noised means",
    "synthetic_only": "synthetic",
    "mixed": "mixed 1:1",
    "own_lambda": "mixed, tuned",
    "personal": "own model",
}
_SHOWN = 1500
_NAMED = 30  # classes in a legend
_TRACES = ("status.json", "summary.json", "checkpoint.safetensors", "sites")  # any of them: a run was here


def check_resume(config: RunConfig, output: Path) -> None:
    """Refuse to go on with a run of which nothing is there (ConfigError)."""
    checkpoint = output / "checkpoint.safetensors"
    if config.operation.resume and not checkpoint.is_file():
        raise ConfigError(f"no checkpoint at {checkpoint}: leave --resume out to start a new run")


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold a run's folder until the end (ConfigError: another demonstration does)."""
    try:
        with lock_file(output.with_name(f".{output.name}.lock"), timeout_s=0.0):
            yield
    except TimeoutError:
        raise ConfigError(f"another demonstration runs in {output}: wait for it, or set another output-dir") from None


def clear_output(output: Path) -> None:
    """Remove an earlier run's folder, its simulated sites included.

    Raises:
        ConfigError: the folder holds something else; nothing was removed.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not any((output / name).exists() for name in _TRACES):
        raise ConfigError(f"{output} holds files that no run made: empty it, or choose another output-dir")
    shutil.rmtree(output)


def present(output: Path, work_folder: Path) -> None:
    """Draw the picture and print the table of a completed run."""

    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    config = RunConfig.from_flat(summary["config"])
    try:
        picture = f"picture {_picture(output, work_folder, config)}"
    except Exception as error:  # the run is done: what can't be drawn must not hide what it made
        picture = f"no picture: it could not be drawn ({type(error).__name__}: {error})"
    printed = console()
    if summary["scores"]:
        printed.print(_score_table(summary["scores"]))
    else:
        printed.print(f"no scores: {why_no_scores(summary)}")
    privacy = summary["privacy"]
    spent = max(privacy["epsilon_spent_per_site"].values())
    printed.print(
        f"epsilon spent {spent:.2f} of {privacy['epsilon_target']:g} at delta {privacy['delta']:g}, "
        f"{privacy['neighbouring']} ({privacy['unit']}); end to end: {'yes' if privacy['end_to_end'] else 'NO'}"
    )
    printed.print(f"{summary['synthetic_rows']} synthetic embeddings in {output / 'synthetic.parquet'}", soft_wrap=True)
    printed.print(picture, soft_wrap=True)


def why_no_scores(summary: Mapping[str, Any]) -> str:
    """Why a summary has no scores, in words."""
    if not summary["privacy"]["data_is_public"]:
        return "the pool is not declared public (data-is-public), so they stay at the sites"
    return "no site has records left to test on; give each more than one record of a class"


def _score_table(all_scores: Mapping[str, Any]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    sites = sorted(next(iter(all_scores.values()))["per_site"], key=lambda name: int(name.split("-")[-1]))
    table = Table(title="accuracy/balanced accuracy in %, on each site's own test images", box=SIMPLE_HEAD)
    table.add_column("trained on", no_wrap=True)
    for name in [*sites, "mean"]:
        table.add_column(name, justify="right", no_wrap=True)
    for key, label in _ROWS.items():
        scores = all_scores.get(key)
        if scores is not None:
            table.add_row(label, *[_cell(scores["per_site"][site]) for site in sites], _cell(scores))
    return table


def _cell(scores: Mapping[str, Any]) -> str:
    return f"{100 * scores['accuracy']:.1f}/{100 * scores['balanced_accuracy']:.1f}"


def _picture(output: Path, work_folder: Path, config: RunConfig) -> Path:
    """Real and synthetic embeddings side by side, on the two main axes of the real ones: a simulation is all ours."""
    import pyarrow.parquet as pq

    from embeddings.simulation.simulated import open_pool

    pool = open_pool(work_folder, config.federation)
    real = pool.embeddings / np.linalg.norm(pool.embeddings, axis=1, keepdims=True)
    table = pq.read_table(output / "synthetic.parquet")
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    synthetic = flat.reshape(len(table), -1)
    return draw_pair(
        output / "embeddings.png",
        (real, pool.labels),
        (synthetic, table["label"].to_numpy()),
        pool.metadata.class_names,
    )


def draw_pair(
    path: Path,
    real: tuple[NDArray[np.float32], NDArray[np.int64]],
    synthetic: tuple[NDArray[np.float32], NDArray[np.int64]],
    class_names: tuple[str, ...],
) -> Path:
    """Two scatter plots with one pair of axes, coloured by class: those that are there, the first 30 in the legend.

    Args:
        path: the PNG to write.
        real: embeddings (n, d) and labels (n,).
        synthetic: embeddings (m, d) and labels (m,).
        class_names: names of the labels.

    Returns:
        `path`.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    project, axis_name = _projection(*real)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.6), sharex=True, sharey=True, layout="constrained")
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, max(len(class_names), 2)))
    present = np.union1d(real[1], synthetic[1]).tolist()
    rng = np.random.default_rng(0)
    for axis, title, (values, labels) in zip(axes, ("real", "synthetic, private"), (real, synthetic), strict=True):
        rows = rng.permutation(len(labels))[:_SHOWN]
        points = project(values[rows])
        for index in present:
            chosen = labels[rows] == index
            axis.scatter(
                points[chosen, 0], points[chosen, -1], s=7, color=colours[index], label=class_names[index], alpha=0.8
            )
        axis.set_title(title)
        axis.set_xlabel(f"first {axis_name} of the real embeddings")
    axes[0].set_ylabel("second axis")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles[:_NAMED], names[:_NAMED], loc="outside lower center", ncols=6, markerscale=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _projection(
    values: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[Callable[[NDArray[np.float32]], NDArray[np.float64]], str]:
    """The directions that tell the classes apart, within the fifty that carry most variance; else the latter alone.

    Args:
        values: (n, d), n >= 1.
        labels: (n,).

    Returns:
        The map from rows to points (n, 1 or 2), and what an axis is called.
    """
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    if len(labels) < 2:
        return lambda rows: rows[:, :2].astype(np.float64), "coordinate"
    reduce = PCA(min(50, *values.shape), random_state=0).fit(values)
    classes = len(np.unique(labels))
    if not 1 < classes < len(labels):  # one class has no other, and a class of one record each no spread
        return lambda rows: reduce.transform(rows)[:, :2], "component"
    apart = LinearDiscriminantAnalysis(n_components=min(2, classes - 1, reduce.n_components_))
    apart.fit(reduce.transform(values), labels)
    return lambda rows: apart.transform(reduce.transform(rows)), "discriminant axis"

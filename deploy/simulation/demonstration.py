"""The demonstration around its run: a check before it; tables, a picture and a page after it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.config.run import RunConfig
from common.durable import lock_file, write_atomically
from common.errors import ConfigError
from common.evaluation.heads import LinearHead, fit_linear_head
from common.records import on_sphere
from deploy.console import console
from deploy.report.run import read_run, render_run
from deploy.simulation.take_home import as_records, home_table, in_words, take_home

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
_SHOWN = 1000
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
    """Print a completed run's tables, and write take_home.json, the picture and the page beside its results."""
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    config = RunConfig.from_flat(summary["config"])
    printed = console()
    privacy = summary["privacy"]
    spent = max(privacy["epsilon_spent_per_site"].values())
    if summary["scores"]:
        printed.print(_score_table(summary["scores"]))
    else:
        printed.print(f"no scores: {why_no_scores(summary)}")
    if summary["scores"] and config.federation.task == "multiclass":  # findings and grades are scored in other ways
        rows, labels = _published(output)
        found = take_home(work_folder, config, (torch.tensor(rows), torch.tensor(labels)))
        write_atomically(output / "take_home.json", (json.dumps(as_records(found), indent=1) + "\n").encode())
        printed.print(home_table(found))
        printed.print(in_words(found, len(np.unique(labels)), spent) + "\n")
    printed.print(
        f"epsilon spent {spent:.2f} of {privacy['epsilon_target']:g} at delta {privacy['delta']:g}, "
        f"{privacy['neighbouring']} ({privacy['unit']}); end to end: {'yes' if privacy['end_to_end'] else 'NO'}"
    )
    printed.print(f"{summary['synthetic_rows']} synthetic embeddings in {output / 'synthetic.parquet'}", soft_wrap=True)
    try:
        printed.print(f"picture {_picture(output, work_folder, config)}", soft_wrap=True)
        page = output / "report.html"
        write_atomically(page, render_run(read_run(output)).encode())
        printed.print(f"look at it: {sys.executable} -m webbrowser {page}", soft_wrap=True)
    except Exception as error:  # the run is done: what can't be drawn must not hide what it made
        printed.print(f"no picture: it could not be drawn ({type(error).__name__}: {error})", soft_wrap=True)


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


def _published(output: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The run's synthetic rows (m, d) and labels (m,)."""
    import pyarrow.parquet as pq

    table = pq.read_table(output / "synthetic.parquet")
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(table), -1), table["label"].to_numpy()


def _picture(output: Path, work_folder: Path, config: RunConfig) -> Path:
    """Real and synthetic embeddings side by side: a simulation is all ours."""
    from embeddings.simulation.simulated import open_pool

    pool = open_pool(work_folder, config.federation)
    real = pool.embeddings / np.linalg.norm(pool.embeddings, axis=1, keepdims=True)
    names = pool.metadata.class_names
    return draw_pair(output / "embeddings.png", (real, pool.labels), _published(output), names)


def draw_pair(
    path: Path,
    real: tuple[NDArray[np.float32], NDArray[np.int64]],
    synthetic: tuple[NDArray[np.float32], NDArray[np.int64]],
    class_names: tuple[str, ...],
) -> Path:
    """Two maps with one pair of axes, as a classifier of the synthetic set sees both; each class named where it lies.

    Args:
        path: the PNG to write.
        real: embeddings (n, d) and labels (n,).
        synthetic: embeddings (m, d) and labels (m,).
        class_names: names of the labels.

    Returns:
        `path`.
    """
    from deploy.report.draw import new_figure, scatter_classes

    rng = np.random.default_rng(0)
    rows, classes = map(torch.tensor, synthetic)
    shared = fit_linear_head(rows, classes, num_classes=len(class_names))
    parts = [
        (values[rows], labels[rows])
        for values, labels in (real, synthetic)
        for rows in [rng.permutation(len(labels))[:_SHOWN]]
    ]
    points = class_map(shared, np.concatenate([values for values, _ in parts]))
    limits = np.stack([points.min(axis=0), points.max(axis=0)])
    figure, whole = new_figure(12, 5.8)
    whole.remove()
    for number, half in enumerate(np.split(points, [len(parts[0][1])])):
        title, labels = ("real", "synthetic, private")[number], parts[number][1]
        axes = figure.add_subplot(1, 2, number + 1)
        axes.set_title(f"{title}: {len(labels):,} embeddings", fontsize=12)
        scatter_classes(axes, half, labels, class_names, limits)
    figure.supxlabel("where a classifier that was trained on the synthetic set puts them", fontsize=10)
    figure.savefig(path, dpi=110)
    return path


def class_map(head: LinearHead, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Embeddings (n, d) on a plane (n, 2) where those lie together to which a classifier gives the same class scores.

    Neighbours are found by the direction of the centred scores, and drawn by t-SNE (van der Maaten and Hinton 2008):
    most of an embedding's length is noise there that tells no classes apart.
    """
    from sklearn.manifold import TSNE

    scores = head.logits(torch.tensor(embeddings)).double()
    directions = on_sphere(scores - scores.mean(dim=1, keepdim=True)).numpy()
    if len(directions) < 4:
        return np.asarray(directions[:, [0, -1]])
    placing = TSNE(init="random", perplexity=min(30.0, (len(directions) - 1) / 3), random_state=0)
    return np.asarray(placing.fit_transform(directions), dtype=np.float64)

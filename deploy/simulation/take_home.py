"""What each simulated hospital takes home: its own model, and the same with the shared set, on whose patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.evaluation.heads import fit_linear_head
from common.evaluation.scores import MIXING, balanced_accuracy, mix_probabilities

if TYPE_CHECKING:
    from rich.table import Table

_FOUND = 0.5  # a class is missed where a model names fewer than half of its images rightly


@dataclass(frozen=True)
class Model:
    """One model's balanced accuracy, in [0, 1], on the hospital's own test patients and on those of all hospitals, and
    the classes of which it finds fewer than half among the latter."""

    own_patients: float
    all_patients: float
    missed: tuple[str, ...]


@dataclass(frozen=True)
class TakeHome:
    """A hospital's own model, and the same mixed 1:1 with a model of the shared set."""

    site: str
    alone: Model
    with_set: Model


def take_home(work_folder: Path, config: RunConfig, synthetic: tuple[Tensor, Tensor]) -> list[TakeHome]:
    """Score both models of every simulated hospital; their patients lie in the simulation's own pool.

    Args:
        work_folder: folder that the run's paths start from.
        config: the run's.
        synthetic: the published rows (m, d) and labels (m,).

    Returns:
        One entry a site, but for those without a record to train or to test on.
    """
    from client_app.records import split_data
    from embeddings.simulation.simulated import deal, open_pool, take_site

    pool, federation = open_pool(work_folder, config.federation), config.federation
    names = pool.metadata.class_names
    owners = deal(pool, federation.num_sites, federation.alpha or None, federation.seed)
    sites = [take_site(pool, owners, index, federation.seed) for index in range(federation.num_sites)]
    tests = [split_data(site, "test", "record") for site in sites]
    everybody = torch.cat([one.embeddings for one in tests]), torch.cat([one.labels for one in tests])
    shared = fit_linear_head(*synthetic, num_classes=len(names))
    found = []
    for index, (site, test) in enumerate(zip(sites, tests, strict=True)):
        train = split_data(site, "train", "record")
        if min(len(train.labels), len(test.labels)) == 0:
            continue
        own = fit_linear_head(train.embeddings, train.labels, num_classes=len(names))

        def decisions(rows: Tensor, mixing: float, own: Any = own) -> Tensor:
            return mix_probabilities(own.probabilities(rows), shared.probabilities(rows), mixing).argmax(1)

        alone, with_set = (
            Model(
                balanced_accuracy(test.labels, decisions(test.embeddings, mixing)),
                balanced_accuracy(everybody[1], decisions(everybody[0], mixing)),
                _missed(everybody[1], decisions(everybody[0], mixing), names),
            )
            for mixing in (1.0, MIXING)
        )
        found.append(TakeHome(f"site-{index + 1}", alone, with_set))
    return found


def _missed(labels: Tensor, decisions: Tensor, names: Sequence[str]) -> tuple[str, ...]:
    right = labels == decisions
    present = torch.unique(labels).tolist()
    return tuple(names[index] for index in present if float(right[labels == index].float().mean()) < _FOUND)


def as_records(found: Sequence[TakeHome]) -> list[Mapping[str, Any]]:
    """For a JSON file."""
    return [asdict(one) for one in found]


def home_table(found: Sequence[TakeHome]) -> Table:
    """A row for each hospital, and their means."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="what each hospital takes home: its own model, then with the shared set", box=SIMPLE_HEAD)
    table.add_column("hospital", no_wrap=True)
    for name in ("its own patients", "patients of all hospitals", "kinds that it misses among all"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(one.site, *_cells([one]))
    table.add_row("mean", *_cells(found), style="bold")
    return table


def _cells(found: Sequence[TakeHome]) -> list[str]:
    own, every, missed = (
        [_mean([getattr(model, name) for model in models]) for models in _both(found)]
        for name in ("own_patients", "all_patients", "missed")
    )
    kinds = "{:.0f} to {:.0f}" if len(found) == 1 else "{:.1f} to {:.1f}"
    return [f"{100 * pair[0]:.1f} to {100 * pair[1]:.1f} %" for pair in (own, every)] + [kinds.format(*missed)]


def in_words(found: Sequence[TakeHome], class_count: int, epsilon: float) -> str:
    """The result as one sentence."""
    (alone, shared), (lost, kept) = (
        [_mean([getattr(model, name) for model in models]) for models in _both(found)]
        for name in ("all_patients", "missed")
    )
    return (
        f"Of {class_count} kinds of images, a hospital's own model misses {lost:.1f} among the patients of all "
        f"hospitals, and {kept:.1f} with the shared set: its balanced accuracy there goes from {100 * alone:.0f} to "
        f"{100 * shared:.0f} %. No image left a hospital; each spent epsilon {epsilon:.2f}."
    )


def _both(found: Sequence[TakeHome]) -> tuple[list[Model], list[Model]]:
    return [one.alone for one in found], [one.with_set for one in found]


def _mean(values: Sequence[float | tuple[str, ...]]) -> float:
    return sum(len(value) if isinstance(value, tuple) else value for value in values) / len(values)

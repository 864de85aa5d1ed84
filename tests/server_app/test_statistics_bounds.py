"""Statistics that no honest site can have: refused, their sender named, the set unharmed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from common.config.run import RunConfig
from common.errors import WireError
from common.methods import get_method
from common.privacy.noise import TestNoise
from common.privacy.sampling import draw_units
from common.privacy.statistics import StatisticsSpec, release_statistics
from common.records import SiteData, by_unit
from server_app.bounds import LARGEST_PARAMETERS, largest_norm
from server_app.checkpoint import load_checkpoint
from server_app.statistics_bounds import StatisticsBounds
from tests.harness import Federation, Handler, HarnessSite, words_of
from tests.secagg_cases import SHARED, keyed_federation

Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
DIM, CLASSES, RECORDS = 24, 3, 90
FREQUENCIES = torch.randn(8, DIM, generator=torch.Generator().manual_seed(1))
EVERY_PART = StatisticsSpec(DIM, CLASSES, 1.0, moment_weight=1.0, feature_weight=1.0, frequencies=FREQUENCIES)


def released(noise: float, *, records: int = RECORDS, seed: int = 0, patients: bool = False) -> dict[str, Tensor]:
    """An honest site's release of every part."""
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(records, DIM, generator=draws) + 1.0
    groups = torch.arange(records) // 3 if patients else None
    data = SiteData(rows, torch.randint(2, (records,), generator=draws), groups)  # the last class is empty
    units = by_unit(data, "patient" if patients else "record", CLASSES)
    batch = draw_units(units, 1.0, 4 if patients else 1, TestNoise(seed))
    return release_statistics(EVERY_PART, batch, noise, TestNoise(seed))


def bounds_of(noise: float, **settings: int) -> StatisticsBounds:
    return StatisticsBounds.of(RunConfig().replace(**settings), EVERY_PART, noise)


@pytest.mark.parametrize("noise", [0.0, 0.4, 5.0])
@pytest.mark.parametrize("patients", [False, True])
def test_honest_statistics_are_never_refused(noise: float, patients: bool) -> None:
    for seed, records in enumerate((0, 1, 7, RECORDS, 3000)):
        tensors = released(noise, records=records, seed=seed, patients=patients)
        bounds_of(noise).check(tensors)


def scaled(name: str, factor: float) -> Change:
    return lambda tensors: {**tensors, name: tensors[name] * factor}


def filled(name: str, value: float) -> Change:
    return lambda tensors: {**tensors, name: torch.full_like(tensors[name], value)}


def one_coordinate(name: str, value: float) -> Change:
    """One huge number."""

    def change(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        spoiled = tensors[name].clone()
        spoiled.view(-1)[0] = value
        return {**tensors, name: spoiled}

    return change


def everything(factor: float) -> Change:
    return lambda tensors: {name: value * factor for name, value in tensors.items()}


LIES: dict[str, tuple[Change, str]] = {
    "sums of 1e30": (filled("class_sums", 1e30), "class_sums longer"),
    "one sum of 1e30": (one_coordinate("class_sums", 1e30), "class_sums longer"),
    "sums seven times too long": (scaled("class_sums", 7.0), "class_sums longer"),
    "sums turned round": (scaled("class_sums", -1.0), "do not add up"),
    "total seven times too long": (scaled("total_sum", 7.0), "total_sum longer"),
    "total turned round": (scaled("total_sum", -1.0), "do not add up"),
    "total of 1e30": (filled("total_sum", 1e30), "total_sum longer"),
    "moment of 1e30": (filled("second_moment", 1e30), "second_moment longer"),
    "features of 1e30": (filled("class_features", 1e30), "class_features longer"),
    "features seven times too long": (scaled("class_features", 7.0), "class_features longer"),
    "counts of -1e9": (filled("class_counts", -1e9), "below zero"),
    "one count of -100": (one_coordinate("class_counts", -100.0), "below zero"),
    "counts of 1e9": (filled("class_counts", 1e9), "records that a site can have"),
    "counts a tenth": (scaled("class_counts", 0.05), "longer than"),
    "everything a million times": (everything(1e6), "records that a site can have"),
}


@pytest.mark.parametrize("lie", LIES)
def test_statistics_of_no_records_are_refused(lie: str) -> None:
    change, words = LIES[lie]
    noise = 0.4
    with pytest.raises(WireError, match=words):
        bounds_of(noise).check(change(released(noise)))


@pytest.mark.parametrize("public_total", [0, 100])
def test_number_of_records_at_one_site_is_bounded_by_what_is_public(public_total: int) -> None:
    bounds, claimed = bounds_of(0.4, public_total=public_total), everything(20.0)(released(0.0))
    if public_total:
        with pytest.raises(WireError, match="records that a site can have"):
            bounds.check(claimed)
    else:
        bounds.check(claimed)  # the same site twenty times over: nobody can tell


def test_uploads_without_clipping_have_a_bound_all_the_same() -> None:
    from common.methods.base import Problem, RunContext

    for changes in ({"method": "fedavg"}, {"lipschitz-penalty": 1.0}, {"epsilon": float("inf")}):
        config = RunConfig.from_flat({"num-rounds": 1, **changes})
        method = get_method(config.method)
        context = RunContext(config, Problem(8, ("a", "b"), 3), method.plan(config))
        assert largest_norm(context, method, method.init(context), [0, 1, 2]) <= LARGEST_PARAMETERS


def lie_in_run(change: Change) -> Any:
    """A network on which site-3's statistics are others."""

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        if site.name != "site-3" or message.metadata.message_type != "query.statistics":
            return reply
        lied = change(reply.content.array_records["tensors"].to_torch_state_dict())
        return Message(RecordDict({**reply.content, "tensors": ArrayRecord(dict(lied))}), reply_to=message)

    return tamper


def accuracy(summary: Mapping[str, Any], sites: tuple[str, ...] = ("site-1", "site-2")) -> float:
    scores = summary["scores"]["synthetic_only"]["per_site"]
    return sum(scores[site]["accuracy"] for site in sites) / len(sites)


@pytest.mark.parametrize("lie", ["sums of 1e30", "counts of -1e9", "counts a tenth", "sums seven times too long"])
def test_liar_is_named_and_the_set_is_as_good_as_without_it(tmp_path: Path, lie: str) -> None:
    # so much room in the budget that the noise, and so the bounds, are far below what the records add up to
    settings: dict[str, Any] = {"method": "dp_gauss", "epsilon": 20.0, "min_sites": 2}
    policy: dict[str, Any] = {"data_is_public": True, "metrics_may_leave": True, "min_noise_multiplier": 0.01}
    policy |= {"lifetime_epsilon": 100.0, "run_epsilon": 100.0, "allowed_methods": ("dp_gauss",)}
    federation = Federation.create(tmp_path, 3, records=300, **policy)
    summary = federation.run(tamper=lie_in_run(LIES[lie][0]), **settings)
    assert [(one["site"], one["when"]) for one in summary["refused_replies"]] == [("site-3", "statistics")]
    statistics = load_checkpoint(federation.output)[0].statistics
    assert statistics is not None
    assert statistics.site_indices is not None
    assert statistics.site_indices.tolist() == [0, 1]
    assert accuracy(summary) > 0.95
    for name in ("site-1", "site-2"):
        (run,) = federation.site(name).runs().values()
        assert [event.label for event in run.charged] == ["statistics"]


def test_sum_of_sites_that_none_can_have_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under secagg the sum alone is seen: it is refused, and nobody knows whose fault it is."""
    import client_app.answers.secure_sum as secagg
    from common.methods.shared_sums import statistics_arguments
    from common.privacy.statistics import statistics_sum
    from common.secagg.quantise import encode

    federation = keyed_federation(tmp_path, 4)
    honest = secagg.statistics_vector
    calls: list[int] = []

    def lying(context: Any, spec: Any, data: Any, source: Any) -> Any:
        calls.append(1)
        if len(calls) != 2:
            return honest(context, spec, data, source)
        from common.methods.site_release import statistics_batch

        sums = dict(statistics_sum(spec, statistics_batch(context, data, source)).tensors)
        sums["class_counts"] = sums["class_counts"] - 1e4
        return encode(statistics_arguments(context, spec), sums, source)

    monkeypatch.setattr(secagg, "statistics_vector", lying)
    with pytest.raises(SystemExit):
        federation.run(**SHARED)
    error = federation.status()["error"]
    assert "below zero" in error
    assert "nobody knows which" in error
    assert len(calls) == 4
    words = [words_of(seen.message) for seen in federation.sent(kind="query.secagg_unmask")]
    assert all("charged" in said for said in words)


def test_run_with_trimmed_statistics_bears_a_liar_that_nobody_can_tell(tmp_path: Path) -> None:
    """Site-3 claims fifty times its records, with the classes in another order: within every bound."""

    def turned(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {
            name: 50.0 * (value.roll(1, 0) if name != "second_moment" else value) for name, value in tensors.items()
        }

    settings: dict[str, Any] = {"method": "dp_gauss", "epsilon": 20.0}
    policy: dict[str, Any] = {"data_is_public": True, "metrics_may_leave": True, "min_noise_multiplier": 0.01}
    policy |= {"lifetime_epsilon": 100.0, "run_epsilon": 100.0, "allowed_methods": ("dp_gauss",)}
    federation = Federation.create(tmp_path, 7, records=300, **policy)
    found = {}
    for run, robust in enumerate(("off", "trimmed"), 1):
        summary = federation.run(tamper=lie_in_run(turned), run_id=run, robust_statistics=robust, **settings)
        found[robust] = accuracy(summary)
        assert summary["refused_replies"] == []
    assert found["trimmed"] > 0.9
    assert found["off"] < 0.5

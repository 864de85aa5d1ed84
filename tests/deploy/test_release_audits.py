"""Audits behind a release: of every kind of run, and able to fail."""

from __future__ import annotations

import pytest

from common.assurance.audit_run import AuditSize
from common.assurance.audit_statistics import audit_statistics
from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.privacy.noise import SecureNoise
from deploy.release.audits import audit_published, in_json, objections

SMALL = AuditSize(draws=100, canaries=20)


def context_of(**settings: str | int | float | bool) -> RunContext:
    flat = {name.replace("_", "-"): value for name, value in settings.items()}
    config = RunConfig.from_flat({"epsilon": 3.0, "num-rounds": 2, "encoder-width": 8, **flat})
    sites = config.federation.num_sites
    return RunContext(config, Problem(8, ("a", "b", "c"), sites), get_method(config.method).plan(config))


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, ["two-world", "one-run"]),
        ({"trust": "secagg", "num_sites": 4, "min_sites": 4}, ["two-world", "one-run"]),
        ({"method": "dp_gauss"}, ["two-world"]),
    ],
    ids=["local", "secagg", "statistics alone"],
)
def test_audit_of_honest_code_stands(settings: dict[str, str | int], kinds: list[str]) -> None:
    context = context_of(**settings)
    results, why_none = audit_published(context, SMALL, lambda *_: None)
    assert [result.kind for result in results] == kinds
    assert why_none == ""
    assert objections([in_json(result) for result in results], "", 3.0) == []


def test_audit_of_statistics_finds_weak_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a third of the noise the bound is above the claim: the check can fail."""
    config = context_of(method="dp_gauss").config
    honest = SecureNoise.exact_gaussian
    assert audit_statistics(config, draws=300, confidence=0.999).passed
    monkeypatch.setattr(SecureNoise, "exact_gaussian", lambda self, values, std: honest(self, values, std / 3.0))
    assert not audit_statistics(config, draws=300, confidence=0.999).passed


def test_audit_of_nothing_private_says_why() -> None:
    results, why_none = audit_published(context_of(method="fedavg"), SMALL, lambda *_: None)
    assert results == []
    assert "private method" in why_none
    assert objections([], why_none, 3.0) == [f"no audit could be made: {why_none}"]


def test_objections_hold_the_run_against_the_statement() -> None:
    """A bound below the plan's claim can still be above what the statement says."""
    run = {"kind": "one-run", "epsilon_bound": 2.0, "epsilon_claimed": 3.0}
    assert objections([run], "", 2.5) == []
    assert objections([run], "", 1.5) == [
        "the one-run audit shows that epsilon is at least 2.000, and 1.500 is claimed"
    ]

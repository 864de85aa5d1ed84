"""A statement against its own run: what is computed again, for every kind of trust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from common.assurance.statement import SiteCharge, StatementFacts, build_statement
from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.methods.shared_sums import assumptions_of
from common.privacy.events import PrivacyEvent
from common.secagg.assumptions import charged_events
from deploy.release.promises import faults_of, largest_epsilon, recomputed, withdraw

RECEIPT = "7:" + "0a" * 32


def case(trust: str = "local", rounds: int = 2, sites: int = 4) -> tuple[RunContext, dict[str, Any]]:
    """A run of some sites, each charged for the statistics and for two rounds."""
    flat = {"trust": trust, "num-sites": sites, "min-sites": 4, "num-rounds": 2, "method": "fedhypevae"}
    config = RunConfig.from_flat(flat)
    context = RunContext(config, Problem(6, ("a", "b"), sites), get_method("fedhypevae").plan(config))
    events = context.plan.statistics_events + context.plan.round_events * rounds
    charges = {f"site-{place}": SiteCharge(events, 2, RECEIPT) for place in range(1, sites + 1)}
    return context, build_statement(context, StatementFacts("run", charges, False))


@pytest.mark.parametrize("trust", ["local", "secagg"])
def test_statement_of_its_own_run_has_no_fault(trust: str) -> None:
    context, statement = case(trust)
    assert faults_of(statement, context) == []
    assert largest_epsilon(statement) == max(site["epsilon"] for site in statement["sites"].values())


def test_statement_of_another_run_has_faults() -> None:
    context, _ = case("local")
    _, statement = case("secagg")
    faults = faults_of(statement, context)
    assert any("trust_model" in fault for fault in faults)
    assert any("secure aggregation" in fault for fault in faults)


def test_site_that_was_charged_for_too_little_is_named() -> None:
    """Two rounds were used and one charged: ε fits its events, and yet a release is missing."""
    context, statement = case(rounds=1)
    assert [fault for fault in faults_of(statement, context) if fault.startswith("site site-3 was not charged for 1 ")]


def recharged(statement: dict[str, Any], context: RunContext, events: tuple[PrivacyEvent, ...], *sites: str) -> Any:
    """The statement with other charges at some sites, every figure computed from them."""
    for site in sites:
        statement["sites"][site]["events"] = [asdict(event) for event in events]
    return recomputed(statement, context)


def test_site_that_gave_no_statistics_is_charged_for_none_and_keeps_nobody_from_publishing() -> None:
    """It came later, or was silent then; where fewer are left than the run needs, charges were taken out."""
    context, statement = case()
    few = RunContext(context.config.replace(min_sites=3), context.problem, context.plan)
    statement = recharged(statement, few, context.plan.round_events * 2, "site-4")
    assert faults_of(statement, few) == []
    statement = recharged(statement, few, context.plan.round_events * 2, "site-3")
    assert [fault for fault in faults_of(statement, few) if "needs 3: not site-3" in fault]


def test_site_that_fears_more_colluders_is_charged_more_and_keeps_nobody_from_publishing() -> None:
    context, statement = case("secagg", sites=5)
    due = context.plan.statistics_events + context.plan.round_events * 2
    worse = charged_events(due, assumptions_of(context), 2)
    assert worse != due
    assert faults_of(recharged(statement, context, worse, "site-2"), context) == []
    less = tuple(replace(event, noise_multiplier=1.01 * event.noise_multiplier) for event in due)
    assert [fault for fault in faults_of(recharged(statement, context, less, "site-2"), context) if "site-2" in fault]


def own_share(statement: dict[str, Any]) -> None:
    statement["secure_aggregation"]["epsilon_of_own_share"] *= 0.9


def colluders(statement: dict[str, Any]) -> None:
    statement["secure_aggregation"]["colluders_assumed"] = 2


def without(statement: dict[str, Any]) -> None:
    del statement["secure_aggregation"]


@pytest.mark.parametrize("change", [own_share, colluders, without])
def test_changed_assumptions_of_secure_aggregation_are_found(change: Callable[[dict[str, Any]], None]) -> None:
    context, statement = case("secagg")
    change(statement)
    assert faults_of(statement, context)


@pytest.mark.parametrize("trust", ["local", "secagg"])
def test_withdrawn_statement_promises_nothing(trust: str) -> None:
    """No ε is left in it; it is right only for whoever knows that it was withdrawn, and why."""
    context, statement = case(trust)
    withdrawn = withdraw(statement, ["because"])
    assert all(site["epsilon"] is None for site in withdrawn["sites"].values())
    assert withdrawn["guarantee"]["epsilon_declared"] is None
    assert withdrawn.get("secure_aggregation", {}).get("epsilon_of_own_share") is None
    assert faults_of(withdrawn, context, ["because"]) == []
    assert faults_of(withdrawn, context, ["another reason"])
    assert faults_of(withdrawn, context)


@pytest.mark.parametrize("statement", [{}, {"format": "other"}, {"sites": []}])
def test_what_is_no_statement_is_a_fault(statement: dict[str, Any]) -> None:
    context, _ = case()
    assert len(faults_of(statement, context)) == 1

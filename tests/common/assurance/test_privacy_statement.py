"""The privacy statement: true to the run's events, complete by its schema, and plain where nothing is promised."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from common.assurance.statement import SiteCharge, StatementFacts, build_statement, check_statement
from common.config.run import RunConfig
from common.errors import FedHypeVAEError
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.privacy.composition import epsilon_pld

RECEIPT = "12:" + "a" * 64


def make_context(**settings: Any) -> RunContext:
    config = RunConfig().replace(**{"num_rounds": 3, "sampling_rate": 1.0, "epsilon": 2.0, **settings})
    return RunContext(config, Problem(8, ("a", "b"), 2), get_method(config.method).plan(config))


def make_facts(context: RunContext, **changes: Any) -> StatementFacts:
    plan = context.plan
    events = (*plan.statistics_events, *plan.round_events * plan.num_rounds)
    charges = {"site-1": SiteCharge(events, 3, RECEIPT), "site-2": SiteCharge(events[:-1], 2, RECEIPT)}
    return StatementFacts(**{"run": "run-1", "charges": charges, "data_is_public": False, **changes})


@pytest.fixture(scope="module")
def statement() -> dict[str, Any]:
    context = make_context()
    return build_statement(context, make_facts(context))


def test_statement_epsilon_is_that_of_the_charged_events(statement: dict[str, Any]) -> None:
    context = make_context()
    for name, rounds in (("site-1", 3), ("site-2", 2)):
        events = [*context.plan.statistics_events, *context.plan.round_events * rounds]
        site = statement["sites"][name]
        assert site["epsilon"] == epsilon_pld(events, context.plan.delta)
        assert site["rounds_used"] == rounds
        assert sum(event["count"] for event in site["events"]) == 1 + rounds
        assert site["epsilon"] <= site["epsilon_cross_checks"]["prv"] <= site["epsilon"] + 0.02
        assert site["epsilon"] <= site["epsilon_cross_checks"]["rdp"]
    assert statement["sites"]["site-2"]["epsilon"] < statement["sites"]["site-1"]["epsilon"]
    assert statement["sites"]["site-1"]["epsilon"] <= statement["guarantee"]["epsilon_declared"] <= 2.0


def test_statement_says_what_privacy_guides_ask_for(statement: dict[str, Any]) -> None:
    guarantee, mechanism = statement["guarantee"], statement["mechanism"]
    assert guarantee["end_to_end"] is True
    assert guarantee["neighbouring"] == "add or remove one unit"
    assert guarantee["membership_of_a_site_is_protected"] is False
    assert mechanism["steps_declared"] == 4  # three rounds and a spare one
    assert (mechanism["sampling_rate"], mechanism["clip_norm"]) == (1.0, 0.03)
    assert statement["accountant"]["version"][0].isdigit()
    assert {entry["what"] for entry in statement["released"]} >= {"statistics", "sums of gradients", "errors"}
    assert "scores" not in {entry["what"] for entry in statement["released"]}
    assert any("pre-training" in text for text in statement["not_covered"])
    assert "Mironov" in statement["caveats"]["floating_point"]


def test_statement_is_strict_json(statement: dict[str, Any]) -> None:
    assert json.loads(json.dumps(statement, allow_nan=False)) == statement


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"epsilon": float("inf")}, "epsilon is infinite"),
        ({"noise": "test"}, "known seed"),
        ({"encoder_training": "unprotected"}, "without clipping or noise"),
        ({"method": "fedavg", "statistics_share": 0.1}, "no differential privacy"),
    ],
)
def test_statement_of_an_unprotected_run_promises_nothing(settings: dict[str, Any], reason: str) -> None:
    context = make_context(**settings)
    found = build_statement(context, make_facts(context, data_is_public=True))
    assert found["guarantee"]["end_to_end"] is False
    assert reason in found["guarantee"]["why_not"][0]
    assert found["guarantee"]["epsilon_declared"] is None
    assert all(site["epsilon"] is None for site in found["sites"].values())
    assert "scores" in {entry["what"] for entry in found["released"]}


SPOILED: dict[str, Any] = {
    "a missing field": lambda s: s.pop("not_covered"),
    "an unknown field": lambda s: s.update(loss=0.1),
    "a promise without an epsilon": lambda s: s["sites"]["site-1"].update(epsilon=None),
    "a promise without events": lambda s: s["sites"]["site-1"].update(events=[]),
    "a promise without a receipt": lambda s: s["sites"]["site-1"].update(ledger_receipt=None),
    "an infinite epsilon": lambda s: s["sites"]["site-1"].update(epsilon="inf"),
    "a reason beside a promise": lambda s: s["guarantee"].update(why_not=["noise"]),
    "no promise and no reason": lambda s: s["guarantee"].update(end_to_end=False),
    "another relation": lambda s: s["guarantee"].update(neighbouring="replace one"),
    "protected membership of a site": lambda s: s["guarantee"].update(membership_of_a_site_is_protected=True),
    "another sampling": lambda s: s["mechanism"].update(sampling_assumed="shuffled"),
    "a delta of one": lambda s: s["guarantee"].update(delta=1.0),
}


@pytest.mark.parametrize("case", SPOILED)
def test_schema_refuses(statement: dict[str, Any], case: str) -> None:
    spoiled = copy.deepcopy(statement)
    SPOILED[case](spoiled)
    with pytest.raises(FedHypeVAEError, match="not valid at"):
        check_statement(spoiled)


def test_statement_takes_an_audit_in(statement: dict[str, Any]) -> None:
    context = make_context()
    audit = {
        "kind": "one-run",
        "epsilon_bound": 0.4,
        "epsilon_claimed": 1.9,
        "delta": 1e-5,
        "confidence": 0.999,
        "draws": 1000,
        "power": "little",
        "passed": True,
    }
    assert build_statement(context, make_facts(context, audit=audit))["audit"] == audit
    assert statement["audit"] is None

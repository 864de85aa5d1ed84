"""Whether a privacy statement says what its run was: every figure in it is computed again.

The same check stands at the gate and in `release verify`: a figure that was lowered does not fit its own events, no
matter who signed it. What no later check can find is a coordinator who lies about all of it alike; for that, each site
holds the receipt against its own ledger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.assurance.statement import SiteCharge, StatementFacts, build_statement, check_statement, why_not_private
from common.errors import FedHypeVAEError
from common.methods.base import RunContext
from common.privacy.events import MechanismKey, PrivacyEvent, mechanism_counts

_SAME_EPSILON = 1e-4  # relative; another release of the accounting library may differ by so much
_GUARANTEE = (
    "definition",
    "trust_model",
    "unit",
    "max_records_per_unit_and_step",
    "neighbouring",
    "epsilon_target",
    "delta",
    "membership_of_a_site_is_protected",
)
_OWN_WORDS = ("software", "accountant", "audit")
_SITE_FIGURES = ("epsilon", "delta", "epsilon_cross_checks", "rounds_used", "ledger_receipt")


def faults_of(statement: Mapping[str, Any], context: RunContext, withdrawn: Sequence[str] = ()) -> list[str]:
    """What is missing or wrong in a statement, in words; empty where it is complete and right. Takes seconds.

    Args:
        statement: of a run, or of a bundle.
        context: of the run, as the published generator has it.
        withdrawn: reasons for which a release withdrew the promise; its figures are empty then.
    """
    try:
        check_statement(statement)
        expected = recomputed(statement, context)
    except FedHypeVAEError as error:
        return [str(error)]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return [f"the privacy statement makes no sense ({type(error).__name__})"]
    if withdrawn:
        expected = withdraw(expected, withdrawn)
    faults = [] if statement["sites"] else ["the privacy statement names no site"]
    for part, names in (("guarantee", _GUARANTEE), ("guarantee", ("end_to_end", "why_not", "epsilon_declared"))):
        faults += _differences(part, statement[part], expected[part], names)
    numbers = [*_numbers(expected["mechanism"]), "encoder_training"]
    faults += _differences("mechanism", statement["mechanism"], expected["mechanism"], numbers)
    faults += _differences("statement", statement, expected, ("method",))
    shared, due_shared = (which.get("secure_aggregation") or {} for which in (statement, expected))
    if set(shared) != set(due_shared):
        faults.append("the part on secure aggregation is missing, or of another run")
    else:
        faults += _differences("secure aggregation", shared, due_shared, _numbers(due_shared))
    for site, facts in statement["sites"].items():
        faults += _differences(f"site {site}", facts, expected["sites"][site], _SITE_FIGURES)
    faults += _missing_charges(statement["sites"], context)
    stated, due = (sorted(tuple(one["names"]) for one in which["released"]) for which in (statement, expected))
    if stated != due:
        faults.append("the list of what was released is not the run's")
    return faults


def same_words(statement: Mapping[str, Any], context: RunContext, withdrawn: Sequence[str] = ()) -> bool:
    """Whether a statement says in words what this program says of such a run: what is promised, and what is not.

    Its own software's versions and its audit's words are left out.
    """
    expected = recomputed(statement, context)
    due = withdraw(expected, withdrawn) if withdrawn else expected
    return all(list(_words(statement[part])) == list(_words(due[part])) for part in due if part not in _OWN_WORDS)


def recomputed(statement: Mapping[str, Any], context: RunContext) -> dict[str, Any]:
    """The statement that this program makes of the same run and the same charges.

    Raises:
        FedHypeVAEError: an event is out of range.
    """
    charges = {
        site: SiteCharge(
            tuple(PrivacyEvent(**event) for event in facts["events"]),
            facts["rounds_used"],
            facts["ledger_receipt"] or "",
            facts["lifetime"],
        )
        for site, facts in statement["sites"].items()
    }
    public = statement["guarantee"]["data_is_public"]
    return build_statement(context, StatementFacts(statement["run"], charges, public, statement["audit"]))


def withdraw(statement: Mapping[str, Any], reasons: Sequence[str]) -> dict[str, Any]:
    """The same statement without its promise: no end-to-end guarantee, no ε, and the reasons."""
    sites = {
        site: {**facts, "epsilon": None, "epsilon_cross_checks": dict.fromkeys(facts["epsilon_cross_checks"])}
        for site, facts in statement["sites"].items()
    }
    guarantee = {
        **statement["guarantee"],
        "end_to_end": False,
        "why_not": list(reasons),
        "epsilon_declared": None,
    }
    withdrawn = {**statement, "guarantee": guarantee, "sites": sites}
    if "secure_aggregation" in statement:
        withdrawn["secure_aggregation"] = {**statement["secure_aggregation"], "epsilon_of_own_share": None}
    return withdrawn


def empty_statement(context: RunContext) -> dict[str, Any]:
    """A statement of a run of which no statement is left: it charges nobody, and promises nothing."""
    return build_statement(context, StatementFacts(context.config.operation.run_name or "unknown", {}, False))


def largest_epsilon(statement: Mapping[str, Any]) -> float:
    """The largest ε of any site; infinite where one has none."""
    figures = [facts["epsilon"] for facts in statement["sites"].values()]
    return max((math.inf if figure is None else float(figure) for figure in figures), default=math.inf)


def _missing_charges(sites: Mapping[str, Mapping[str, Any]], context: RunContext) -> list[str]:
    """Whether each site was charged for what the generator's own plan says that it released.

    A site that came later, or missed the statistics, gave none and was charged for none; but as many as the run needed
    gave them, or there would be no run.
    """
    if why_not_private(context):
        return []
    plan, least = context.plan, context.config.operation.min_sites
    faults, gave_none = [], []
    for site, facts in sites.items():
        charged = [PrivacyEvent(**event) for event in facts["events"]]
        rounds = list(plan.round_events) * int(facts["rounds_used"])
        missing = _missing(charged, rounds)
        if missing:
            faults.append(f"site {site} was not charged for {' and '.join(missing)}")
        elif _missing(charged, [*plan.statistics_events, *rounds]):
            gave_none.append(site)
    gave = len(sites) - len(gave_none)
    if gave_none and gave < least:
        faults.append(f"{gave} sites were charged for the statistics and the run needs {least}: not {gave_none[0]}")
    return faults


def _missing(charged: Sequence[PrivacyEvent], due: Sequence[PrivacyEvent]) -> list[str]:
    """Releases that are due and not charged, in words; one charged with less noise, as sites that fear more colluders
    are, pays for one with more."""
    stated, wanted = mechanism_counts(charged), mechanism_counts(due)

    def up_to(counts: Sequence[MechanismKey], noise: float, rate: float) -> int:
        return sum(count for sigma, its_rate, count in counts if sigma <= noise and its_rate == rate)

    lacking = {(sigma, rate): up_to(wanted, sigma, rate) - up_to(stated, sigma, rate) for sigma, rate, _ in wanted}
    return [f"{count} releases with noise multiplier {sigma:g}" for (sigma, _), count in lacking.items() if count > 0]


def _differences(where: str, stated: Mapping[str, Any], due: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        f"{where}: {name} is {_short(stated[name])}, and comes out as {_short(due[name])}"
        for name in names
        if not _same(stated[name], due[name])
    ]


def _same(stated: Any, due: Any) -> bool:
    if isinstance(due, Mapping) and isinstance(stated, Mapping):
        return set(stated) == set(due) and all(_same(stated[key], due[key]) for key in due)
    if isinstance(due, float) and isinstance(stated, int | float) and not isinstance(stated, bool):
        return math.isclose(stated, due, rel_tol=_SAME_EPSILON, abs_tol=1e-12)
    return bool(stated == due)


def _words(part: Any) -> Iterator[str]:
    """The texts of a part, in the order of their names."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        for name in sorted(part):
            yield from _words(part[name])
    elif isinstance(part, Sequence):
        for one in part:
            yield from _words(one)


def _numbers(part: Mapping[str, Any]) -> list[str]:
    return [name for name, value in part.items() if value is None or not isinstance(value, str)]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value!r:.80}"

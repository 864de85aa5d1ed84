"""The audit behind a release: the run's own configuration attacked with made-up records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from common.assurance.audit import AuditResult
from common.assurance.audit_run import AuditSize, Watch, audit_run
from common.errors import ConfigError
from common.methods.base import RunContext

FORMAT = "fedhypevae-audit/1"
CONFIDENCE = 0.999
_MOST_DIM = 256  # noise and clipping know nothing of the width: a smaller one is as good, and quicker
_IN_WORDS = (
    "Lower bounds of epsilon, found by attacking this configuration's own code with made-up records; no site's records "
    "were read. Under secure aggregation it is the sum that is attacked, with its whole noise, not the masks. A bound "
    "below the claim proves nothing by itself: the power says what would have gone unseen."
)


def audit_published(context: RunContext, size: AuditSize, watch: Watch) -> tuple[list[AuditResult], str]:
    """Audit a run's configuration; about half a minute at the default size.

    Returns:
        The results, and why there is none where none can be made.
    """
    dim, classes = min(context.problem.dim, _MOST_DIM), context.problem.num_classes
    size = replace(size, canaries=max(min(size.canaries, dim * classes), 10))
    try:
        return audit_run(context.config, dim, classes, size, CONFIDENCE, watch), ""
    except ConfigError as error:
        return [], str(error)


def audit_file(
    context: RunContext, audits: Sequence[Mapping[str, Any]], why_none: str, not_private_because: Sequence[str]
) -> dict[str, Any]:
    """The content of audit.json; `audits` as `in_json` gives them."""
    return {
        "format": FORMAT,
        "private": not not_private_because,
        "not_private_because": list(not_private_because),
        "records": "made up",
        "in_words": _IN_WORDS,
        "config": context.config.to_flat(),
        "audits": [in_json(result_of(audit)) for audit in audits],
        "why_none": why_none,
    }


def in_json(result: AuditResult) -> dict[str, Any]:
    """A result as the privacy statement and audit.json have it."""
    return {**asdict(result), "passed": result.passed}


def result_of(audit: Mapping[str, Any]) -> AuditResult:
    """What `in_json` was made of. Raises TypeError for other fields."""
    return AuditResult(**{name: value for name, value in audit.items() if name != "passed"})


def objections(audits: list[Mapping[str, Any]], why_none: str, epsilon: float) -> list[str]:
    """Why an audit forbids a release, in words: none was made, or a bound is above what is claimed.

    Args:
        audits: as in audit.json.
        why_none: why there is none.
        epsilon: the largest ε that the statement claims for a site.
    """
    if not audits:
        return [f"no audit could be made: {why_none}"]
    found = []
    for audit in audits:
        # the bound of a single step is held against the step's own claim, the bound of a run also against the statement
        claimed = audit["epsilon_claimed"] if audit["kind"] == "two-world" else min(audit["epsilon_claimed"], epsilon)
        if not audit["epsilon_bound"] <= claimed:
            found.append(
                f"the {audit['kind']} audit shows that epsilon is at least {audit['epsilon_bound']:.3f}, and "
                f"{claimed:.3f} is claimed"
            )
    return found

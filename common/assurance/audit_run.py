"""All audits that a run's settings allow: one step in two worlds, and the whole run; or the statistics alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common.assurance.audit import AuditResult, one_run_audit, two_world_audit
from common.assurance.audit_statistics import audit_statistics
from common.config.run import RunConfig
from common.devices import one_thread
from common.methods import get_method

Watch = Callable[[str, int, int], None]
"""Called now and then with (what is done, done, in all)."""


@dataclass(frozen=True)
class AuditSize:
    """How long to look: draws of each world of the two-world audit, canaries of the one-run audit; 0 leaves it out."""

    draws: int = 1000
    canaries: int = 500


def audit_run(
    config: RunConfig, dim: int, num_classes: int, size: AuditSize, confidence: float, watch: Watch
) -> list[AuditResult]:
    """Attack a configuration's own code with made-up records.

    Under secure aggregation the server sees the sum, with the noise of all honest sites together: the same steps at one
    site with the whole noise. The masks are not attacked.

    Args:
        config: the run.
        dim: width of the made-up embeddings.
        num_classes: K.
        size: how long to look.
        confidence: of each bound.
        watch: called now and then.

    Returns:
        Lower bounds beside the claim, for adding or removing one unit.

    Raises:
        ConfigError: nothing is released with noise, or the settings can't be audited.
    """
    config = config.replace(trust="local")
    step = partial(watch, "audit: two worlds, one step")
    results = []
    with one_thread():
        if get_method(config.method).plan(config).training_noise is None:  # it releases statistics, and trains nothing
            step = partial(watch, "audit: two worlds, the statistics")
            if size.draws:
                results.append(audit_statistics(config, draws=size.draws, confidence=confidence, progress=step))
            return results
        two_world = partial(two_world_audit, config, dim=dim, num_classes=num_classes, confidence=confidence)
        if size.draws:
            results.append(two_world(draws=size.draws, progress=step))
        one_run = partial(one_run_audit, config, dim=dim, num_classes=num_classes, confidence=confidence)
        if size.canaries:
            rounds = partial(watch, "audit: one run, all rounds")
            results.append(one_run(canaries=size.canaries, progress=rounds))
    return results

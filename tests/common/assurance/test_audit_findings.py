"""Audits of a run of findings release findings."""

from __future__ import annotations

import pytest

from common.assurance.audit import two_world_audit
from common.assurance.audit_statistics import audit_statistics
from common.config.run import RunConfig
from common.privacy.noise import TestNoise


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_audits_of_findings_claim_what_the_run_does(task: str) -> None:
    config = RunConfig.from_flat({"task": task, "epsilon": 2.0, "num-rounds": 2})
    found = [
        two_world_audit(config, dim=8, num_classes=3, draws=100, confidence=0.95, source=TestNoise(1)),
        audit_statistics(config, draws=100, confidence=0.95, source=TestNoise(1)),
    ]
    assert all(result.epsilon_bound <= result.epsilon_claimed for result in found)

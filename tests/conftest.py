"""Settings of every test: examples that Hypothesis makes are the same in each run, and slow machines fail no test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same-examples",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    # the second: what a test leaves in its folder is nothing that its next example reads
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("same-examples")

"""Settings of every test: examples that Hypothesis makes are the same in each run, and slow machines fail no test.

Tests that are marked `gpu` are skipped where there is none.
"""

from __future__ import annotations

import pytest
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip them with a word where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))

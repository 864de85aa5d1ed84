"""The threat model names a test for each protection, and each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.mutants.planting import Tests

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_the_threat_model_names_is_there() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 30
    assert Tests(ROOT).arguments(sorted(named))


def test_every_row_of_the_threat_model_names_a_test() -> None:
    lines = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.endswith("| test |")]
    assert rows
    assert not [row for row in rows if "`test_" not in row.split("|")[-2]]

"""Curves: points that are there are kept, and a picture is drawn from the data file alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import curves
from common.errors import ConfigError


def _record(value: str, score: float) -> dict[str, object]:
    return {"curve": "epsilon", "value": value, "method": "dp_gauss", "trust": "local", "seed": 1,
            "synthetic_only": score, "mixed": None, "own_lambda": None, "personalised": None}  # fmt: skip


def test_draw_makes_a_picture_of_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "curves" / "epsilon.png"
    curves.draw("epsilon", [_record("0.5", 0.6), _record("∞", 0.9)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_finished_points_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, str]] = []

    def measured(curve: str, value: float, row: object, seed: int) -> dict[str, object]:
        trust = row.trust  # type: ignore[attr-defined]
        asked.append((value, trust))
        return {**_record(f"{value:g}", 0.5), "trust": trust, "seed": seed}

    monkeypatch.setattr(curves, "point", measured)
    monkeypatch.setattr(curves, "CURVES", {"epsilon": (0.5, 1.0)})
    (tmp_path / "epsilon.json").write_text(json.dumps([_record("0.5", 0.6)]), encoding="utf-8")
    arguments = ["--only", "epsilon", "--methods", "dp_gauss", "--seeds", "1", "--out", str(tmp_path)]
    assert curves.main(arguments) == 0
    assert asked == [(0.5, "secagg"), (1.0, "local"), (1.0, "secagg")]
    assert len(json.loads((tmp_path / "epsilon.json").read_text(encoding="utf-8"))) == 4
    assert curves.main(arguments) == 0
    assert len(asked) == 3


def test_unknown_curves_and_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown curve"):
        curves.point("colour", 1.0, None, 1)  # type: ignore[arg-type]
    assert curves.main(["--methods", "nothing", "--out", str(tmp_path)]) == 2

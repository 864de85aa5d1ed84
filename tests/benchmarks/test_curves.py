"""Curves: points that are there are kept, and a picture is drawn from the data file alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import curves
from benchmarks.rows import Row
from common.errors import ConfigError


def _record(value: str, score: float) -> dict[str, object]:
    return {"curve": "epsilon", "value": value, "method": "dp_gauss", "trust": "local", "seed": 1,
            "synthetic_only": score, "mixed": None, "own_lambda": None, "local_only": score / 2}  # fmt: skip


def test_draw_makes_a_picture_of_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "curves" / "epsilon.png"
    curves.draw("epsilon", [_record("0.5", 0.6), _record("∞", 0.9)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_what_generators_are_judged_by_has_a_picture_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "judged.png"
    curves.draw_judged("epsilon", [_record("0.5", 0.6)], path)
    assert not path.exists()
    judged = {**_record("1", 0.6), "judged": {"mmd2": 0.01, "coverage": None, "knn": 80.0}}
    curves.draw_judged("epsilon", [_record("0.5", 0.6), judged], path)
    assert path.stat().st_size > 5000


def test_finished_points_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, str]] = []

    def all_at_once(
        function: object,
        tasks: Sequence[tuple[str, float, Row, int]],
        workers: int,
        keep: Callable[[dict[str, object]], str],
    ) -> None:
        for _, value, row, seed in tasks:
            asked.append((value, row.trust))
            name = "∞" if value == math.inf else f"{value:g}"
            keep({**_record(name, 0.5), "trust": row.trust, "seed": seed})

    monkeypatch.setattr(curves, "run_all", all_at_once)
    monkeypatch.setattr(curves, "CURVES", {"epsilon": (0.5, math.inf)})
    (tmp_path / "epsilon.json").write_text(json.dumps([_record("0.5", 0.6)]), encoding="utf-8")
    arguments = ["--only", "epsilon", "--methods", "dp_gauss", "--seeds", "1", "--out", str(tmp_path)]
    assert curves.main(arguments) == 0
    assert asked == [(0.5, "secagg"), (math.inf, "local")]
    assert len(json.loads((tmp_path / "epsilon.json").read_text(encoding="utf-8"))) == 3
    assert curves.main(arguments) == 0
    assert len(asked) == 2


def test_unknown_curves_and_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown curve"):
        curves.point("colour", 1.0, None, 1)  # type: ignore[arg-type]
    assert curves.main(["--methods", "nothing", "--out", str(tmp_path)]) == 2

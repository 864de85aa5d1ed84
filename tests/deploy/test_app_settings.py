"""The app's own settings: Flower refuses a run that sets any other, and they must not hide a new default."""

from __future__ import annotations

import tomllib
from pathlib import Path

from common.config import RunConfig

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
MARK = "# Every further setting at its default"


def test_app_settings_list_every_setting() -> None:
    listed = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    assert set(listed) == set(RunConfig().to_flat())
    RunConfig.from_flat(listed)


def test_app_settings_below_the_mark_are_the_defaults() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    block = text[text.index(MARK) :].split("\n\n")[0]
    listed, defaults = tomllib.loads(block), RunConfig().to_flat()
    assert listed
    assert listed == {key: defaults[key] for key in listed}

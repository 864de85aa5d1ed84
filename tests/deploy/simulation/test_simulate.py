"""A simulation's start: Flower's daemon may be slow, which is tried again; anything else is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.run import RunConfig
from common.errors import FedHypeVAEError
from deploy.simulation import simulate

SLOW = "Failed to start local SuperLink within 15s. See logs at superlink.log"


@pytest.mark.parametrize(("said", "starts"), [(SLOW, 3), ("Failed to start local SuperLink: it ended", 1)])
def test_only_a_slow_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, starts: int
) -> None:
    flwr = tmp_path / "flwr"
    flwr.write_text(f'#!/bin/sh\n[ "$1" = ls ] && exit 1\necho start >> {tmp_path}/starts\necho "{said}"\nexit 1\n')
    flwr.chmod(0o755)
    monkeypatch.setattr(simulate, "tool", lambda name: str(flwr))
    monkeypatch.setattr(simulate, "_SETTLE_S", 0.0)
    monkeypatch.setattr("embeddings.simulation.simulated.open_pool", lambda *_: None)
    with pytest.raises(FedHypeVAEError, match="did not complete"):
        simulate.simulate(RunConfig(), work_folder=tmp_path, app_folder=Path(__file__).resolve().parents[3])
    assert (tmp_path / "starts").read_text().count("start") == starts

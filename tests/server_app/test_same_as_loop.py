"""The same seeds, with test noise, give the same Φ over Flower's messages and in the plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from client_app.records import load_records, split_data
from common.config.run import RunConfig
from common.loop import run_loop
from tests.harness import CLASSES, SMALL, Federation

PUBLIC = {"data_is_public": True, "metrics_may_leave": True, "allow_test_noise": True}
MODES = ("sleep", "joint", "unprotected")


@pytest.mark.parametrize("mode", MODES)
def test_flower_and_loop_give_the_same_parameters(
    tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = Federation.create(tmp_path, allowed_encoder_training=MODES, **PUBLIC)
    summary = federation.run(noise="test", encoder_training=mode, local_steps=2)
    published = load_file(federation.output / "generator.safetensors")
    config = RunConfig.from_flat(
        {**SMALL, "num-sites": 3, "min-sites": 1, "noise": "test", "encoder-training": mode, "local-steps": 2}
    )
    sites = [
        split_data(load_records(site.folder / "site.parquet", tmp_path), "train", "record") for site in federation.sites
    ]
    alone = run_loop(config, sites, CLASSES).artifact.tensors
    assert published.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(published[name], value, atol=1e-5, rtol=0.0)
    assert summary["privacy"]["end_to_end"] is False  # noise from a known seed is marked wherever it is told
    reasons = summary["privacy"]["why_not_end_to_end"]
    assert "test source" in " ".join(reasons)
    lines = capsys.readouterr().out.splitlines()
    assert all(", no guarantee" in line for line in lines if line.startswith("round"))
    said = [line for line in lines if line.startswith("no end-to-end guarantee")]
    assert said == [f"no end-to-end guarantee: {reason}" for reason in reasons]
    assert len(said) == (2 if mode == "unprotected" else 1)


def test_secure_noise_differs_between_runs_with_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's seed never reaches the noise."""
    found = []
    for name in ("first", "second"):
        federation = Federation.create(tmp_path / name, num_sites=2)
        federation.run(seed=7)
        found.append(load_file(federation.output / "generator.safetensors"))
    printed = capsys.readouterr().out
    assert "round" in printed
    assert "no end-to-end guarantee" not in printed
    assert ", no guarantee" not in printed
    column = next(name for name in found[0] if name.endswith("class_weight"))
    assert not torch.allclose(found[0][column], found[1][column], atol=1e-3)


def test_patient_level_run_completes(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=2, patients=True, unit="patient", max_records_per_patient=2)
    summary = federation.run(unit="patient", max_records_per_patient=2)
    assert summary["privacy"]["unit"] == "patient"
    assert all(spent <= 3.0 for spent in summary["privacy"]["epsilon_spent_per_site"].values())

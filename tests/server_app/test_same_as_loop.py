"""The same seeds, with test noise, give the same Φ over Flower's messages and in the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from client_app.records import load_records, split_data
from common.config.run import RunConfig
from common.loop import LoopResult, run_loop
from common.methods import method_names
from server_app.checkpoint import load_checkpoint
from tests.harness import CLASSES, SMALL, Federation, Handler, HarnessSite, Killed

PUBLIC = {"data_is_public": True, "metrics_may_leave": True, "allow_test_noise": True}
MODES = ("sleep", "joint", "unprotected")
SEEDED: dict[str, Any] = {"noise": "test", "num_rounds": 4}
METHODS: dict[str, dict[str, Any]] = {
    "fedhypevae": {},
    "fedavg": {"epsilon": float("inf"), "spare_rounds": 0},
    "mh_pfedhn": {"epsilon": float("inf"), "architectures": "linear,mlp-3", "chunk_size": 40},
    "dp_cvae": {"cvae_width": 5, "noise_dim": 2},
}


def seeded_federation(home: Path) -> Federation:
    return Federation.create(home, 3, allowed_methods=method_names(), **PUBLIC)


def alone(federation: Federation, **settings: Any) -> LoopResult:
    """The same run in the plain loop."""
    flat = {**SMALL, "num-sites": len(federation.sites), "min-sites": 1}
    flat |= {name.replace("_", "-"): value for name, value in settings.items()}
    sites = [
        split_data(load_records(site.folder / "site.parquet", federation.home), "train", "record")
        for site in federation.sites
    ]
    return run_loop(RunConfig.from_flat(flat), sites, CLASSES)


def assert_same_run(federation: Federation, result: LoopResult) -> None:
    state, _ = load_checkpoint(federation.output)
    assert state.params.keys() == result.state.params.keys()
    for name, value in result.state.params.items():
        torch.testing.assert_close(state.params[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_flower_and_loop_give_the_same_state(tmp_path: Path, method: str) -> None:
    federation = seeded_federation(tmp_path)
    settings = {**SEEDED, **METHODS[method], "method": method}
    federation.run(**settings)
    assert_same_run(federation, alone(federation, **settings))


def test_bytes_of_the_loop_are_those_of_the_messages(tmp_path: Path) -> None:
    """Both ways, but for each array's name and its header of 128 bytes under Flower."""
    federation = Federation.create(tmp_path, 2)
    summary = federation.run(num_rounds=4)
    result = alone(federation, **SEEDED)
    parts = [
        (seen.to_server, name, array)
        for seen in federation.traffic
        if seen.site == "site-1" and "tensors" in seen.message.content.array_records
        for name, array in seen.message.content.array_records["tensors"].items()
    ]
    for to_server, told, counted in ((True, "bytes_up_per_site", result.bytes_up),
                                     (False, "bytes_down_per_site", result.bytes_down)):  # fmt: skip
        arrays = [(name, array) for way, name, array in parts if way == to_server]
        assert sum(array.numpy().nbytes for _, array in arrays) == counted
        assert summary[told] == counted + sum(128 + len(name) for name, _ in arrays)


def test_run_killed_in_mid_round_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    """Killed when one of three had answered round 3: the state is that of a run that was never killed."""
    federation = seeded_federation(tmp_path)
    seen: list[str] = []

    def kill(site: HarnessSite, message: Message, handler: Handler) -> Message:
        if message.metadata.group_id == "round-3":
            if seen:
                raise SystemExit(137)
            seen.append(site.name)
        return handler()

    with pytest.raises(SystemExit):
        federation.run(tamper=kill, **SEEDED)
    summary = federation.run(resume=True, run_id=2, **SEEDED)
    assert [len(sites) for sites in summary["rounds_taken_part"]] == [3, 3, 3, 3]
    assert_same_run(federation, alone(federation, **SEEDED))


def test_round_that_fell_short_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    """Too few answered round 3, and the run stopped: nothing of that round is kept."""
    federation = seeded_federation(tmp_path)
    settings = {**SEEDED, "min_sites": 3}

    def gone(site: HarnessSite, message: Message, handler: Handler) -> Message:
        if site.name == "site-2" and message.metadata.group_id == "round-3":
            raise Killed
        return handler()

    with pytest.raises(SystemExit):
        federation.run(tamper=gone, **settings)
    federation.run(resume=True, run_id=2, **settings)
    assert_same_run(federation, alone(federation, **settings))


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

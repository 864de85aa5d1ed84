"""`fedhypevae audit`: the bound beside the claim, a picture, and a failure where the protection is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, FedHypeVAEError
from common.privacy.noise import SecureNoise, TestNoise
from deploy.cli import app
from embeddings.simulation.simulated import DEMO_CLASSES, DEMO_FILE, pool_path
from embeddings.store.writing import write_store
from tests.harness import make_set

QUICK = ["audit", "--epsilon", "8", "--rounds", "2", "--dim", "16", "--classes", "3", "--draws", "250"]


def run(tmp_path: Path, *options: str) -> Any:
    return CliRunner().invoke(app, [*QUICK, "--cache", str(tmp_path), "--output", str(tmp_path / "audit"), *options])


@pytest.mark.slow
def test_audit_command_prints_bound_claim_and_power(tmp_path: Path) -> None:
    done = run(tmp_path, "--canaries", "40", "--no-inversion")
    assert done.exit_code == 0, done.output
    assert done.output.count("the claim stands") == 2
    assert done.output.count("power:") == 2
    facts = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [found["kind"] for found in facts["audits"]] == ["two-world", "one-run"]
    assert all(found["passed"] and found["epsilon_bound"] <= found["epsilon_claimed"] for found in facts["audits"])
    assert facts["records"] == "made up"


@pytest.mark.slow
def test_audit_command_fails_on_broken_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the noise the two-world audit contradicts the claim: exit code 1, and the report is written."""
    honest = SecureNoise.gaussian
    monkeypatch.setattr(SecureNoise, "gaussian", lambda self, shape, std: honest(self, shape, std / 10.0))
    done = run(tmp_path, "--no-one-run", "--no-inversion")
    assert isinstance(done.exception, FedHypeVAEError)
    assert done.exception.exit_code == 1
    assert "IS CONTRADICTED" in done.output
    assert not json.loads((tmp_path / "audit" / "audit.json").read_text())["audits"][0]["passed"]


STATISTICS_ALONE = ("--set", "method=dp_gauss", "--no-inversion")


def test_audit_command_attacks_a_method_that_releases_statistics_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one release is told apart where the noise is a tenth of what is claimed, and not where it is whole."""
    done = run(tmp_path, *STATISTICS_ALONE)
    assert done.exit_code == 0, done.output
    assert "(the statistics, once)" in done.output
    (found,) = json.loads((tmp_path / "audit" / "audit.json").read_text())["audits"]
    assert found["passed"]
    honest = SecureNoise.gaussian
    monkeypatch.setattr(SecureNoise, "gaussian", lambda self, shape, std: honest(self, shape, std / 10.0))
    exact = SecureNoise.exact_gaussian
    monkeypatch.setattr(SecureNoise, "exact_gaussian", lambda self, values, std: exact(self, values, std / 10.0))
    broken = run(tmp_path, *STATISTICS_ALONE)
    assert isinstance(broken.exception, FedHypeVAEError), broken.output
    assert broken.exception.exit_code == 1


@pytest.mark.slow
def test_audit_command_attacks_the_sum_under_secure_aggregation(tmp_path: Path) -> None:
    done = run(tmp_path, "--set", "trust=secagg", "--canaries", "20", "--no-inversion")
    assert done.exit_code == 0, done.output
    assert "the sum of the sites is attacked" in done.output
    assert done.output.count("the claim stands") == 2
    facts = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert "secure aggregation" in facts["attacked"]


def test_audit_command_draws_the_inversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without protection the attacked image is found again; a made-up cache stands in for the images' embeddings.

    The noise has a seed: fresh noise points to the attacked one of 6000 images by chance, once in some thousand runs.
    """
    monkeypatch.setattr("common.privacy.noise.SecureNoise", lambda: TestNoise(0))
    with np.load(DEMO_FILE) as demo:
        count = len(demo["labels"])
    # as wide as the images' own embeddings: in few dimensions noise points to some row by chance
    made = make_set(count, dim=1280, classes=DEMO_CLASSES, spread=1.0)
    write_store(pool_path(tmp_path), made)
    done = run(tmp_path, "--no-one-run", "--no-two-world")
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "audit" / "audit.json").read_text())["inversion"]
    assert facts["cosine_unprotected"] >= 0.99
    assert facts["found_again_unprotected"]
    assert abs(facts["cosine_protected"]) <= 0.2
    assert not facts["found_again_protected"]
    assert (tmp_path / "audit" / "inversion.png").read_bytes().startswith(b"\x89PNG")


def test_audit_command_without_a_cache_says_how_to_get_the_picture(tmp_path: Path) -> None:
    done = run(tmp_path, "--no-one-run", "--no-two-world")
    assert done.exit_code == 0, done.output
    assert "run `fedhypevae demo` once" in done.output
    assert not (tmp_path / "audit" / "inversion.png").exists()


def test_audit_command_refuses_a_run_without_noise(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path, "--set", "epsilon=inf").exception, ConfigError)

"""The gate before a release: what is refused and why, and that a forced bundle says so in every file."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError, DataError, FedHypeVAEError
from common.methods import get_method
from common.methods.base import RunContext
from common.privacy.noise import SecureNoise
from common.publishing.bundle import load_bundle
from common.publishing.generator_file import write_generator
from common.publishing.parquet import read_notes, write_rows
from deploy.release.describe import DATA_FILE
from tests.deploy.release_cases import change_json, invoke, read, release
from tests.harness import make_identity


def refusal(copied: Any, tmp_path: Path, *more: str | Path) -> str:
    """Why a run is not released; nothing is written then."""
    done = release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites, *more)
    assert isinstance(done.exception, FedHypeVAEError), done.output
    assert done.exception.exit_code == 1
    assert not (tmp_path / "new").exists()
    assert "not released" in str(done.exception)
    return str(done.exception)


def test_release_writes_what_a_bundle_has(released: Any) -> None:
    """The files of a published bundle, and the same rows and parameters as the run's."""
    names = {str(path.relative_to(released.bundle)) for path in released.bundle.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "SHA256SUMS",
        "audit.json",
        "bundle.json",
        "croissant.json",
        DATA_FILE,
        "generator.safetensors",
        "ledgers.json",
        "privacy_statement.json",
        "signature.json",
    }
    run, bundle = load_bundle(released.run), load_bundle(released.bundle)
    assert bundle.not_private == ()
    assert bundle.encoder == make_identity()
    for ours, theirs in zip(bundle.published(), run.published(), strict=True):
        assert torch.equal(ours, theirs)
    assert bundle.context == run.context
    assert set(bundle.artifact.tensors) == set(run.artifact.tensors)
    assert read(released.bundle / "privacy_statement.json")["audit"]["passed"]
    assert released.key.stat().st_mode & 0o777 == 0o600


def test_checksums_are_what_sha256sum_reads(released: Any) -> None:
    import subprocess

    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=released.bundle, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_missing_statement_is_refused(copied: Any, tmp_path: Path) -> None:
    (copied.run / "privacy_statement.json").unlink()
    assert "privacy statement is incomplete: there is none" in refusal(copied, tmp_path)


def test_statement_with_lowered_epsilon_is_refused(copied: Any, tmp_path: Path) -> None:
    def lower(content: dict[str, Any]) -> None:
        content["sites"]["site-1"]["epsilon"] = 1.0

    change_json(copied.run, "privacy_statement.json", lower)
    assert "site-1: epsilon is 1, and comes out as 2.5" in refusal(copied, tmp_path)


def test_run_that_did_not_complete_is_refused(copied: Any, tmp_path: Path) -> None:
    (copied.run / "status.json").write_text('{"status": "running"}')
    assert "did not complete" in refusal(copied, tmp_path)


def test_changed_row_of_a_ledger_is_refused(copied: Any, tmp_path: Path) -> None:
    with sqlite3.connect(copied.sites / "site-1" / "ledger.db") as connection:
        connection.execute("DROP TRIGGER entries_no_update")
        changed = connection.execute("UPDATE entries SET body = replace(body, '2', '3') WHERE kind = 'reserve'")
        assert changed.rowcount > 0
    assert "ledger of site-1 does not verify" in refusal(copied, tmp_path)


def test_lost_ledger_is_refused(copied: Any, tmp_path: Path) -> None:
    (copied.sites / "site-2" / "ledger.db").unlink()
    assert "no ledger of site-2" in refusal(copied, tmp_path)


def test_exported_ledger_is_as_good_as_the_ledger(copied: Any, tmp_path: Path) -> None:
    """A site that is far away sends the export; a changed row in it is found as well."""
    for site in ("site-1", "site-2"):
        exported = invoke("ledger", "export", copied.sites / site / "ledger.db", tmp_path / "sent" / f"{site}.json")
        assert exported.exit_code == 0, exported.output
    done = release(copied.run, tmp_path / "good", copied.key, "--ledgers", tmp_path / "sent")
    assert done.exit_code == 0, done.exception
    assert invoke("release", "verify", tmp_path / "good").exit_code == 0
    path = tmp_path / "sent" / "site-2.json"
    path.write_text(path.read_text().replace("round-1", "round-3", 1))
    done = release(copied.run, tmp_path / "bad", copied.key, "--ledgers", tmp_path / "sent")
    assert "ledger of site-2 does not verify" in str(done.exception)


def test_receipts_are_enough_where_ledgers_stay_at_the_sites(copied: Any, tmp_path: Path) -> None:
    """Without any ledger at hand the bundle shows charges and receipts, and none of the ledgers' own rows."""
    assert release(copied.run, tmp_path / "new", copied.key).exit_code == 0
    shown = read(tmp_path / "new" / "ledgers.json")["sites"]["site-1"]
    assert {frozenset(row) for row in shown["rows"]} == {frozenset({"event", "previous", "digest"})}
    assert "fingerprint" not in json.dumps(shown)
    assert invoke("release", "verify", tmp_path / "new").exit_code == 0


def test_exchanged_set_is_refused(copied: Any, tmp_path: Path) -> None:
    """Rows that the generator did not draw, such as real ones, never pass for synthetic ones."""
    embeddings, labels = load_bundle(copied.run).published()
    embeddings[7] += 0.1
    write_rows(copied.run / "synthetic.parquet", [(embeddings, labels)], dim=12, class_names=("a", "b", "c"), notes={})
    assert "not what the generator draws" in refusal(copied, tmp_path)


def test_audit_above_the_claim_is_refused(copied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the noise the audit contradicts the claim."""
    honest = SecureNoise.gaussian
    monkeypatch.setattr(SecureNoise, "gaussian", lambda self, shape, std: honest(self, shape, std / 10.0))
    done = release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites, "--audit-draws", "1000")
    assert "audit shows that epsilon is at least" in str(done.exception)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def unprotected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as a run without noise leaves it."""
    from tests.deploy.release_cases import run_federation

    federation = run_federation(tmp_path_factory.mktemp("unprotected"), epsilon=float("inf"), num_rounds=1)
    return federation.output


def test_run_without_noise_is_refused_and_marked_where_forced(unprotected: Path, released: Any, tmp_path: Path) -> None:
    done = release(unprotected, tmp_path / "new", released.key)
    assert "not private end to end: epsilon is infinite" in str(done.exception)
    assert not (tmp_path / "new").exists()
    done = release(unprotected, tmp_path / "new", released.key, "--force")
    assert done.exit_code == 0, done.exception
    check_marks(tmp_path / "new", "epsilon is infinite")


def test_forced_bundle_is_marked_in_every_file(copied: Any, tmp_path: Path) -> None:
    """Whatever the gate would have said, and whichever file is read alone."""
    (copied.run / "status.json").unlink()
    done = release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites, "--force")
    assert done.exit_code == 0, done.exception
    assert "NOT PRIVATE: the run did not complete" in done.output
    check_marks(tmp_path / "new", "the run did not complete")


def test_force_without_a_refusal_marks_all_the_same(copied: Any, tmp_path: Path) -> None:
    assert release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites, "--force").exit_code == 0
    check_marks(tmp_path / "new", "released with --force")


def check_marks(bundle: Path, reason: str) -> None:
    for name in ("audit.json", "bundle.json", "ledgers.json", "signature.json"):
        content = read(bundle / name)
        assert content["private"] is False
        assert reason in " ".join(content["not_private_because"])
    guarantee = read(bundle / "privacy_statement.json")["guarantee"]
    assert guarantee["end_to_end"] is False
    assert guarantee["epsilon_declared"] is None
    assert reason in " ".join(guarantee["why_not"])
    assert all(site["epsilon"] is None for site in read(bundle / "privacy_statement.json")["sites"].values())
    notes = read_notes(bundle / DATA_FILE)
    assert notes["private"] is False
    assert reason in " ".join(notes["not_private_because"])
    assert reason in " ".join(load_bundle(bundle / "generator.safetensors").not_private)
    assert "NOT PRIVATE" in read(bundle / "croissant.json")["description"]
    for name in ("README.md", "SHA256SUMS"):
        text = (bundle / name).read_text()
        assert "NOT PRIVATE" in text
        assert reason.split(":")[0] in text.replace("\\", "")
    assert "differential-privacy" not in (bundle / "README.md").read_text().split("---")[1]
    done = invoke("release", "verify", bundle)
    assert "FAILED" not in done.output, done.output
    assert isinstance(done.exception, FedHypeVAEError)
    assert "NOT PRIVATE" in str(done.exception)
    assert invoke("release", "verify", bundle, "--allow-not-private").exit_code == 0


def test_method_without_a_sampler_has_nothing_to_release(tmp_path: Path, copied: Any) -> None:
    """A head is no set: one line says so, also for `synthesize`; no force helps."""
    before, method = load_bundle(copied.run).context, get_method("dp_fedsgd")
    config = before.config.replace(method="dp_fedsgd", num_rounds=1)
    context = RunContext(config, before.problem, method.plan(config))
    artifact = method.finish(context, method.init(context))
    write_generator(tmp_path / "head" / "generator.safetensors", context, artifact, make_identity())
    for words in (
        ["synthesize", tmp_path / "head", "--rows", "5"],
        ["release", tmp_path / "head", "--out", tmp_path / "o"],
    ):
        done = invoke(*words)
        assert isinstance(done.exception, ConfigError), done.output
        assert "dp_fedsgd publishes a head" in str(done.exception)


def test_bundle_is_not_released_twice(released: Any, tmp_path: Path) -> None:
    done = release(released.bundle, tmp_path / "new", released.key)
    assert isinstance(done.exception, ConfigError)
    assert "is a bundle already" in str(done.exception)


def test_full_folder_is_left_alone(released: Any, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert isinstance(release(released.run, tmp_path, released.key).exception, ConfigError)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("kind", ["open", "foreign", "text"])
def test_unfit_signing_key_is_refused(released: Any, tmp_path: Path, kind: str) -> None:
    from deploy.machine.keys import make_authority
    from deploy.release.signing import load_or_make_key

    key = tmp_path / "key.pem"
    if kind == "open":
        load_or_make_key(key)
        key.chmod(0o644)
    elif kind == "foreign":
        make_authority(tmp_path, "any")
        key = tmp_path / "ca.key"
    else:
        key.write_text("no key")
        key.chmod(0o600)
    with pytest.raises(ConfigError):
        load_or_make_key(key)


def test_run_without_a_generator_is_wrong_use(tmp_path: Path, released: Any) -> None:
    (tmp_path / "run").mkdir()
    assert isinstance(release(tmp_path / "run", tmp_path / "new", released.key).exception, DataError)

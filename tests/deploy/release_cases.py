"""A small run over real ledgers, released once; and ways to sign again what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from common.config.run import RunConfig
from common.methods.base import PrivacyPlan, Problem, RunContext
from deploy.cli import app
from deploy.release.build import FILES, SIGNATURE, SUMS, checksums
from deploy.release.signing import load_or_make_key, signature_file
from embeddings.store.sets import EmbeddingSet
from tests.harness import Federation

CONTEXT = RunContext(RunConfig(), Problem(4, ("a", "b"), 2), PrivacyPlan(2.0, 2.0, 0.5, 1, 2, 1e-5))
SMALL_AUDIT = ("--audit-draws", "100", "--audit-canaries", "20")


def run_federation(home: Path, sets: Mapping[int, EmbeddingSet] | None = None, **settings: Any) -> Federation:
    """Two sites whose data is declared public, two rounds."""
    federation = Federation.create(
        home, num_sites=2, sets=sets, data_is_public=True, metrics_may_leave=True, allow_test_noise=True
    )
    federation.run(**settings)
    return federation


def invoke(*words: str | Path) -> Any:
    """`fedhypevae WORDS`."""
    return CliRunner().invoke(app, [str(word) for word in words])


def release(run: Path, out: Path, key: Path, *more: str | Path) -> Any:
    """`fedhypevae release`, with a small audit."""
    return invoke("release", run, "--out", out, "--key", key, *SMALL_AUDIT, *more)


def failed_checks(done: Any) -> list[str]:
    """Names of the checks that `release verify` calls failed."""
    lines = [line.strip() for line in done.output.splitlines()]
    return [line.removeprefix("FAILED").strip().split(":")[0] for line in lines if line.startswith("FAILED")]


def change_json(bundle: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change one of the JSON files of a bundle in place."""
    content = json.loads((bundle / name).read_text())
    change(content)
    (bundle / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sign_again(bundle: Path, key: Path, reasons: tuple[str, ...] = ()) -> None:
    """Checksums and signature of a bundle as it is now."""
    sums = checksums(bundle, FILES, reasons)
    (bundle / SUMS).write_bytes(sums)
    (bundle / SIGNATURE).write_bytes(signature_file(load_or_make_key(key)[0], sums, reasons))


def read(path: Path) -> Mapping[str, Any]:
    """A JSON file."""
    content: Mapping[str, Any] = json.loads(path.read_text())
    return content

"""Writing a bundle: every file in a folder beside the place, then one rename."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.assurance.audit_run import Watch
from common.assurance.statement import check_statement
from common.durable import sha256_of, whole_folder, write_atomically
from common.errors import ConfigError, FedHypeVAEError
from common.evaluation.scores import Split
from common.privacy.events import PrivacyEvent
from common.publishing.bundle import STATEMENT, Bundle
from common.publishing.generator_file import GENERATOR, write_generator
from common.publishing.parquet import Written, set_notes, write_rows
from deploy.release.audits import audit_file, in_json
from deploy.release.describe import DATA_FILE, NOT_PRIVATE, Facts, bundle_json, card, croissant, json_text
from deploy.release.gate import Inspection
from deploy.release.ledgers import FORMAT as LEDGERS_FORMAT
from deploy.release.ledgers import published_rows
from deploy.release.promises import withdraw
from deploy.release.signing import fingerprint, signature_file

SUMS, SIGNATURE = "SHA256SUMS", "signature.json"
FILES = (
    "README.md",
    "audit.json",
    "bundle.json",
    "croissant.json",
    DATA_FILE,
    GENERATOR,
    "ledgers.json",
    STATEMENT,
)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


def check_place(out: Path, title: str, license_name: str) -> None:
    """Refuse a place or a title that no bundle can have, before anything is computed (ConfigError)."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not empty: name a new folder with --out")
    check_title(title, license_name)


def check_title(title: str, license_name: str) -> None:
    """Refuse a title that is not one printable line, or a license that is no identifier (ConfigError)."""
    if not title.strip() or len(title) > 200 or not title.isprintable():
        raise ConfigError(f"a name is one line of at most 200 characters, found {title!r}")
    if not _LICENSE.fullmatch(license_name):
        raise ConfigError(f"a license is an identifier such as cc-by-4.0, found {license_name!r}")


def write_bundle(
    out: Path,
    found: Inspection,
    reasons: Sequence[str],
    *,
    title: str,
    license_name: str,
    key: Ed25519PrivateKey,
    watch: Watch,
) -> None:
    """Write and sign a bundle; whole or not at all.

    Args:
        out: a folder that does not exist, or is empty.
        found: by the gate.
        reasons: why the bundle is not private, in words; marked in every file. Empty where the promise stands.
        title: of the set. license_name: its identifier.
        key: the coordinator's.
        watch: called now and then with (what is done, done, in all).

    Raises:
        FedHypeVAEError: the disk refuses; nothing is left.
    """
    bundle, statement = found.bundle, _statement(found, reasons)
    try:
        with whole_folder(out) as folder:
            data = _write_data(folder / DATA_FILE, bundle, reasons, watch)
            watch("describing and signing", 0, 1)
            write_generator(folder / GENERATOR, bundle.context, bundle.artifact, bundle.encoder, reasons)
            facts = Facts(
                bundle=bundle,
                data=data,
                statement=statement,
                audits=found.audits_in_json,
                why_none=found.why_none,
                not_private_because=reasons,
                name=title,
                license=license_name,
                signed_by=fingerprint(key.public_key()),
                date=_today(),
            )
            contents: dict[str, Mapping[str, Any]] = {
                STATEMENT: statement,
                "audit.json": audit_file(bundle.context, found.audits_in_json, found.why_none, reasons),
                "ledgers.json": _ledgers(found, statement, reasons),
                "bundle.json": bundle_json(facts),
                "croissant.json": croissant(facts),
            }
            for name, content in contents.items():
                write_atomically(folder / name, json_text(content).encode())
            write_atomically(folder / "README.md", card(facts).encode())
            sums = checksums(folder, FILES, reasons)
            write_atomically(folder / SUMS, sums)
            write_atomically(folder / SIGNATURE, signature_file(key, sums, reasons))
    except OSError as error:
        raise FedHypeVAEError(f"can't write {out} ({error.strerror or error}): free the disk, then try again") from None


def checksums(folder: Path, names: Sequence[str], reasons: Sequence[str]) -> bytes:
    """The content of SHA256SUMS, as `sha256sum --check` reads it; a comment marks a bundle that is not private."""
    lines = [f"# {NOT_PRIVATE}: {' '.join(reason.split())}" for reason in reasons]
    lines += [f"{sha256_of(folder / name)}  {name}" for name in sorted(names)]
    return ("\n".join(lines) + "\n").encode()


def _statement(found: Inspection, reasons: Sequence[str]) -> dict[str, Any]:
    """The run's statement with the audit of the whole run; without its promise where there are reasons."""
    of_run = [result for result in found.audits if result.kind == "one-run"] or list(found.audits)
    statement = {**found.statement, "audit": in_json(of_run[0]) if of_run else None}
    if reasons:
        statement = withdraw(statement, reasons)
    check_statement(statement)
    return statement


def _write_data(path: Path, bundle: Bundle, reasons: Sequence[str], watch: Watch) -> Written:
    notes = set_notes(bundle.context, reasons)  # not the run's own: a note could hold anything

    def watched() -> Iterator[Split]:
        done = 0
        for block in bundle.stream_published():
            yield block
            done += len(block[1])
            watch("writing the set", done, max(done, bundle.config.synthesis.synthetic_rows))

    names, task = bundle.class_names, bundle.context.problem.task
    return write_rows(path, watched(), dim=bundle.dim, class_names=names, notes=notes, task=task)


def _ledgers(found: Inspection, statement: Mapping[str, Any], reasons: Sequence[str]) -> dict[str, Any]:
    run, public = statement["run"], bool(statement["guarantee"]["data_is_public"])
    sites = {}
    for site, facts in statement["sites"].items():
        charged = [PrivacyEvent(**event) for event in facts["events"]]
        sites[site] = {
            "receipt": facts["ledger_receipt"],
            **published_rows(found.ledgers.get(site), run, site, charged, public),
        }
    return {
        "format": LEDGERS_FORMAT,
        "private": not reasons,
        "not_private_because": list(reasons),
        "run": run,
        "sites": sites,
    }


def _today() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    return moment.date().isoformat()

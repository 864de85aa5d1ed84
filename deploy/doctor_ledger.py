"""What the doctor says of a site's ledger and its witness."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.errors import FedHypeVAEError
from deploy.site.folder import SiteFolder
from deploy.site.unit import unit_faults

if TYPE_CHECKING:
    from client_app.policy.policy import SitePolicy


def ledger_faults(site: SiteFolder) -> Iterable[str]:
    """What keeps a site from releasing, or would let an old ledger go unnoticed."""
    from client_app.ledger.ledger import Ledger

    policy = _readable_policy(site)
    if policy is None:
        return
    path, witness = policy.ledger_path(site.path), policy.witness_path(site.path)
    if not path.is_file():
        yield (
            f"ledger: {path} is missing: restore it from a copy; only a site that never released makes a new one "
            "(`fedhypevae ledger create`)"
        )
        return
    places = {file.resolve().parent for file in (path, witness) if file is not None}
    yield from unit_faults(site, places)
    for place in sorted(places):
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            yield (
                f"ledger: this user can't write to {place} ({error.strerror}), where ledger or witness lies, so "
                "nothing would be released: let the site's user write there, and its systemd unit (ReadWritePaths)"
            )
            return
    try:
        Ledger.open(path, policy.cohort_id, witness, read_only=True, timeout_s=5.0).close()
    except FedHypeVAEError as error:
        yield f"ledger: {error}; nothing is released until it is restored (`fedhypevae ledger verify`)"
        return
    if witness is None:
        yield (
            "witness: the ledger has none, so nobody but an honest server notices an old one that was put back: "
            f"`fedhypevae ledger witness {path} {site.default_witness}`, best with a file on another disk, and name "
            "that file in policy.toml (witness = ...)"
        )


def unit_advice(site: SiteFolder) -> Iterable[str]:
    """A policy that protects records where the data names patients, while that can still be changed."""
    from client_app.ledger.ledger import Ledger
    from embeddings.store.file import read_head

    policy = _readable_policy(site)
    if policy is None or policy.unit == "patient" or not site.data.is_file():
        return
    with Ledger.open(policy.ledger_path(site.path), None, read_only=True, timeout_s=5.0) as ledger:
        if not ledger.runs and "patient" in read_head(site.data)[1]:
            yield (
                "advice: unit: the data names patients, and policy.toml protects single records, so a patient with "
                'many is protected less: set unit = "patient" and max_records_per_patient = 4 before the first run; '
                "afterwards the ledger holds you to it"
            )


def ledger_advice(site: SiteFolder) -> Iterable[str]:
    """A witness that would be put back together with the ledger, and files that others may read."""
    policy = _readable_policy(site)
    if policy is None:
        return
    ledger, witness = policy.ledger_path(site.path).resolve(), policy.witness_path(site.path)
    files = [ledger] if witness is None else [ledger, witness.resolve()]
    for path in files:
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield f"advice: others may read {path}: chmod 600 {path}"
    if witness is None or not witness.is_file() or not ledger.is_file():
        return
    cure = "move it to another disk or machine and name the new place in policy.toml (witness = ...)"
    inside = witness.resolve().is_relative_to(site.path.resolve())
    if inside or witness.resolve().parent == ledger.parent:
        yield f"advice: witness: {witness} lies in the ledger's own folder, and would be put back with it: {cure}"
    elif witness.stat().st_dev == ledger.stat().st_dev:
        yield f"advice: witness: {witness} lies on the ledger's own disk, and would be put back with it: {cure}"


def _readable_policy(site: SiteFolder) -> SitePolicy | None:
    from client_app.policy.policy import load_policy

    try:
        return load_policy(site.path / "policy.toml")
    except FedHypeVAEError:
        return None  # reported by the policy's own check

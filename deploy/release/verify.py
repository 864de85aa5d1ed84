"""`fedhypevae release verify`: everything in a bundle that can be checked without its run, on any machine.

A bundle is what somebody else wrote: nothing in it is taken for granted, and whatever makes no sense is a failed check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.assurance.audit_run import Watch
from common.durable import sha256_of
from common.errors import DataError, FedHypeVAEError
from common.publishing.bundle import STATEMENT
from deploy.release.build import FILES, SIGNATURE, SUMS
from deploy.release.contents import Contents, read_sums, require
from deploy.release.promises import largest_epsilon
from deploy.release.signing import check_signature

_FOLDERS = ("data",)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what is wrong with it; `fault` is empty where nothing is."""

    what: str
    fault: str = ""


@dataclass(frozen=True)
class Verdict:
    """Outcome of all checks.

    Attributes:
        checks: in order; after a failed checksum or signature the contents are not looked at.
        signed_by: fingerprint of the key that signed; empty where the signature fails.
        not_private_because: what the bundle says of itself.
        epsilon: the largest ε of a site, recomputed from its events.
        delta: its δ.
        missed_share: the share of foreign rows above which a sampled set would have been found; None where every row
            was compared.
    """

    checks: tuple[Check, ...]
    signed_by: str = ""
    not_private_because: tuple[str, ...] = ()
    epsilon: float = math.inf
    delta: float = 0.0
    missed_share: float | None = None

    @property
    def intact(self) -> bool:
        """Whether every check passed."""
        return all(not check.fault for check in self.checks)


def verify_bundle(folder: Path, pinned: str | None, watch: Watch, *, quick: bool = False) -> Verdict:
    """Check a bundle.

    Args:
        folder: the bundle.
        pinned: fingerprint of the coordinator's key, which the reader has from elsewhere; None: any key will do that
            the bundle itself names.
        watch: called with (what is checked next, done, in all).
        quick: draw a sample of the rows again, and not all.

    Raises:
        DataError: the folder is no bundle at all.
    """
    if not folder.is_dir() or not ((folder / SUMS).is_file() or (folder / "bundle.json").is_file()):
        raise DataError(f"{folder} is no bundle: name the folder that `fedhypevae release` made")
    signed: list[str] = []
    outer: list[tuple[str, Callable[[], object]]] = [
        ("signature", lambda: signed.append(_check_signature(folder, pinned))),
        ("files, none missing and none added", lambda: _check_names(folder)),
        ("checksum of every file", lambda: _check_sums(folder)),
    ]
    checks = [_checked(what, check, watch) for what, check in outer]
    if any(check.fault for check in checks):
        return Verdict(tuple(checks), "".join(signed))
    contents = Contents(folder)
    rows = "sampled rows" if quick else "every row"
    inner: list[tuple[str, Callable[[], object]]] = [
        ("format", contents.check_format),
        ("marks: every file says the same of the promise", contents.check_marks),
        ("configuration: the same everywhere", contents.check_config),
        ("privacy statement, every epsilon computed again", contents.check_statement),
        ("ledgers", contents.check_ledgers),
        ("audit", contents.check_audit),
        ("generator: what its method publishes, rows can be drawn", contents.check_generator),
        ("synthetic set: layout and numbers", contents.check_data),
        (f"synthetic set: {rows} drawn again", lambda: contents.check_rows(quick, watch)),
        ("descriptions", contents.check_descriptions),
    ]
    checks += [_checked(what, check, watch) for what, check in inner]
    if any(check.fault for check in checks):
        return Verdict(tuple(checks), signed[0])
    statement = contents.json(STATEMENT)
    return Verdict(
        tuple(checks),
        signed[0],
        tuple(contents.json("bundle.json")["not_private_because"]),
        largest_epsilon(statement),
        float(statement["guarantee"]["delta"]),
        contents.missed_share,
    )


def _checked(what: str, check: Callable[[], object], watch: Watch) -> Check:
    watch(what, 0, 1)
    try:
        check()
    except FedHypeVAEError as error:
        return Check(what, str(error))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        return Check(what, f"it makes no sense ({type(error).__name__}: {error!s:.200})")
    return Check(what)


def _check_signature(folder: Path, pinned: str | None) -> str:
    for name in (SUMS, SIGNATURE):
        require((folder / name).is_file(), f"{name} is missing")
    try:
        signer = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["signed_by"]
    except (OSError, ValueError, TypeError, KeyError):
        signer = None
    return check_signature((folder / SIGNATURE).read_bytes(), (folder / SUMS).read_bytes(), signer, pinned)


def _check_names(folder: Path) -> None:
    sums = read_sums(folder)
    expected = set(FILES)
    unlisted, unknown = sorted(expected - set(sums)), sorted(set(sums) - expected)
    require(not unlisted, f"{SUMS} does not name {', '.join(unlisted)}")
    require(not unknown, f"{SUMS} names {', '.join(unknown)}, which belongs to no bundle")
    there, odd = set(), []
    for path in sorted(folder.rglob("*")):
        name = str(PurePosixPath(path.relative_to(folder)))
        if path.is_symlink() or not (path.is_file() or (path.is_dir() and name in _FOLDERS)):
            odd.append(name)
        elif path.is_file():
            there.add(name)
    missing = sorted((expected | {SUMS, SIGNATURE}) - there)
    added = sorted(there - expected - {SUMS, SIGNATURE}) + odd
    require(not missing, f"missing: {', '.join(missing)}")
    require(not added, f"not part of the bundle: {', '.join(added)}")


def _check_sums(folder: Path) -> None:
    wrong = [
        name
        for name, due in read_sums(folder).items()
        if not (folder / name).is_file() or sha256_of(folder / name) != due
    ]
    require(not wrong, f"changed since it was signed: {', '.join(wrong)}")

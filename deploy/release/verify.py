"""`fedhypevae release verify`: everything in a bundle that can be checked without its run, on any machine.

A bundle is what somebody else wrote: nothing in it is taken for granted, and whatever makes no sense is a failed check.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.bundle import GENERATOR, STATEMENT, load_bundle
from common.bundle_parquet import check_layout, read_notes, set_notes, sha256_of, stream_rows
from common.config import RunConfig
from common.errors import DataError, FedHypeVAEError
from common.events import PrivacyEvent
from common.row_sets import ROWS_FORMAT
from deploy.release.audits import objections
from deploy.release.build import FILES, SIGNATURE, SUMS
from deploy.release.describe import BUNDLE_FORMAT, DATA_FILE, NOT_PRIVATE
from deploy.release.layout import check_generator_layout
from deploy.release.ledgers import check_published
from deploy.release.promises import faults_of, largest_epsilon
from deploy.release.redraw import FOREIGN, Watch, check_every_row, check_sampled_rows
from deploy.release.signing import check_signature

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._/-]{1,200})")
_FOLDERS = ("data",)
_CLAIM_TOLERANCE = 1e-4


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
    contents = _Contents(folder)
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


def _require(right: bool, fault: str) -> None:
    if not right:
        raise FedHypeVAEError(fault)


def _check_signature(folder: Path, pinned: str | None) -> str:
    for name in (SUMS, SIGNATURE):
        _require((folder / name).is_file(), f"{name} is missing")
    try:
        signer = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["signed_by"]
    except (OSError, ValueError, TypeError, KeyError):
        signer = None
    return check_signature((folder / SIGNATURE).read_bytes(), (folder / SUMS).read_bytes(), signer, pinned)


def _read_sums(folder: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            continue
        found = _LINE.fullmatch(line)
        if found is None or found[2] in sums:
            raise FedHypeVAEError(f"{SUMS}: a line is not as `fedhypevae release` writes it: {line!r:.100}")
        sums[found[2]] = found[1]
    return sums


def _check_names(folder: Path) -> None:
    sums = _read_sums(folder)
    expected = set(FILES)
    unlisted, unknown = sorted(expected - set(sums)), sorted(set(sums) - expected)
    _require(not unlisted, f"{SUMS} does not name {', '.join(unlisted)}")
    _require(not unknown, f"{SUMS} names {', '.join(unknown)}, which belongs to no bundle")
    there, odd = set(), []
    for path in sorted(folder.rglob("*")):
        name = str(PurePosixPath(path.relative_to(folder)))
        if path.is_symlink() or not (path.is_file() or (path.is_dir() and name in _FOLDERS)):
            odd.append(name)
        elif path.is_file():
            there.add(name)
    missing = sorted((expected | {SUMS, SIGNATURE}) - there)
    added = sorted(there - expected - {SUMS, SIGNATURE}) + odd
    _require(not missing, f"missing: {', '.join(missing)}")
    _require(not added, f"not part of the bundle: {', '.join(added)}")


def _check_sums(folder: Path) -> None:
    wrong = [
        name
        for name, due in _read_sums(folder).items()
        if not (folder / name).is_file() or sha256_of(folder / name) != due
    ]
    _require(not wrong, f"changed since it was signed: {', '.join(wrong)}")


class _Contents:
    """The contents of a bundle whose bytes are those that were signed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._json: dict[str, Any] = {}
        self.missed_share: float | None = None

    def json(self, name: str) -> dict[str, Any]:
        """One of the JSON files."""
        if name not in self._json:
            content = json.loads((self._folder / name).read_text(encoding="utf-8"))
            _require(isinstance(content, dict), f"{name} is no JSON object")
            self._json[name] = content
        found: dict[str, Any] = self._json[name]
        return found

    def check_format(self) -> None:
        found = self.json("bundle.json").get("format")
        _require(
            found == BUNDLE_FORMAT and load_bundle(self._folder).rows_format == ROWS_FORMAT,
            f"expected {BUNDLE_FORMAT}, rows of {ROWS_FORMAT}, found {found!r:.40}: this version can't draw its rows "
            "again; verify it with the version that made it, or ask for a release of today's format",
        )

    def check_marks(self) -> None:
        reasons = list(self.json("bundle.json")["not_private_because"])
        private = not reasons
        notes = read_notes(self._folder / DATA_FILE)
        told: dict[str, Mapping[str, Any]] = {
            name: self.json(name) for name in ("bundle.json", "audit.json", "ledgers.json", SIGNATURE)
        }
        told |= {DATA_FILE: notes}
        for name, content in told.items():
            same = content["private"] is private and list(content["not_private_because"]) == reasons
            _require(same, f"{name} says otherwise than bundle.json whether the set is private")
        guarantee = self.json(STATEMENT)["guarantee"]
        _require(guarantee["end_to_end"] is private, f"{STATEMENT} says otherwise than bundle.json")
        _require(list(guarantee["why_not"]) == reasons, f"{STATEMENT} gives other reasons than bundle.json")
        _require(bool(load_bundle(self._folder).not_private) is not private, f"{GENERATOR} says otherwise")
        card, sums = ((self._folder / name).read_text(encoding="utf-8") for name in ("README.md", SUMS))
        described = str(self.json("croissant.json")["description"])
        for name, text in (("README.md", card), (SUMS, sums), ("croissant.json", described)):
            _require((NOT_PRIVATE in text) is not private, f"{name} says otherwise than bundle.json")

    def check_config(self) -> None:
        bundle = load_bundle(self._folder)
        told, config = self.json("bundle.json"), bundle.config.to_flat()
        for name in ("bundle.json", "audit.json"):
            found = RunConfig.from_flat(self.json(name)["config"]).to_flat()
            _require(found == config, f"{name} has another configuration than {GENERATOR}")
        encoder = None if bundle.encoder is None else bundle.encoder.to_json()
        same = told["class_names"] == list(bundle.class_names) and told["dim"] == bundle.dim
        _require(
            same and told["encoder"] == encoder, f"bundle.json has other classes or another encoder than {GENERATOR}"
        )
        runs = {told["run"], self.json(STATEMENT)["run"], self.json("ledgers.json")["run"]}
        _require(len(runs) == 1, "the files name different runs")

    def check_statement(self) -> None:
        withdrawn = self.json("bundle.json")["not_private_because"]
        faults = faults_of(self.json(STATEMENT), load_bundle(self._folder).context, withdrawn)
        if withdrawn:  # a run that charged nobody can be released by force: it promises nothing
            faults = [fault for fault in faults if "names no site" not in fault and "was not charged" not in fault]
        _require(not faults, "; ".join(faults))

    def check_ledgers(self) -> None:
        sites, shown = self.json(STATEMENT)["sites"], self.json("ledgers.json")["sites"]
        _require(set(sites) == set(shown), "ledgers.json and the privacy statement name different sites")
        for site, facts in sites.items():
            told = [PrivacyEvent(**event) for event in facts["events"]]
            _require(shown[site]["receipt"] == facts["ledger_receipt"], f"ledgers.json: another receipt of {site}")
            check_published(shown[site], self.json(STATEMENT)["run"], site, facts["ledger_receipt"], told)

    def check_audit(self) -> None:
        statement, audits = self.json(STATEMENT), self.json("audit.json")["audits"]
        if statement["audit"] is not None:
            _require(statement["audit"] in audits, f"the audit in {STATEMENT} is not one of audit.json")
        if self.json("bundle.json")["private"]:
            faults = objections(audits, self.json("audit.json")["why_none"], largest_epsilon(statement))
            _require(not faults, "; ".join(faults))
            declared = statement["guarantee"]["epsilon_declared"]
            wrong = [
                audit
                for audit in audits
                if audit["kind"] == "one-run"
                and not math.isclose(audit["epsilon_claimed"], declared, rel_tol=_CLAIM_TOLERANCE)
            ]
            _require(not wrong, "the audit was made for another claim than the privacy statement's")

    def check_generator(self) -> None:
        bundle = load_bundle(self._folder)
        check_generator_layout(bundle)
        embeddings, labels = bundle.draw(len(bundle.class_names), threads=1)
        fits = embeddings.shape == (len(bundle.class_names), bundle.dim) and bool(embeddings.isfinite().all())
        _require(fits and labels.shape == embeddings.shape[:1], f"{GENERATOR} gives rows of another shape")

    def check_data(self) -> None:
        told, bundle = self.json("bundle.json"), load_bundle(self._folder)
        check_layout(self._folder / DATA_FILE, bundle.dim)
        due = set_notes(bundle.context, told["not_private_because"])
        _require(read_notes(self._folder / DATA_FILE) == due, f"{DATA_FILE} notes other facts than the bundle's")
        counts = [0] * len(told["class_names"])
        for _, labels in stream_rows(self._folder / DATA_FILE, told["dim"], len(counts)):
            for label, count in enumerate(labels.bincount(minlength=len(counts)).tolist()):
                counts[label] += count
        same = counts == told["class_counts"] and sum(counts) == told["rows"]
        _require(same, f"{DATA_FILE} holds other rows than bundle.json counts")

    def check_rows(self, quick: bool, watch: Watch) -> None:
        # a set that is not the generator's own is in order where the bundle says so itself, and promises nothing
        if any(FOREIGN in reason for reason in self.json("bundle.json")["not_private_because"]):
            return
        if quick:
            self.missed_share = check_sampled_rows(load_bundle(self._folder), watch)
        else:
            check_every_row(load_bundle(self._folder), watch)

    def check_descriptions(self) -> None:
        sums, (file,) = _read_sums(self._folder), self.json("croissant.json")["distribution"]
        _require(file["sha256"] == sums[DATA_FILE], "croissant.json names another checksum of the set")
        _require(file["contentUrl"] == DATA_FILE, "croissant.json names another file")
        card = (self._folder / "README.md").read_text(encoding="utf-8")
        front = card.split("---\n")
        _require(len(front) > 2 and front[0] == "", "README.md has no front matter")
        _require(self.json("bundle.json")["signed_by"] in card, "README.md names another signer")

"""What the sites' ledgers say of a run: checked by the coordinator, and shown in the bundle row by row.

A ledger names the data set's fingerprint, which is a function of the records without noise. So a ledger's own rows are
published only where every site declares its data public (a demonstration). Else the bundle shows what was charged, as
the ledger stated it, and the ledger's receipt, which the site alone can hold against its ledger
(`fedhypevae ledger verify --receipt`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_app.ledger.chain import COLUMNS, NO_PREVIOUS, Entry, Head, canonical, check_chain, check_receipt
from client_app.ledger.ledger import Ledger
from client_app.ledger.runs import Run, fold_entries
from common.errors import FedHypeVAEError, LedgerError
from common.methods.base import RunContext
from common.privacy.events import PrivacyEvent, mechanism_counts
from common.texts import read_json
from common.wire.allow_list import settings_digest

FORMAT = "fedhypevae-ledgers/1"
_LINKED = ("event", "previous", "digest")
# what a site's part says of itself
_SHOWN = "the site's ledger, and shown here"
_CHECKED = "the site's ledger, by the coordinator"
_STATED = "what the ledger stated with each release, and its receipt"


@dataclass(frozen=True)
class SiteLedger:
    """A site's ledger as the coordinator found it: its whole chain, checked."""

    path: Path
    entries: tuple[Entry, ...]

    def run(self, name: str) -> Run | None:
        """All it knows of a run; None where it does not know the run."""
        return fold_entries(self.entries).get(name)


def find_ledger(site: str, places: Sequence[Path]) -> Path | None:
    """A site's ledger in one of the folders: `SITE/ledger.db`, or an export `SITE.json`; None if there is none."""
    for place in places:
        for path in (place / site / "ledger.db", place / f"{site}.json"):
            if path.is_file():
                return path
    return None


def read_ledger(path: Path) -> SiteLedger:
    """A ledger's file or its export, with the chain and the sense of every entry checked.

    Raises:
        LedgerError: it can't be read, or was altered; names the entry.
    """
    if path.suffix == ".json":
        try:
            entries = _from_export(read_json(path, LedgerError)["entries"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LedgerError(f"{path} is no export of a ledger ({type(error).__name__}): ask the site again") from None
    else:
        with Ledger.open(path, None, read_only=True, allow_moved=True) as ledger:
            ledger.verify()
            entries = ledger.entries
    check_entries(path, entries)
    return SiteLedger(path, entries)


def check_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Check a whole chain from its first entry. Raises LedgerError."""
    if not entries:
        raise LedgerError(f"{path} holds no ledger")
    check_chain(path, (), entries)
    fold_entries(entries)


def check_charges(
    ledger: SiteLedger, run: str, receipt: str, stated: Sequence[PrivacyEvent], context: RunContext
) -> None:
    """Hold a site's ledger against what the coordinator knows of it.

    Args:
        ledger: the site's.
        run: the run's lasting name.
        receipt: head of the ledger after the site's last release.
        stated: events that the statement charges the site.
        context: as the published generator has it: a set is drawn by its settings.

    Raises:
        LedgerError: the receipt is not of this ledger, or the ledger charged other events or has other settings.
    """
    check_receipt(ledger.path, ledger.entries, Head.parse(receipt))
    found = ledger.run(run)
    charged = () if found is None else found.charged
    if mechanism_counts(charged) != mechanism_counts(stated):
        count = sum(event.count for event in charged)
        raise LedgerError(
            f"privacy ledger {ledger.path} charged {count} releases for run {run}, and the privacy statement has "
            f"{sum(event.count for event in stated)}, or others: the statement is not the run's"
        )
    agreed = "" if found is None else found.settings
    if agreed and agreed != settings_digest(context):  # older ledgers noted none
        raise LedgerError(
            f"privacy ledger {ledger.path} holds other settings of run {run} than the generator: these are not the "
            "settings, classes or seed that the site took part in"
        )


def published_rows(ledger: SiteLedger | None, run: str, site: str, stated: Sequence[PrivacyEvent], public: bool) -> Any:
    """A site's part of ledgers.json: the ledger's own rows where its data is public, else what it charged."""
    if ledger is not None and public:
        return {
            "checked": _SHOWN,
            "rows": [dict(zip(COLUMNS, entry.row, strict=True)) for entry in ledger.entries],
        }
    rows, previous = [], _start(run, site)
    for event in stated:
        digest = _link(event.to_json(), previous)
        rows.append({"event": event.to_json(), "previous": previous, "digest": digest})
        previous = digest
    return {"checked": _STATED if ledger is None else _CHECKED, "rows": rows}


def check_published(
    part: Mapping[str, Any],
    run: str,
    site: str,
    receipt: str | None,
    stated: Sequence[PrivacyEvent],
    context: RunContext,
) -> None:
    """Check a site's part of ledgers.json: every row, the receipt, and that it charges what the statement says.

    Raises:
        LedgerError: a row was changed, removed or added, or does not fit the statement. FedHypeVAEError: it makes no
            sense.
    """
    name, rows = Path(f"ledgers.json, {site}"), part["rows"]
    shown = bool(rows) and "seq" in rows[0]
    fields = set(COLUMNS if shown else _LINKED)
    if set(part) - {"receipt"} != {"checked", "rows"} or any(set(row) != fields for row in rows):
        raise LedgerError(f"{name}: other fields than `fedhypevae release` writes")
    if shown != (part["checked"] == _SHOWN) or part["checked"] not in {_SHOWN, _CHECKED, _STATED}:
        raise LedgerError(f"{name}: says of itself that it was checked otherwise than it shows")
    if shown:
        entries = [Entry(*(row[field] for field in COLUMNS)) for row in rows]
        check_entries(name, entries)
        check_charges(SiteLedger(name, tuple(entries)), run, receipt or "", stated, context)
        return
    previous, charged = _start(run, site), []
    for place, row in enumerate(rows, start=1):
        if row["previous"] != previous or row["digest"] != _link(row["event"], previous):
            raise LedgerError(f"{name}: row {place} was changed, removed or added")
        previous = row["digest"]
        charged.append(PrivacyEvent.from_json(row["event"]))
    if receipt is not None:
        Head.parse(receipt)
    if mechanism_counts(charged) != mechanism_counts(stated):
        raise LedgerError(f"{name}: its rows charge other events than the privacy statement")


def _from_export(rows: Sequence[Mapping[str, Any]]) -> tuple[Entry, ...]:
    entries, previous = [], NO_PREVIOUS
    for row in rows:
        at, kind, run_id, round_key = (str(row[field]) for field in ("at", "kind", "run_id", "round_key"))
        body, digest = canonical(row["body"]), str(row["digest"])
        entries.append(Entry(int(row["seq"]), at, kind, run_id, round_key, body, previous, digest))
        previous = entries[-1].digest
    return tuple(entries)


def _start(run: str, site: str) -> str:
    return hashlib.sha256(json.dumps([FORMAT, run, site]).encode()).hexdigest()


def _link(event: str, previous: str) -> str:
    return hashlib.sha256(json.dumps([event, previous]).encode()).hexdigest()


def checked_sites(
    sites: Mapping[str, Mapping[str, Any]], run: str, places: Sequence[Path], expected: bool, context: RunContext
) -> tuple[dict[str, SiteLedger], list[str]]:
    """Look for every site's ledger, and hold what is found against the privacy statement.

    Args:
        sites: of the privacy statement.
        run: the run's lasting name.
        places: folders to look in.
        expected: whether every site's ledger has to be there (a simulation), or its receipt is enough.
        context: of the published generator.

    Returns:
        Ledgers by site, and what does not verify, in words.
    """
    found: dict[str, SiteLedger] = {}
    faults = []
    for site, facts in sites.items():
        receipt, path = facts["ledger_receipt"], find_ledger(site, places)
        try:
            stated = [PrivacyEvent(**event) for event in facts["events"]]
            if path is not None:
                ledger = read_ledger(path)
                check_charges(ledger, run, receipt or "", stated, context)
                found[site] = ledger
            elif expected:
                raise LedgerError(f"no ledger of {site} in {' or '.join(str(place) for place in places)}: it was lost")
            else:
                Head.parse(receipt or "")
        except FedHypeVAEError as error:
            faults.append(f"the ledger of {site} does not verify: {error}")
    return found, faults

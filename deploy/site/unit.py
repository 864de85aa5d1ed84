"""The site's systemd unit: it may write to its folder alone, and to the places that the policy names beside it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.durable import write_atomically
from common.texts import read_text
from deploy.site.folder import SiteFolder

UNIT = "fedhypevae-site.service"
INSTALLED = (Path("/etc/systemd/system"), Path("/usr/local/lib/systemd/system"))
SIMPLE_PATH = r"^/[^\s%\"'\\]*$"  # as it may stand in a unit without quotes
_MAY_WRITE = "ReadWritePaths="


def let_unit_write(folder: Path, place: Path) -> None:
    """Let the unit in a site's folder write to one more place, if the unit is there and says otherwise.

    Args:
        folder: the site's.
        place: a folder; with a name that a unit can't have it is left out, and the doctor says so.
    """
    unit, line = folder / UNIT, f"{_MAY_WRITE}{place}"
    if not unit.is_file() or re.match(SIMPLE_PATH, str(place)) is None:
        return
    text = read_text(unit)
    if not _covers(_may_write([text]), place):
        write_atomically(unit, text.replace(_MAY_WRITE, f"{line}\n{_MAY_WRITE}", 1).encode())


def unit_faults(site: SiteFolder, needed: Iterable[Path], installed: Sequence[Path] = INSTALLED) -> list[str]:
    """Folders that the site's unit may not write to and must: one line each.

    Args:
        site: its folder.
        needed: folders of the ledger and of its witness.
        installed: where systemd looks for units. One that starts another site is none of this site's.
    """
    here = str(site.path.resolve())
    lines = []
    for place in (site.path, *installed):
        unit = place / UNIT
        if not unit.is_file():
            continue
        texts = [read_text(file) for file in (unit, *sorted((place / f"{UNIT}.d").glob("*.conf")))]
        starts_it = re.search(rf"^ExecStart=.* {re.escape(here)}$", texts[0], re.MULTILINE)
        if "ProtectSystem=strict" not in texts[0] or starts_it is None:
            continue
        lines += [
            f"unit: {unit} keeps the site from writing to {folder}, so every round would be refused (ledger): add "
            f"{_MAY_WRITE}{folder} to it, copy it to {INSTALLED[0]} and run systemctl daemon-reload"
            for folder in sorted({path.resolve() for path in needed})
            if not _covers(_may_write(texts), folder)
        ]
    return lines


def _may_write(texts: Iterable[str]) -> list[Path]:
    lines = [line for text in texts for line in text.splitlines() if line.startswith(_MAY_WRITE)]
    values = [line.removeprefix(_MAY_WRITE) for line in lines]
    return [Path(word.lstrip("-+")) for value in values for word in shlex.split(value)]


def _covers(allowed: Iterable[Path], folder: Path) -> bool:
    return any(folder.is_relative_to(one) for one in allowed)

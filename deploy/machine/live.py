"""Watching a federation from outside its programs: the server's status file, and a site's own ledger.

Nothing here runs in the programs that train: a reader looks at files that they write anyway, so a round costs no more.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client_app.site_log import LOG_FILE as SITE_LOG
from common.errors import DataError, FedHypeVAEError
from common.names import STATUS
from common.plain import plain
from common.texts import read_object

POLL_S = 2.0
_QUIET_S = 900.0  # longer than a round's time-out by default: then something hangs
_PLACES = (STATUS, f"work/**/{STATUS}", f"outputs/*/{STATUS}", f"*/{STATUS}")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class RunStatus:
    """What a run last said of itself. `values` are those of its status file."""

    folder: Path
    values: Mapping[str, Any]
    age_s: float

    @property
    def state(self) -> str:
        """waiting, running, completed or failed; `silent` for a run that should go on and says nothing."""
        said = str(self.values.get("status", "unknown"))
        return "silent" if said in ("running", "waiting") and self.age_s > _QUIET_S else said

    @property
    def line(self) -> str:
        """The last line for a person; empty before the first round."""
        return str(self.values.get("error") or self.values.get("line") or "")


def find_status(path: Path) -> RunStatus:
    """The newest run at or below a path.

    Args:
        path: a run's output folder, a server's folder, or the folder that holds `outputs/`.

    Raises:
        DataError: no run is there, or its status can't be read.
    """
    for place in _PLACES:
        found = sorted(path.glob(place), key=lambda file: file.stat().st_mtime)
        if found:
            return read_status(found[-1])
    raise DataError(
        f"no run at {path}: name a run's output folder (such as outputs/demo) or the server's folder; a run writes its "
        "status when it starts"
    )


def read_status(file: Path) -> RunStatus:
    """Read one status file (DataError if it can't be read)."""
    values = read_object(file, "is a run going on there?")
    with suppress(OSError):
        return RunStatus(file.parent, values, max(time.time() - file.stat().st_mtime, 0.0))
    raise DataError(f"{file} is gone: is a run going on there?")


def status_rows(status: RunStatus) -> list[tuple[str, str]]:
    """A run's status as (name, value) lines."""
    values = status.values
    rows = [("run", f"{values.get('run', 'not named yet')} ({values.get('method', 'unknown')})")]
    rows.append(("state", status.state))
    if "rounds" in values:
        rows.append(("round", f"{values.get('round', 0)} of {values['rounds']}"))
    if "sites_answered" in values:
        rows.append(("sites", f"{values['sites_answered']} of {values['sites']} answered in the last round"))
    elif "sites" in values:
        rows.append(("sites", f"{values['sites']} {'expected' if status.state == 'waiting' else 'take part'}"))
    rows += [("missing", f"{site}: {why}") for site, why in values.get("missing", {}).items()]
    if "epsilon_spent" in values:
        spent, target = (_number(values.get(name)) for name in ("epsilon_spent", "epsilon_target"))
        rows.append(("epsilon", f"{spent} of {target} spent at most, at delta {values.get('delta', 0):g}"))
    if "seconds" in values:
        rows.append(("time", f"{_time(values['seconds'])} so far, about {_time(values.get('seconds_left', 0))} left"))
    if status.line:
        rows.append(("last line", " ".join(status.line.split())))
    rows.append(("heard", f"{_time(status.age_s)} ago"))
    return rows


def new_lines(find: Callable[[], RunStatus]) -> Iterator[str | None]:
    """A run's line whenever it is a new one, else None; never ends. A run that isn't there yet has none."""
    last = find_line(find)
    while True:
        line = find_line(find)
        yield line if line != last and line else None
        last = line


def find_line(find: Callable[[], RunStatus]) -> str:
    """The present line; empty where there is none."""
    try:
        status = find()
    except (DataError, OSError):
        return ""
    return status.line if status.values.get("status") != "failed" else f"failed: {status.line}"


def site_line(folder: Path) -> str:
    """What a site has spent in its newest run, from its own ledger: `run-7: round 3 sent; epsilon 0.84 of 3`.

    Raises:
        FedHypeVAEError: policy or ledger can't be read.
    """
    from client_app.ledger.ledger import Ledger
    from client_app.policy.policy import load_policy
    from common.privacy.composition import epsilon_pld
    from common.privacy.filter import filter_share_spent

    policy = load_policy(folder / "policy.toml")
    with Ledger.open(policy.ledger_path(folder), None, read_only=True, allow_moved=True) as ledger:
        runs = list(ledger.runs.values())
    if not runs:
        return ""
    run = max(runs, key=lambda run: run.last_at)
    sent = [key for key, known in run.rounds.items() if known.payload_digest is not None]
    if not sent:
        return f"{run.run_id}: declared, nothing sent yet"
    limits = run.limits
    epsilon = epsilon_pld(run.charged, limits.lifetime_delta)
    counted = [event for known in runs for event in known.counted]
    share = min(filter_share_spent(counted, limits.lifetime_epsilon, limits.lifetime_delta), 1.0)
    return (
        f"{run.run_id}: {sent[-1].replace('-', ' ')} sent; epsilon {epsilon:.2f} of {limits.run_epsilon:g} for a run; "
        f"{share:.0%} of the lifetime's budget spent or promised"
    )


def watch_run(find: Callable[[], RunStatus], stop: threading.Event, tell: Tell) -> threading.Thread:
    """Print each new line of the newest run, in a thread, until it is stopped."""
    lines = new_lines(find)

    def look() -> None:
        while not stop.wait(POLL_S):
            line = next(lines)
            if line is not None:
                tell(f"{_clock()} {line}")

    return _start(look)


def watch_site(folder: Path, stop: threading.Event, tell: Tell) -> threading.Thread:
    """Print a line after each release of a site, in a thread, until it is stopped."""
    log = folder / "releases.jsonl"

    def stamp() -> tuple[int, int]:
        return (log.stat().st_mtime_ns, log.stat().st_size) if log.is_file() else (0, 0)

    def look() -> None:
        before, last = stamp(), ""
        while not stop.wait(POLL_S):
            now = stamp()
            if now == before:
                continue
            with suppress(FedHypeVAEError, OSError):  # the ledger's own commands say what is wrong with it
                line = site_line(folder)
                before = now  # read: a ledger that could not be, just then, is asked again
                if line and line != last:  # what is sent of public data is logged, and costs nothing
                    tell(f"{_clock()} {line}")
                    last = line

    return _start(look)


def watch_refusals(folder: Path, stop: threading.Event, tell: Tell) -> threading.Thread:
    """Print what a site refused and why, in a thread, until it is stopped: the last line of each entry of its own log.

    Of an error that is none of this program's own only the reference is shown: its words are a library's, and may hold
    what a console's collector should not have.
    """
    log = folder / SITE_LOG
    seen = log.stat().st_size if log.is_file() else 0

    def look() -> None:
        nonlocal seen
        while not stop.wait(POLL_S):
            with suppress(OSError):
                size = log.stat().st_size
                with log.open("rb") as file:
                    file.seek(min(seen, size))
                    for line in refusals_in(file.read(size - min(seen, size)).decode("utf-8", "replace")):
                        tell(f"{_clock()} {line}")
                seen = size

    return _start(look)


def refusals_in(text: str) -> list[str]:
    """A line for each entry in a part of a site's log."""
    lines = []
    for entry in re.split(r"^(?=\S+ reference [0-9a-f]{8}$)", text, flags=re.MULTILINE):
        found = re.match(r"\S+ (reference [0-9a-f]{8})\n", entry)
        if found is not None:
            own = re.findall(r"^common\.errors\.\w+: (.*)", entry, re.MULTILINE)
            why = own[-1] if own else "it failed: its whole error is there"
            lines.append(f"refused ({found[1]} in {SITE_LOG}): {plain(why)}")
    return lines


def _start(look: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


def _clock() -> str:
    return datetime.now(UTC).astimezone().strftime("%H:%M:%S")


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.3g}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

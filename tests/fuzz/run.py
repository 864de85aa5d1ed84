"""Changed replies of every kind, fed to a real server app in one process: the run goes on, whatever comes.

    python -m tests.fuzz.run --mutations 20000 --seed 1

Of a dozen sites in each run two are honest, with real handlers and ledgers; the others answer what an honest site
answered, changed. After each run: it completed, the honest sites' ledgers hold exactly the plan's charges, whoever
broke a rule for certain is named with the command that shuts it out, nothing but printable text was said of it, and
memory stays bounded. Runs under secure aggregation have one liar among five sites.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from tests.fuzz.mutations import Mutation, mutate
from tests.fuzz.session import MOST_GROWTH_MB, Failure
from tests.harness import Exchanged, Federation, Handler, HarnessSite
from tests.secagg_cases import keyed_federation

HONEST, LIARS = ("site-1", "site-2"), 12
SETTINGS: dict[str, Any] = {
    "num_rounds": 1,
    "epsilon": 0.5,
    "tracking": "off",
    "min_sites": 2,
    "num_sites": 2,  # a liar that refuses is one that the run can do without
    "round_timeout": 3.0,
    "synthetic_rows": 12,
}
POLICY: dict[str, Any] = {"data_is_public": True, "metrics_may_leave": True}
POLICY |= {"lifetime_epsilon": 100.0, "lifetime_delta": 1e-2}
_RUNS_WITH_ONE_FEDERATION = 15  # a ledger is read whole at each message
_SECAGG_EVERY = 12  # of the runs


@dataclass
class Fuzz:
    """Counts of one session, all of it from one seed."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    accepted: int = 0
    runs: int = 0
    done: list[tuple[str, str, Mutation]] = field(default_factory=list)
    claimed: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    templates: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.seen: list[Mapping[str, Any]] = []

    @property
    def mutations(self) -> int:
        """How many changed replies the server was sent."""
        return sum(self.counts.values())

    def changed(self, site: HarnessSite, message: Message, honest: Mapping[str, Any]) -> Message:
        """One changed reply, counted."""
        made = mutate(self.rng, message, honest, self.seen or [honest])
        kind = str(message.metadata.message_type)
        self.counts[kind] += 1
        self.done.append((site.name, kind, made))
        if made.message.has_content():
            words = made.message.content.config_records.get("words", ConfigRecord())
            # another name, which may be a fine one, and another liar's own
            self.claimed[str(words.get("site"))].add(site.name)
        return made.message

    def remember(self, message: Message) -> None:
        """Keep a reply's records, to be sent again by others."""
        self.seen = [*self.seen[-40:], dict(message.content)]


def run_local(fuzz: Fuzz, federation: Federation) -> None:
    """A run of every exchange without secure aggregation."""
    rng, templates = fuzz.rng, fuzz.templates
    liars = {site.name: rng.random() for site in federation.sites if site.name not in HONEST}
    for name in sorted(liars)[:3]:
        liars[name] = 2.0  # lies in its hello

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        kind = str(message.metadata.message_type)
        if site.name in HONEST:
            reply = handler()
            if reply.has_content():
                templates[kind] = dict(reply.content)
                fuzz.remember(reply)
            return reply
        if kind not in templates:  # it is asked before any honest site ever was
            return None
        honest = dict(templates[kind])
        if kind == "query.hello":
            honest["words"] = ConfigRecord({**honest["words"], "site": site.name})
            if liars[site.name] < 2.0:
                return Message(RecordDict(honest), reply_to=message)
        elif rng.random() < 0.1:  # now and then the truth, or what looks like it
            return Message(RecordDict(honest), reply_to=message)
        return fuzz.changed(site, message, honest)

    summary = _run(fuzz, federation, tamper, SETTINGS)
    check(summary is not None, fuzz, "the run did not complete")
    assert summary is not None
    _check_local(fuzz, federation, summary)


def _check_local(fuzz: Fuzz, federation: Federation, summary: Mapping[str, Any]) -> None:
    for name in HONEST:
        charged: Counter[str] = Counter()
        for event in federation.site(name).runs()[summary["run"]].charged:
            charged[event.label] += event.count
        check(charged == Counter(statistics=1, training=1), fuzz, f"{name} was charged {charged}")
        check(name in summary["rounds_taken_part"][0], fuzz, f"{name} is not in the round")
        check(name in summary["privacy"]["epsilon_spent_per_site"], fuzz, f"{name} has no epsilon")
    named: set[tuple[str, str]] = set()
    for one in summary["refused_replies"]:
        told = {one["site"]} | {site.name for site in federation.sites if str(site.node) == one["site"]}
        check(not told & set(HONEST), fuzz, f"{one['site']} is named and did nothing")
        check(one["shut_out_with"].endswith(f" {one['site']}"), fuzz, "no command")
        check(one["why"].isprintable() and len(one["why"]) < 1000, fuzz, f"unprintable: {one['why']!r:.200}")
        named |= {(name, one["when"]) for name in told | fuzz.claimed[one["site"]]}
    whens = {
        "query.hello": "hello",
        "query.consent": "consent",
        "query.statistics": "statistics",
        "train": "round 1",
        "evaluate": "evaluate",
    }
    for name, kind, made in fuzz.done:
        found = (name, whens[kind]) in named
        check(found or not made.certain, fuzz, f"{name} is not named after {kind}: {made.what}")
        fuzz.refused += found
        fuzz.accepted += not found


def run_secagg(fuzz: Fuzz, federation: Federation) -> None:
    """A run under secure aggregation, with a liar that is borne as a site that is missing."""
    phases = tuple(f"query.secagg_{name}" for name in ("keys", "shares", "check", "masked", "unmask"))
    when, liar = fuzz.rng.choice(phases), federation.sites[-1].name

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply, kind = handler(), str(message.metadata.message_type)
        if site.name != liar or kind != when or not reply.has_content():
            return reply
        content = dict(reply.content)
        if "tensors" in content and fuzz.rng.random() < 0.7:
            # a masked vector of the right form is like any other: who sends another one spoils the sum (see the limits)
            masked: ArrayRecord = content.pop("tensors")
            changed = fuzz.changed(site, message, content)
            if changed.has_content() and "tensors" not in changed.content:
                changed.content["tensors"] = masked
            return changed
        return fuzz.changed(site, message, content)

    settings = {
        **SETTINGS,
        "num_sites": len(federation.sites),
        "trust": "secagg",
        "epsilon": 3.0,
        "dropouts": 1,
        "colluders": 1,
    }
    summary = _run(fuzz, federation, tamper, settings, may_end=True)
    fuzz.refused += summary is not None
    if summary is not None:
        for site in federation.sites[:-1]:
            charged = sum(event.count for event in site.runs()[summary["run"]].charged)
            check(2 <= charged <= 3, fuzz, f"{site.name} was charged {charged} releases")


def _run(
    fuzz: Fuzz, federation: Federation, tamper: Any, settings: Mapping[str, Any], *, may_end: bool = False
) -> dict[str, Any] | None:
    fuzz.done.clear()
    fuzz.claimed.clear()
    fuzz.runs += 1
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return federation.run(tamper=tamper, run_id=fuzz.runs, run_name=f"fuzz-{fuzz.runs}", **settings)
    except SystemExit:
        error = federation.status()["error"]
        known = may_end and not error.startswith("the server app failed")
        check(known, fuzz, f"the run ended: {error}\n{said.getvalue()[-3000:]}")
        return None
    finally:
        check("\x1b" not in said.getvalue(), fuzz, "an escape sequence was printed")
        federation.traffic[:] = list[Exchanged]()


def check(holds: bool, fuzz: Fuzz, what: str) -> None:
    """Raise what is needed to see it again, where a property does not hold."""
    if not holds:
        lies = "\n".join(f"  {name} {kind}: {made.what}" for name, kind, made in fuzz.done)
        raise Failure(f"seed {fuzz.seed}, run {fuzz.runs}: {what}\nthe changed replies of this run:\n{lies}")


def fuzz(mutations: int, seed: int, *, tell: bool = False, secagg: bool = True) -> Fuzz:
    """Feed so many changed replies to server apps.

    Raises:
        Failure: a property did not hold; its text has the seed, the run and the changes.
    """
    session, start = Fuzz(seed), time.monotonic()
    before = 0
    while session.mutations < mutations:
        with tempfile.TemporaryDirectory() as home:
            local = Federation.create(Path(home) / "local", len(HONEST), records=30, **POLICY)
            local.sites += [HarnessSite(f"site-{n}", 100 + n, local.home / f"site-{n}") for n in range(3, 3 + LIARS)]
            for number in range(_RUNS_WITH_ONE_FEDERATION):
                run_local(session, local)
                if secagg and number % _SECAGG_EVERY == 0:
                    shared = keyed_federation(Path(home) / f"shared-{number}", 5, records=30)
                    run_secagg(session, shared)
                used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                before = before or used
                check(used - before < MOST_GROWTH_MB, session, f"memory grew by {used - before:.0f} MB")
                if session.mutations >= mutations:
                    break
        if tell:
            rate = session.mutations / (time.monotonic() - start)
            print(f"{session.mutations} changed replies in {session.runs} runs, {rate:.0f} a second", flush=True)
    return session


def main() -> None:
    """The command line: counts by kind, and the seed of what failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    try:
        session = fuzz(chosen.mutations, chosen.seed, tell=True)
    except Failure as failure:
        print(failure)
        sys.exit(1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{session.mutations} changed replies, {session.runs} runs, peak memory {peak:.0f} MB")
    print(f"not used and named: {session.refused}; otherwise borne: {session.mutations - session.refused}")
    for kind, count in sorted(session.counts.items()):
        print(f"  {kind:<22} {count}")


if __name__ == "__main__":
    main()

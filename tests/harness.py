"""A whole federation in this process: the real server app, the real handlers, real ledgers, no network.

A grid in Flower's form hands each message, as the bytes that Flower would send, to the site's own `ClientApp`, and
keeps both directions. A test can drop, repeat or spoil a message, or kill a site or the server at a chosen place.

    federation = Federation.create(tmp_path, num_sites=3)
    summary = federation.run(num_rounds=2)
    federation.traffic          # every message, both ways, in order
    federation.sites[0].ledger()
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app as client_app
from client_app.ledger.ledger import Ledger
from client_app.ledger.runs import Run
from client_app.policy.policy import load_policy
from client_app.policy.template import policy_template
from client_app.release.log import Release, ReleaseLog
from common.names import Task
from common.wire.identity import EncoderIdentity
from embeddings.store.sets import EmbeddingSet, SetMetadata
from embeddings.store.writing import write_store
from server_app.app import app as server_app

CLASSES = ("liver", "lung", "spleen")
DIM = 12
# A federation of a second: every part of the default model at a small size, noise from the operating system.
SMALL: dict[str, str | int | float | bool] = {
    "num-rounds": 2,
    "epsilon": 3.0,
    "delta": 1e-5,
    "sampling-rate": 0.5,
    "encoder-width": 8,
    "prior-width": 4,
    "sleep-steps": 2,
    "synthetic-rows": 60,
    "meta-steps": 2,
    "round-timeout": 5.0,
    "spare-rounds": 1,
}
POLICY: dict[str, Any] = {
    "lifetime_epsilon": 8.0,
    "lifetime_delta": 1e-5,
    "run_epsilon": 3.2,
    "min_noise_multiplier": 0.3,
}
# What Flower tells the server when a node's process died.
UNREACHABLE = 5

Handler = Callable[[], Message]


class Killed(SystemExit):
    """A process that dies here and now: what was on the disk stays, the rest is gone."""


@dataclass(frozen=True)
class Exchanged:
    """One message on the wire: who, which way, its kind, what it held, and its very bytes."""

    site: str
    to_server: bool
    kind: str
    message: Message
    wire: bytes


@dataclass
class HarnessSite:
    """A site's folder, as a hospital has it: policy, ledger, records."""

    name: str
    node: int
    folder: Path

    def ledger(self) -> Ledger:
        """The site's ledger, opened to look at it."""
        policy = load_policy(self.folder / "policy.toml")
        return Ledger.open(policy.ledger_path(self.folder), policy.cohort_id, read_only=True)

    def runs(self) -> dict[str, Run]:
        """What the ledger knows, by run."""
        with self.ledger() as ledger:
            return ledger.runs

    def entries(self) -> int:
        """How many entries the ledger has; 1 when it was just made."""
        with self.ledger() as ledger:
            return ledger.head.seq

    def releases(self) -> tuple[Release, ...]:
        """What the site's own log says has left."""
        return ReleaseLog(self.folder / "releases.jsonl").read()

    def log(self) -> str:
        """The site's own log of errors."""
        path = self.folder / "site.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def set_policy(self, **changes: Any) -> None:
        """Write the site's policy anew."""
        text = policy_template(f"cohort/{self.name}", **{**POLICY, **changes})
        (self.folder / "policy.toml").write_text(text, encoding="utf-8")

    def context(self) -> Context:
        """What Flower hands the app: a fresh one for every message, as for a fresh process."""
        config = {"data-dir": str(self.folder), "site-name": self.name}
        return Context(1, self.node, config, RecordDict(), {})


@dataclass
class InProcessGrid:
    """Flower's grid over handlers in this process.

    `tamper`, where given, stands in for the network and the site's machine: it gets the site, the message and the
    handler, and returns the reply, or None if none ever comes. `absent` are nodes that are not in the federation now.
    """

    sites: Mapping[int, HarnessSite]
    traffic: list[Exchanged]
    tamper: Callable[[HarnessSite, Message, Handler], Message | None] | None = None
    absent: set[int] = field(default_factory=set)
    _replies: dict[str, Message] = field(default_factory=dict)

    def get_node_ids(self) -> list[int]:
        return [node for node in self.sites if node not in self.absent]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identities = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            if message.metadata.dst_node_id in self.absent:  # Flower gives no identity to what it can't deliver
                identities.append("")
                continue
            site = self.sites[message.metadata.dst_node_id]
            arrived = self._carry(site, message, to_server=False)
            reply = self._ask(site, arrived)
            if reply is not None:
                self._replies[message.metadata.message_id] = self._carry(site, reply, to_server=True)
            identities.append(message.metadata.message_id)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(identity) for identity in list(message_ids) if identity in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As Flower's own loop asks: all at once, and what is there by the end of the time."""
        del timeout
        return self.pull_messages([identity for identity in self.push_messages(messages) if identity])

    def _ask(self, site: HarnessSite, message: Message) -> Message | None:
        def handler() -> Message:
            return deliver(site, message)

        try:
            return handler() if self.tamper is None else self.tamper(site, message, handler)
        except Killed:
            return Message(Error(UNREACHABLE, "node went away"), reply_to=message)

    def _carry(self, site: HarnessSite, message: Message, *, to_server: bool) -> Message:
        """Through Flower's own serialisation, so that what is recorded is what would travel."""
        wire = message_to_proto(message).SerializeToString()
        arrived = message_from_proto(MessageProto.FromString(wire))
        self.traffic.append(Exchanged(site.name, to_server, message.metadata.message_type, arrived, wire))
        return arrived


def deliver(site: HarnessSite, message: Message) -> Message:
    """Hand one message to the site's app, as a fresh process would."""
    reply: Message = client_app(message, site.context())
    return reply


@dataclass
class Federation:
    """Sites in folders below one, and the server's runs over them."""

    home: Path
    sites: list[HarnessSite]
    traffic: list[Exchanged] = field(default_factory=list)
    absent: set[int] = field(default_factory=set)
    folder: str = "outputs/run"

    @classmethod
    def create(
        cls,
        home: Path,
        num_sites: int = 3,
        *,
        records: int = 60,
        patients: bool = False,
        sets: Mapping[int, EmbeddingSet] | None = None,
        **policy: Any,
    ) -> Federation:
        """Sites with made-up records, policies and empty ledgers.

        Args:
            home: a new folder for everything.
            num_sites: how many.
            records: records of each.
            patients: whether the files name patients (three records each).
            sets: the records of certain sites, by index, in place of made-up ones.
            policy: lines of every site's policy.
        """
        sites = []
        for index in range(num_sites):
            site = HarnessSite(f"site-{index + 1}", 101 + index, home / f"site-{index + 1}")
            site.folder.mkdir(parents=True)
            site.set_policy(**policy)
            made = make_set(records, seed=index, patients=patients)
            write_store(site.folder / "site.parquet", (sets or {}).get(index, made))
            chosen = load_policy(site.folder / "policy.toml")
            Ledger.create(chosen.ledger_path(site.folder), chosen.cohort_id, chosen.witness_path(site.folder)).close()
            sites.append(site)
        return cls(home, sites)

    def run(
        self,
        *,
        tamper: Callable[[HarnessSite, Message, Handler], Message | None] | None = None,
        run_id: int = 1,
        **settings: str | int | float | bool,
    ) -> dict[str, Any]:
        """Run the server app over the sites, into a folder of its own if no run is to be resumed.

        Args:
            tamper: see `InProcessGrid`.
            run_id: Flower's number of the run.
            settings: run settings that differ from SMALL (`num_rounds=3`).

        Returns:
            summary.json of the run.

        Raises:
            SystemExit: the run failed; `status()` says why. Killed: a test killed the server.
        """
        flat = {**SMALL, "num-sites": len(self.sites), "min-sites": 1}
        if not settings.get("resume") and self.output.exists():
            self.folder = f"outputs/run-{len(list(self.output.parent.iterdir())) + 1}"
        self.folder = str(settings.get("output_dir", self.folder))
        flat |= {name.replace("_", "-"): value for name, value in settings.items()} | {"output-dir": self.folder}
        grid = InProcessGrid({site.node: site for site in self.sites}, self.traffic, tamper, self.absent)
        context = Context(run_id, 1, {}, RecordDict(), flat)
        # what Flower's own starter of the server process sets before it calls the app
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
        with _environment("FEDHYPEVAE_HOME", str(self.home)):
            server_app(grid, context)
        return self.read("summary.json")

    @property
    def output(self) -> Path:
        """Where the server writes."""
        return self.home / self.folder

    def interrupt(self) -> None:
        """Let a completed run be one whose server was killed before it said so."""
        (self.output / "status.json").write_text(json.dumps({**self.status(), "status": "running"}))

    def read(self, name: str) -> dict[str, Any]:
        """One of the run's JSON files."""
        content: dict[str, Any] = json.loads((self.output / name).read_text(encoding="utf-8"))
        return content

    def status(self) -> dict[str, Any]:
        """status.json: `completed`, or `failed` with the line for a person."""
        return self.read("status.json")

    def sent(self, site: str | None = None, kind: str | None = None) -> list[Exchanged]:
        """What left the sites, in order."""
        return [
            seen for seen in self.traffic if seen.to_server and site in (None, seen.site) and kind in (None, seen.kind)
        ]

    def asked(self, kind: str, site: str) -> Message:
        """The last message of a kind that the server sent to a site, to be sent again, changed, or to another site.

        Without the receipt that it brought: no other ledger holds that.
        """
        asked = next(
            seen.message
            for seen in reversed(self.traffic)
            if not seen.to_server and seen.kind == kind and seen.site == site
        )
        brought = asked.content.config_records["words"]
        return changed(asked, **{word: "" for word in ("receipt", "seal") if word in brought})

    def site(self, name: str) -> HarnessSite:
        """A site by name."""
        return next(site for site in self.sites if site.name == name)


def make_set(
    records: int,
    *,
    seed: int = 0,
    dim: int = DIM,
    classes: tuple[str, ...] = CLASSES,
    patients: bool = False,
    spread: float = 0.3,
    task: Task = "multiclass",
) -> EmbeddingSet:
    """Made-up records: a cluster for each class, the same clusters at every site; of findings their sums."""
    centres = np.random.default_rng(5).normal(size=(len(classes), dim))
    rng = np.random.default_rng([11, seed])
    labels = rng.integers(len(classes), size=records)
    if task == "multilabel":
        labels = (rng.random((records, len(classes))) < 0.3).astype(np.int8)
        rows = 0.5 + labels @ centres + spread * rng.normal(size=(records, dim))
        labels[rng.random(labels.shape) < 0.1] = -1
    else:
        rows = centres[labels] + spread * rng.normal(size=(records, dim))
    return EmbeddingSet(
        embeddings=rows.astype(np.float32),
        labels=labels.astype(np.int8 if task == "multilabel" else np.int64),
        metadata=SetMetadata(make_identity(dim, classes), task=task),
        groups=np.arange(records, dtype=np.int64) // 3 if patients else None,
    )


def make_identity(dim: int = DIM, classes: tuple[str, ...] = CLASSES) -> EncoderIdentity:
    """The encoder that made-up records claim to come from."""
    return EncoderIdentity("made-up", "1", dim, "none", "0" * 64, "float32", classes)


def words_of(reply: Message) -> dict[str, Any]:
    """The words of a site's reply."""
    return dict(reply.content.config_records["words"])


def charged_in(reply: Message) -> list[str]:
    """The events that a site says it was charged, one by one, as the ledger has them."""
    return [event for event, times in json.loads(words_of(reply)["charged"]) for _ in range(times)]


def changed(message: Message, context: Mapping[str, Any] | None = None, **words: Any) -> Message:
    """A copy of a server's message with other words, or other parts of its context ("config": {...}, ...)."""
    copy = message_from_proto(message_to_proto(message))
    record = copy.content.config_records["words"]
    if context is not None:
        values = json.loads(str(record["context"]))
        for part, changes in context.items():
            values[part] |= changes
        record["context"] = json.dumps(values)
    for name, value in words.items():
        record[name] = value
    return copy


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

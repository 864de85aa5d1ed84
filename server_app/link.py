"""The run's sites and all that is said to them: messages, answers, who is missing and why, bytes and charges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid

from common.compression import OFF
from common.errors import FederationError
from common.methods.base import Method, RunContext, Shapes, Tensors
from common.secagg.messages import Session
from common.secagg.primitives import digest
from common.secagg.quantise import Quantisation
from common.secagg.release import assumptions_of
from common.transfer import upload_reference
from common.wire import Kind, dump_context
from server_app.charges import Charges
from server_app.checkpoint import Progress
from server_app.downlink import Downlink, Parcel
from server_app.exchange import Check, Outcome, Take, build_messages, exchange
from server_app.receipts import Receipts
from server_app.refusals import Refusals
from server_app.secagg import SecureSum, secure_sum, sender
from server_app.tracking import RunWatch

Words = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Member:
    """A site of this run: its node, its name, its stable index."""

    node: int
    name: str
    index: int


class Link:
    """Speaks with the sites of one run and keeps count.

    Args:
        method: pure functions of the method.
        context: public context of the run.
        members: the sites, by node.
        progress: what was done so far; it goes on here.
        downlink: versions of the parameters.
        watch: tells people who is missing.
        receipts: what sites gave, and get back.
        refusals: is told whose reply broke a rule.
    """

    def __init__(
        self,
        method: Method,
        context: RunContext,
        members: Mapping[int, Member],
        progress: Progress,
        downlink: Downlink,
        watch: RunWatch,
        receipts: Receipts,
        refusals: Refusals,
    ) -> None:
        self.members = dict(members)
        self.progress = progress
        self.downlink = downlink
        self._method, self._context, self._watch, self._refusals = method, context, watch, refusals
        self._charges = Charges.of(method, context)
        self._receipts = receipts
        self._context_text = dump_context(context)
        self._federation = context.config.federation

    def messages(
        self, kind: Kind, nodes: Iterable[int], parcel: Callable[[int], Parcel], group: str, extra: Words
    ) -> list[Message]:
        """One message for each of some sites, with its parcel."""
        parcels = {node: parcel(node) for node in nodes}
        return build_messages(
            kind,
            parcels,
            lambda node: {**self._words(node), **extra, **parcels[node].words},
            lambda node: parcels[node].tensors,
            group,
            self._federation.round_timeout,
        )

    def round_messages(self, nodes: Iterable[int], number: int, *, whole: bool = False) -> list[Message]:
        """The training messages of a round, which counts from 1."""

        def parcel(node: int) -> Parcel:
            return self.downlink.parcel(self.members[node], whole=whole)

        return self.messages("train", nodes, parcel, f"round-{number}", {"round": number - 1})

    def train(self, grid: Grid, messages: list[Message], number: int, check: Check, take: Take) -> Outcome:
        """A round's sums, each taken in as it comes; sites that need the whole parameters get them.

        Raises:
            FederationError: fewer than `min-sites` answered.
        """

        def shapes(node: int) -> Shapes:
            return self._method.shapes_from(self._context, self.members[node].index)

        def reference(node: int) -> Tensors:
            return upload_reference(self._method, self.downlink.tensors(self.members[node].index))

        def send(some: list[Message]) -> Outcome:
            return self._exchange(grid, "train", some, shapes, check, reference, take)

        outcome = send(messages)
        if outcome.stale:
            outcome = outcome.then(send(self.round_messages(sorted(outcome.stale), number, whole=True)))
        for node in outcome.replies:
            self.downlink.took(self.members[node])
        return self._checked(outcome, f"round {number}")

    def ask(
        self,
        grid: Grid,
        kind: Kind,
        tensors: Callable[[int], Tensors],
        shapes: Shapes,
        words: Words | None = None,
        check: Check = lambda _: None,
    ) -> Outcome:
        """One exchange outside the rounds; `tensors` are for the site with an index, `check` as in `exchange`.

        Raises:
            FederationError: fewer than `min-sites` answered.
        """

        def parcel(node: int) -> Parcel:
            return Parcel({}, tensors(self.members[node].index))

        messages = self.messages(kind, self.members, parcel, kind, words or {})
        outcome = self._exchange(grid, kind, messages, lambda _: shapes, check, lambda _: {})
        return self._checked(outcome, kind)

    def secure_sum(self, grid: Grid, what: str, arguments: Quantisation, extra: Words) -> SecureSum:
        """The masked sum of all sites; the round's parameters go with it.

        Args:
            grid: the link to the sites.
            what: `statistics`, or the name of a round.
            arguments: public arguments of the release.
            extra: further words of every message; `round` in a round.

        Raises:
            FederationError: more sites are missing than the run bears.
        """

        def note(kind: Kind, outcome: Outcome) -> None:
            self._count(outcome)
            self._tell(outcome, what, f" after {kind}")
            if kind == "secagg_masked" and parcel is not None:
                for node in outcome.replies:
                    self.downlink.took(self.members[node])

        def session(attempt: str) -> Session:
            public = digest("context", self._context_text)
            return Session(self.progress.run_name, what, attempt, public, assumptions_of(self._context))

        def of_round(node: int, whole: bool) -> Parcel:
            return self.downlink.parcel(self.members[node], whole=whole)

        parcel = of_round if "round" in extra else None
        send = sender(grid, what, self._words, self._federation.round_timeout, note, parcel, self._charges)
        return secure_sum(send, self.members, session, arguments, extra)

    def _words(self, node: int) -> dict[str, str | int | float]:
        """What every message to a site says: the run, the site's place in it, and the last receipt that it gave."""
        run, index = self.progress.run_name, self.members[node].index
        return {"context": self._context_text, "run": run, "index": index, **self._receipts.words(node)}

    def _exchange(
        self,
        grid: Grid,
        kind: Kind,
        messages: list[Message],
        shapes: Callable[[int], Shapes],
        check: Check,
        reference: Callable[[int], Tensors],
        take: Take | None = None,
    ) -> Outcome:
        bits = self._federation.wire_bits if kind in _IN_FEW_BITS else OFF
        timeout = self._federation.round_timeout
        return exchange(grid, kind, messages, timeout, shapes, check, bits, reference, take, self._charges)

    def _checked(self, outcome: Outcome, what: str) -> Outcome:
        """Count an exchange, say who is missing, and see that enough answered."""
        self._count(outcome)
        self._tell(outcome, what)
        if len(outcome.replies) < self._federation.min_sites:
            reasons = "; ".join(f"{self.members[node].name} {why}" for node, why in outcome.missing.items())
            raise FederationError(
                f"{what}: expected at least {self._federation.min_sites} sites, {len(outcome.replies)} answered "
                f"({reasons}); mend the sites, then resume the run"
            )
        return outcome

    def _tell(self, outcome: Outcome, what: str, when: str = "") -> None:
        """Say who is missing, and whose reply broke a rule."""
        for node, why in outcome.missing.items():
            if node in outcome.broke:
                self._refusals.add(self.members[node].name, f"{what}{when}", why)
            else:
                self._watch.say(f"{what}: {self.members[node].name} is missing{when}: {why}")

    def _count(self, outcome: Outcome) -> None:
        """Add an exchange's bytes and the sites' charges to the progress."""
        up, down = dict(self.progress.bytes_up), dict(self.progress.bytes_down)
        charged, receipts = dict(self.progress.charged), dict(self.progress.receipts)
        given: dict[int, tuple[str, str, str]] = {}
        for node, member in self.members.items():
            down[member.name] = down.get(member.name, 0) + outcome.bytes_down.get(node, 0)
            reply = outcome.replies.get(node)
            if reply is not None:
                up[member.name] = up.get(member.name, 0) + reply.num_bytes
                if reply.charged is not None:
                    charged[member.name] = json.dumps([event.to_json() for event in reply.charged])
                    receipt, seal = str(reply.words["receipt"]), str(reply.words["seal"])
                    receipts[member.name] = receipt
                    if receipt and seal:
                        given[node] = member.name, receipt, seal
        self._receipts.note(given)
        self.progress = replace(self.progress, bytes_up=up, bytes_down=down, charged=charged, receipts=receipts)


_IN_FEW_BITS: frozenset[Kind] = frozenset({"statistics", "train", "baseline"})

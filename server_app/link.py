"""The run's sites and all that is said to them: messages, answers, who is missing and why, bytes and charges."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NoReturn

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import FederationError, WireError
from common.methods.base import Method, RunContext, ServerState, Shapes, Tensors
from common.methods.shared_sums import assumptions_of
from common.secagg.messages import Session, asked_digest
from common.secagg.primitives import digest
from common.secagg.quantise import Quantisation
from common.wire.allow_list import Kind, dump_context
from server_app.charges import Charges
from server_app.checkpoint import Progress
from server_app.exchange import Check, Exchange, Fields, Outcome, Take, build_messages, receive
from server_app.faults import Faults
from server_app.members import Member
from server_app.progress import read_events
from server_app.receipts import Receipts
from server_app.refusals import Refusals
from server_app.secagg import SecureSum, secure_sum
from server_app.secagg_attempt import SumLostError
from server_app.tracking import RunWatch


class Link:
    """Speaks with the sites of one run and keeps count.

    Args:
        method: pure functions of the method.
        context: public context of the run.
        members: the sites, by node.
        progress: what was done so far; it goes on here.
        watch: tells people who is missing.
        receipts: what sites gave, and get back.
        refusals: notes whose reply broke a rule.
    """

    def __init__(
        self,
        method: Method,
        context: RunContext,
        members: Mapping[int, Member],
        progress: Progress,
        watch: RunWatch,
        receipts: Receipts,
        refusals: Refusals,
    ) -> None:
        self.members = dict(members)
        self.progress = progress
        self._method, self._context, self._watch, self._refusals = method, context, watch, refusals
        self._charges = Charges.of(method, context)
        self._receipts = receipts
        self._context_text = dump_context(context)
        self._operation = context.config.operation
        dropouts = assumptions_of(context).dropouts if context.config.privacy.trust == "secagg" else 0
        self._faults = Faults(dropouts, self._tell_lie, dict(progress.left_out))

    def training_round(self, state: ServerState, check: Check, take: Take) -> Exchange:
        """The round that comes: to each site the whole parameters that it trains at, from each its sums.

        Args:
            state: the server's.
            check: as in `Exchange`.
            take: takes in each site's sums as they come.
        """

        def params(node: int) -> Tensors:
            return self._method.params_for(self._context, state, self.members[node].index)

        def shapes(node: int) -> Shapes:
            return self._method.shapes_from(self._context, self.members[node].index)

        messages = self._messages("train", params, f"round-{state.round + 1}", {"round": state.round})
        return Exchange("train", messages, shapes, check, take, partial(self._charges_of, "train"))

    def read(self, exchange: Exchange, replies: Iterable[Message], what: str, least: int | None = None) -> Outcome:
        """Read what the sites answered: count it, say who is missing, and see that enough answered.

        Raises:
            FederationError: fewer than `least` answered, by default `min-sites`.
        """
        least = self._operation.min_sites if least is None else least
        outcome = exchange.read(replies)
        self._count(outcome)
        self._tell(outcome, what)
        if len(outcome.replies) < least:
            reasons = "; ".join(f"{self.members[node].name} {why}" for node, why in outcome.missing.items())
            raise FederationError(
                f"{what}: expected at least {least} sites, {len(outcome.replies)} answered "
                f"({reasons}); mend the sites, then resume the run"
            )
        return outcome

    def consent(self, grid: Grid) -> None:
        """Ask every site that is not left out whether it would take part, before any is charged.

        Raises:
            FederationError: so many refuse that fewer than `num-sites` are left, or fewer than `min-sites` answered.
        """
        out = self._faults.left_out(self.members)
        messages = self._messages("consent", lambda _: {}, "consent", {})
        asked = [message for message in messages if message.metadata.dst_node_id not in out]
        # sums go on without those that are out, whatever `min-sites` is
        least = min(self._operation.min_sites, len(asked))
        replies = receive(grid, asked, self._operation.round_timeout)
        outcome = self.read(Exchange("consent", asked), replies, "consent", least)
        sites, left = self._context.config.federation.num_sites, len(asked) - len(outcome.refused)
        if outcome.refused and left < sites:
            why = "; ".join(f"{self.members[node].name} {outcome.missing[node]}" for node in sorted(outcome.refused))
            raise FederationError(
                f"{why}: {left} sites are left of num-sites {sites}, and nobody was charged: mend the site or the "
                "setting and start again, or choose the other sites with --sites"
            )

    def ask(
        self,
        grid: Grid,
        kind: Kind,
        tensors: Callable[[int], Tensors],
        shapes: Shapes,
        fields: Fields | None = None,
        check: Check = lambda _: None,
    ) -> Outcome:
        """One exchange outside the rounds; `tensors` are for the site with an index, `check` as in `Exchange`.

        Raises:
            FederationError: fewer than `min-sites` answered.
        """
        messages = self._messages(kind, lambda node: tensors(self.members[node].index), kind, fields or {})
        exchange = Exchange(kind, messages, lambda _: shapes, check, charges=partial(self._charges_of, kind))
        return self.read(exchange, receive(grid, messages, self._operation.round_timeout), kind)

    def secure_sum(
        self, grid: Grid, what: str, arguments: Quantisation, save: Callable[[], None], state: ServerState | None = None
    ) -> SecureSum:
        """The masked sum of all sites.

        Where an attempt fails because of a site that lies or is in a dispute, another is made without it.

        Args:
            grid: the link to the sites.
            what: `statistics`, or the name of a round.
            arguments: public arguments of the release.
            save: writes the progress down, after an attempt that failed.
            state: in a round, whose number and parameters go with the task; None for statistics.

        Raises:
            FederationError: more sites are missing than the run tolerates, or no spare round is left.
        """
        number: Fields = {} if state is None else {"round": state.round}
        params = {} if state is None else self._method.params_for(self._context, state, 0)
        asked = asked_digest(int(number.get("round", -1)), params)
        public, timeout = digest("context", self._context_text), self._operation.round_timeout

        def send(kind: Kind, fields: Mapping[int, Fields], shapes: Shapes) -> Outcome:
            carried = params if kind == "secagg_masked" else {}
            messages = build_messages(
                kind,
                fields,
                lambda node: {**self._fields(node), **number, **fields[node]},
                lambda _: carried,
                what,
                timeout,
            )
            exchange = Exchange(kind, messages, lambda _: shapes, charges=lambda _: self._charges)
            outcome = exchange.read(receive(grid, messages, timeout))
            self._count(outcome)
            self._tell(outcome, what, f" after {kind}")
            return outcome

        while True:
            self._check_spare(what)
            before = set(self._faults.left_out(self.members))
            attempt = secrets.token_hex(16)
            session = Session(self.progress.run_name, what, attempt, public, assumptions_of(self._context))
            try:
                summed = secure_sum(send, self.members, session, arguments, asked, self._faults)
                self.progress = replace(self.progress, left_out=dict(self._faults.lies))
                return summed
            except SumLostError as error:
                self.progress = replace(self.progress, left_out=dict(self._faults.lies))
                if error.charged:
                    self._note_lost(str(error), in_round=state is not None)
                if set(self._faults.left_out(self.members)) <= before:
                    raise
                save()
                self._watch.say(f"{error}; another attempt begins")

    def refuse_sum(self, what: str, error: WireError) -> NoReturn:
        """Raise FederationError for a sum that no honest sites have; the run can be resumed while rounds are spare."""
        line = f"{what}: a site {error}: nobody knows which; the sum is not used"
        self._note_lost(line, in_round=what != "statistics")
        raise FederationError(line) from None

    def _note_lost(self, reason: str, *, in_round: bool) -> None:
        """Count a sum that sites were charged for in vain; FederationError where no spare round pays for another."""
        self.progress = replace(self.progress, lost_sums=self.progress.lost_sums + 1)
        self._check_spare(reason)
        if not in_round:
            raise FederationError(f"{reason}; the sites pay for one such sum in a run: start a new run")

    def _check_spare(self, what: str) -> None:
        """Refuse to go on where the sites' ledgers would refuse a later round."""
        spare, lost = self._context.plan.spare_rounds, self.progress.lost_sums
        if lost > spare:
            raise FederationError(
                f"{what}: lost sums that sites were charged for: {lost}, spare-rounds pays for {spare}"
                f"{self._faults.summary}: find the cause, then start a new run"
            )

    def _tell_lie(self, name: str, what: str, why: str) -> None:
        self._refusals.add(name, what, f"{why}; it is left out of the rest of the run")

    def _messages(self, kind: Kind, tensors: Callable[[int], Tensors], group: str, fields: Fields) -> list[Message]:
        """One message for each site: its own tensors, the same fields for all."""
        return build_messages(
            kind,
            self.members,
            lambda node: {**self._fields(node), **fields},
            tensors,
            group,
            self._operation.round_timeout,
        )

    def _fields(self, node: int) -> dict[str, str | int | float]:
        """What every message to a site says: the run, the site's place in it, and the last receipt that it gave."""
        run, index = self.progress.run_name, self.members[node].index
        return {"context": self._context_text, "run": run, "index": index, **self._receipts.words(node)}

    def _charges_of(self, kind: Kind, node: int) -> Charges:
        """What a site can have been charged once it has answered a message of this kind."""
        name, plan = self.members[node].name, self._context.plan
        rounds = 1 + sum(name in sites for sites in self.progress.taken_part)
        released = {"statistics": plan.statistics_events, "train": list(plan.round_events) * rounds}
        before = read_events(self.progress.charged.get(name, "[]"))
        return self._charges.at_least(before, released.get(kind, ()))

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

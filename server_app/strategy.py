"""One Strategy for every method: it owns the server's state, and knows no method by name.

The order of a run: sites say hello and are compared; noised statistics, where the method has them; the rounds, with a
checkpoint after each; then the artifact, and, where all data is public, scores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import FederationError, WireError
from common.methods.base import Method, RunContext, ServerState, Shapes, Tensors
from common.secagg.messages import Session
from common.secagg.primitives import digest
from common.secagg.quantise import Quantisation
from common.secagg.release import (
    assumptions_of,
    combined_statistics,
    mean_uploads,
    statistics_arguments,
    training_arguments,
)
from common.statistics import combine_statistics
from common.wire import Kind, check_tensors, dump_context
from server_app.checkpoint import Progress, save_checkpoint, with_round
from server_app.exchange import Outcome, Reply, build_messages, check_norm, exchange
from server_app.progress import Pace, RoundRecord, epsilon_per_site
from server_app.secagg import SecureSum, secure_sum, sender
from server_app.tracking import RunWatch


@dataclass(frozen=True)
class Member:
    """A site of this run: its node, its name, its stable index."""

    node: int
    name: str
    index: int


class FederatedStrategy(Strategy):
    """Runs one method over the sites.

    Args:
        method: pure functions of the method.
        context: public context of the run.
        members: the sites, by node.
        state: the server's state, new or from a checkpoint.
        progress: what was done so far.
        folder: where checkpoints go.
        watch: tells people how far it is.
    """

    def __init__(
        self,
        method: Method,
        context: RunContext,
        members: Mapping[int, Member],
        state: ServerState,
        progress: Progress,
        folder: Path,
        watch: RunWatch,
    ) -> None:
        self.method = method
        self.context = context
        self.members = dict(members)
        self.state = state
        self.progress = progress
        self._folder = folder
        self._watch = watch
        self._started = time.monotonic() - progress.seconds
        self._context_text = dump_context(context)
        self._outcome = Outcome({}, {}, {})

    # Flower's five seams, used by `start` below and usable by Flower's own loop.

    def summary(self) -> None:
        """Print what is about to run."""
        self._watch.say(f"{self.method.name}: {len(self.members)} sites, {self.context.plan.num_rounds} rounds")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One training message a site; round numbers count from 1."""
        del arrays, config, grid
        return self._messages("train", self._params_for, f"round-{server_round}", {"round": server_round - 1})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step the server with the answers of the last exchange; the state itself is `self.state`."""
        del replies
        uploads = {self.members[node].index: reply.tensors for node, reply in self._outcome.replies.items()}
        self.state = self.method.server_step(self.context, self.state, uploads)
        return ArrayRecord(dict(self.state.params)), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No evaluation between rounds: a score is a release."""
        del server_round, arrays, config, grid
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """See `configure_evaluate`."""
        del server_round, replies
        return None

    def run(self, grid: Grid) -> ServerState:
        """Run statistics and all rounds that are left.

        Raises:
            FederationError: fewer than `min-sites` answered; the checkpoint holds what was done.
        """
        self.summary()
        if self.state.round == 0 and self.state.statistics is None:
            self._collect_statistics(grid)
            self._save()
        pace = Pace()
        while self.state.round < self.context.plan.num_rounds:
            number, before = self.state.round + 1, self.progress
            if self._shared:
                self._outcome = self._secure_round(grid, number)
            else:
                messages = list(self.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
                self._exchange(grid, "train", messages, self._shapes_from, f"round {number}", self._largest_norm())
            self.aggregate_train(number, [])
            check_tensors("train", self.state.params, {n: tuple(v.shape) for n, v in self.state.params.items()})
            taken = tuple(sorted(self.members[node].name for node in self._outcome.replies))
            missing = {self.members[node].name: why for node, why in self._outcome.missing.items()}
            record = self._record(number, len(taken), missing, before, pace)
            self.progress = with_round(self.progress, taken, missing, record.history())
            self._save()
            self._watch.round(record, self.progress.seconds)
        return self.state

    def ask(
        self,
        grid: Grid,
        kind: Kind,
        tensors: Tensors,
        shapes: Shapes,
        words: Mapping[str, str | int | float] | None = None,
    ) -> Outcome:
        """One exchange outside the rounds: a baseline or an evaluation."""
        messages = self._messages(kind, lambda _: tensors, kind, words or {})
        return self._exchange(grid, kind, messages, lambda _: shapes, kind)

    def seconds(self) -> float:
        """Time spent on the run so far, earlier processes of a resumed run included."""
        return time.monotonic() - self._started

    def _record(
        self, number: int, answered: int, missing: Mapping[str, str], before: Progress, pace: Pace
    ) -> RoundRecord:
        plan, progress = self.context.plan, self.progress
        return RoundRecord(
            number=number,
            rounds=plan.num_rounds,
            answered=answered,
            sites=len(self.members),
            missing=missing,
            epsilon=epsilon_per_site(progress.charged, plan.delta) if self.method.private else {},
            epsilon_target=self.context.config.privacy.epsilon,
            delta=plan.delta,
            seconds=pace.lap(),
            seconds_left=pace.left(plan.num_rounds - number),
            bytes_up=sum(progress.bytes_up.values()) - sum(before.bytes_up.values()),
            bytes_down=sum(progress.bytes_down.values()) - sum(before.bytes_down.values()),
        )

    def _collect_statistics(self, grid: Grid) -> None:
        spec, noise = self.method.statistics(self.context), self.context.plan.statistics_noise
        if spec is None or noise is None:
            return
        if self._shared:
            summed = self._secure_sum(grid, "statistics", statistics_arguments(self.context, spec), {}, {})
            statistics = combined_statistics(self.context, spec, summed.total, len(summed.nodes))
            self.state = self.method.prepare(self.context, self.state, statistics)
            return
        messages = self._messages("statistics", lambda _: {}, "statistics", {})
        outcome = self._exchange(grid, "statistics", messages, lambda _: spec.shapes, "statistics")
        by_index = {self.members[node].index: reply.tensors for node, reply in outcome.replies.items()}
        statistics = combine_statistics(spec, [by_index[index] for index in sorted(by_index)], noise)
        self.state = self.method.prepare(self.context, self.state, statistics)

    @property
    def _shared(self) -> bool:
        return self.context.config.privacy.trust == "secagg"

    def _secure_round(self, grid: Grid, number: int) -> Outcome:
        """One round's sum, as if each site in it had sent an equal part."""
        arguments = training_arguments(self.context, self.method, self.state.params)
        summed = self._secure_sum(grid, f"round-{number}", arguments, self.state.params, {"round": self.state.round})
        indices = {self.members[node].index: node for node in summed.nodes}
        uploads = mean_uploads(arguments, summed.total, indices)
        replies = {indices[index]: Reply({}, tensors, {}, 0) for index, tensors in uploads.items()}
        try:
            check_norm(uploads[min(uploads)], self._largest_norm())
        except WireError as error:
            raise FederationError(f"round {number}: a site {error}: nobody knows which; the sum is not used") from None
        return Outcome(replies, {n: why for n, why in summed.missing.items() if n not in replies}, {})

    def _secure_sum(
        self,
        grid: Grid,
        what: str,
        arguments: Quantisation,
        tensors: Tensors,
        extra: Mapping[str, str | int | float],
    ) -> SecureSum:
        def note(kind: Kind, outcome: Outcome) -> None:
            self._count(outcome)
            for node, why in outcome.missing.items():
                self._watch.say(f"{what}: {self.members[node].name} is missing after {kind}: {why}")

        def session(attempt: str) -> Session:
            public = digest("context", self._context_text)
            return Session(self.progress.run_name, what, attempt, public, assumptions_of(self.context))

        send = sender(grid, what, self._words, self.context.config.federation.round_timeout, note)
        try:
            return secure_sum(send, self.members, session, arguments, tensors, extra)
        except FederationError:
            self._save()
            raise

    def _params_for(self, node: int) -> Tensors:
        return self.method.params_for(self.context, self.state, self.members[node].index)

    def _shapes_from(self, node: int) -> Shapes:
        return self.method.shapes_from(self.context, self.members[node].index)

    def _messages(
        self, kind: Kind, tensors: Callable[[int], Tensors], group: str, extra: Mapping[str, str | int | float]
    ) -> list[Message]:
        timeout = self.context.config.federation.round_timeout
        return build_messages(kind, self.members, lambda node: {**self._words(node), **extra}, tensors, group, timeout)

    def _words(self, node: int) -> dict[str, str | int | float]:
        """What every message to a site says: the run, and the site's place in it."""
        run, index = self.progress.run_name, self.members[node].index
        return {"context": self._context_text, "run": run, "index": index}

    def _exchange(
        self,
        grid: Grid,
        kind: Kind,
        messages: list[Message],
        shapes: Callable[[int], Shapes],
        what: str,
        largest_norm: float = math.inf,
    ) -> Outcome:
        federation = self.context.config.federation
        outcome = exchange(grid, kind, messages, federation.round_timeout, shapes, largest_norm)
        self._outcome = outcome
        self._count(outcome)
        for node, why in outcome.missing.items():
            self._watch.say(f"{what}: {self.members[node].name} is missing: {why}")
        if len(outcome.replies) < federation.min_sites:
            self._save()
            reasons = "; ".join(f"{self.members[node].name} {why}" for node, why in outcome.missing.items())
            raise FederationError(
                f"{what}: expected at least {federation.min_sites} sites, {len(outcome.replies)} answered ({reasons}); "
                "mend the sites, then resume the run"
            )
        return outcome

    def _largest_norm(self) -> float:
        """A norm that no honest site's sum of one round exceeds, with ten-fold room; infinite where nothing is clipped.

        Each step's sum is at most C times the units of one site, which are fewer than all sites' together; the noise
        has standard deviation sigma C in every coordinate. Terms that read no record are added unclipped: where they
        weigh anything, there is no such norm.
        """
        plan, privacy, training = self.context.plan, self.context.config.privacy, self.context.config.training
        if not self.method.private or not self.method.uploads_sums or plan.training_noise is None:
            return math.inf
        if training.mmd_weight > 0 or training.lipschitz_penalty > 0:
            return math.inf
        statistics = self.state.statistics
        units = self.context.config.federation.public_total if statistics is None else statistics.total
        if not units > 0:
            return math.inf
        size = sum(math.prod(shape) for node in self.members for shape in self._shapes_from(node).values())
        noise = plan.training_noise * math.sqrt(size)
        return 10.0 * plan.steps_per_round * privacy.clip_norm * (units + noise)

    def _count(self, outcome: Outcome) -> None:
        """Add an exchange's bytes and the sites' charges to the progress."""
        up, down = dict(self.progress.bytes_up), dict(self.progress.bytes_down)
        charged, receipts = dict(self.progress.charged), dict(self.progress.receipts)
        for node, member in self.members.items():
            down[member.name] = down.get(member.name, 0) + outcome.bytes_down.get(node, 0)
            reply = outcome.replies.get(node)
            if reply is not None:
                up[member.name] = up.get(member.name, 0) + reply.num_bytes
                if "charged" in reply.words:
                    charged[member.name] = str(reply.words["charged"])
                    receipts[member.name] = str(reply.words.get("receipt", ""))
        self.progress = replace(self.progress, bytes_up=up, bytes_down=down, charged=charged, receipts=receipts)

    def _save(self) -> None:
        self.progress = replace(self.progress, seconds=self.seconds())
        save_checkpoint(self._folder, self.state, self.progress)

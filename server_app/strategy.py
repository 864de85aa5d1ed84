"""One Strategy for every method: it owns the server's state, and knows no method by name.

The order of a run: sites say hello and are compared; noised statistics, where the method has them; the rounds, with a
checkpoint after each; then the artifact, and, where all data is public, scores. What is said to the sites is `link`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.assurance.statement import why_not_private
from common.errors import FederationError, WireError
from common.methods.base import Method, RunContext, ServerState, Shapes, Tensors
from common.methods.shared_sums import (
    mean_statistics,
    mean_uploads,
    shared_statistics_noise,
    statistics_arguments,
    training_arguments,
)
from common.methods.uploads import gather
from common.privacy.robust import settled
from common.privacy.statistics import ReleasedStatistics, StatisticsSpec, combine_statistics
from common.wire.allow_list import Kind, check_tensors
from server_app.bounds import check_norm, largest_norm
from server_app.checkpoint import Progress, save_checkpoint, with_round
from server_app.exchange import Check, Outcome
from server_app.link import Link
from server_app.members import Member
from server_app.progress import Pace, RoundRecord, epsilon_per_site
from server_app.receipts import Receipts
from server_app.refusals import Refusals
from server_app.replies import Reply
from server_app.secagg import SecureSum
from server_app.statistics_bounds import StatisticsBounds
from server_app.tracking import RunWatch


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
        refusals: is told whose reply broke a rule.
        look: (grid, members) -> members of the next round: whoever came meanwhile is among them.
        receipts: what sites gave in earlier runs, and get back.
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
        refusals: Refusals,
        look: Callable[[Grid, Mapping[int, Member]], dict[int, Member]] = lambda _, members: dict(members),
        receipts: Receipts | None = None,
    ) -> None:
        self.method = method
        self.context = context
        self.state = state
        self._folder = folder
        self._watch = watch
        self._look = look
        self._started = time.monotonic() - progress.seconds
        self._refusals = refusals
        given = receipts or Receipts(None)
        self._link = Link(method, context, members, progress, watch, given, refusals)
        self._outcome = Outcome({}, {}, {})
        self._uploads: MutableMapping[int, Tensors] = {}

    @property
    def members(self) -> Mapping[int, Member]:
        """The sites, by node."""
        return self._link.members

    @property
    def progress(self) -> Progress:
        """What was done so far."""
        return self._link.progress

    # Flower's five seams, used by `start` below and usable by Flower's own loop.

    def summary(self) -> None:
        """Print what is about to run."""
        self._watch.say(f"{self.method.name}: {len(self.members)} sites, {self.context.plan.num_rounds} rounds")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One training message a site; round numbers count from 1."""
        del server_round, arrays, config, grid
        return self._link.round_messages(self.state)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step the server with what the last exchange took in; the state itself is `self.state`."""
        del replies
        self.state = self.method.server_step(self.context, self.state, self._uploads)
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
            with self._saved_on_failure():
                self._collect_statistics(grid)
            self._save()
        pace = Pace()
        while self.state.round < self.context.plan.num_rounds:
            number, before = self.state.round + 1, self.progress
            self._welcome(grid)
            with self._saved_on_failure():
                if self._shared:
                    self._outcome = self._secure_round(grid, number)
                else:
                    messages = list(self.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
                    self._uploads = gather(self.method, self.context, self.state)
                    check = partial(check_norm, largest=self._largest_norm())
                    self._outcome = self._link.train(grid, messages, number, check, self._take)
            self.aggregate_train(number, [])
            check_tensors("train", self.state.params, {n: tuple(v.shape) for n, v in self.state.params.items()})
            taken = tuple(sorted(self.members[node].name for node in self._outcome.replies))
            missing = {self.members[node].name: why for node, why in self._outcome.missing.items()}
            record = self._record(number, len(taken), missing, before, pace)
            self._link.progress = with_round(self.progress, taken, missing, record.history())
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
        *,
        personal: bool = False,
        check: Check = lambda _: None,
    ) -> Outcome:
        """One exchange outside the rounds, such as an evaluation; with `personal` each site's own model too."""

        def own(index: int) -> Tensors:
            return {**tensors, **self.method.params_for(self.context, self.state, index)}

        with self._saved_on_failure():
            return self._link.ask(grid, kind, own if personal else lambda _: tensors, shapes, words, check)

    def seconds(self) -> float:
        """Time spent on the run so far, earlier processes of a resumed run included."""
        return time.monotonic() - self._started

    def _welcome(self, grid: Grid) -> None:
        """Let sites in that came since the last round, and remember whose index is whose."""
        self._link.members = self._look(grid, self.members)
        known = {member.name: member.index for member in self.members.values()}
        self._link.progress = replace(self.progress, members={**self.progress.members, **known})

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
            guaranteed=not why_not_private(self.context),
        )

    def _collect_statistics(self, grid: Grid) -> None:
        spec, noise = self.method.statistics(self.context), self.context.plan.statistics_noise
        if spec is None or noise is None:
            return
        if self._shared:
            summed = self._link.secure_sum(grid, "statistics", statistics_arguments(self.context, spec), self._save)
            statistics = self._checked_sum(spec, summed)
        else:
            bounds = StatisticsBounds.of(self.context.config, spec, noise)
            outcome = self._link.ask(grid, "statistics", lambda _: {}, spec.shapes, check=bounds.check)
            by_index = {self.members[node].index: reply.tensors for node, reply in outcome.replies.items()}
            sites = sorted(by_index)
            releases = settled(self.context.config.federation.robust_statistics, [by_index[index] for index in sites])
            statistics = combine_statistics(spec, releases, noise, sites)
        self.state = self.method.prepare(self.context, self.state, statistics)

    def _checked_sum(self, spec: StatisticsSpec, summed: SecureSum) -> ReleasedStatistics:
        """The statistics from a sum of the sites' (FederationError: honest sites have no such sum)."""
        sites, share = len(summed.nodes), shared_statistics_noise(self.context)
        mean = mean_statistics(self.context, spec, summed.total, sites)
        bounds = StatisticsBounds.of(self.context.config, spec, share, sites=sites)
        try:
            bounds.check({name: value * sites for name, value in mean.items()})
        except WireError as error:
            self._link.refuse_sum("statistics", error)
        return combine_statistics(spec, [mean] * sites, share)

    @property
    def _shared(self) -> bool:
        return self.context.config.privacy.trust == "secagg"

    def _secure_round(self, grid: Grid, number: int) -> Outcome:
        """One round's sum, as if each site in it had sent an equal part."""
        arguments = training_arguments(self.context, self.method, self.state.params)
        summed = self._link.secure_sum(grid, f"round-{number}", arguments, self._save, self.state)
        indices = {self.members[node].index: node for node in summed.nodes}
        uploads = mean_uploads(arguments, summed.total, indices)
        replies = {node: Reply({}, {}, {}, 0) for node in indices.values()}
        try:
            check_norm(uploads[min(uploads)], self._largest_norm())
        except WireError as error:
            self._link.refuse_sum(f"round-{number}", error)
        self._uploads = uploads
        return Outcome(replies, {n: why for n, why in summed.missing.items() if n not in replies}, {})

    def _take(self, node: int, tensors: Tensors) -> None:
        self._uploads[self.members[node].index] = tensors

    def _largest_norm(self) -> float:
        indices = [member.index for member in self.members.values()]
        return largest_norm(self.context, self.method, self.state, indices)

    @contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        """Keep what was done when too few sites are left: the run can be resumed."""
        try:
            yield
        except FederationError:
            self._save()
            raise

    def _save(self) -> None:
        self._link.progress = replace(
            self.progress,
            seconds=self.seconds(),
            refused=self._refusals.found,
        )
        save_checkpoint(self._folder, self.state, self.progress)

"""One Strategy for every method: it owns the server's state, and knows no method by name.

The order of a run: sites say hello and are compared; noised statistics, where the method has them; the rounds, with a
checkpoint after each; then the artifact, and, where all data is public, scores. What is said to the sites is `link`'s.

A round under trust local is the two functions of Flower's Strategy, whether `run` calls them or Flower's own loop does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.assurance.statement import why_not_private
from common.errors import ConfigError, FederationError, WireError
from common.methods.base import Method, RunContext, ServerState, Tensors
from common.methods.shared_sums import mean_uploads, training_arguments
from common.methods.uploads import gather
from common.wire.allow_list import check_tensors
from server_app.bounds import check_norm, largest_norm
from server_app.checkpoint import Progress, save_checkpoint, with_round
from server_app.exchange import Exchange, Fields, Outcome, receive
from server_app.link import Link
from server_app.members import Member
from server_app.progress import Pace, RoundRecord, epsilon_per_site
from server_app.receipts import Receipts
from server_app.refusals import Refusals
from server_app.replies import Reply
from server_app.statistics import collect_statistics
from server_app.tracking import RunWatch


@dataclass(frozen=True)
class _Round:
    """A round between its messages and their replies: what was asked, the sums so far, the progress before it."""

    exchange: Exchange
    uploads: MutableMapping[int, Tensors]
    before: Progress


class FederatedStrategy(Strategy):
    """Runs one method over the sites: by `run`, or under trust local by Flower's own `start`.

    Args:
        method: pure functions of the method.
        context: public context of the run.
        members: the sites, by node.
        state: the server's state, new or from a checkpoint.
        progress: what was done so far.
        folder: where checkpoints go.
        watch: tells people how far it is.
        refusals: notes whose reply broke a rule.
        admit: (grid, members) -> members of the next round, sites that came meanwhile among them.
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
        admit: Callable[[Grid, Mapping[int, Member]], dict[int, Member]] = lambda _, members: dict(members),
        receipts: Receipts | None = None,
    ) -> None:
        self.method = method
        self.context = context
        self.state = state
        self._folder = folder
        self._watch = watch
        self._admit = admit
        self._started = time.monotonic() - progress.seconds
        self._refusals = refusals
        given = receipts or Receipts(None)
        self._link = Link(method, context, members, progress, watch, given, refusals)
        self._pace = Pace()
        self._round: _Round | None = None

    @property
    def members(self) -> Mapping[int, Member]:
        """The sites, by node."""
        return self._link.members

    @property
    def progress(self) -> Progress:
        """What was done so far."""
        return self._link.progress

    def summary(self) -> None:
        """Print what is about to run."""
        self._watch.say(f"{self.method.name}: {len(self.members)} sites, {self.context.plan.num_rounds} rounds")

    # A round under trust local, called by `run` below and by Flower's own `Strategy.start`. The state is `self.state`,
    # from a checkpoint perhaps: the arrays and round numbers that Flower hands over are not used.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One training message a site; before the first, the sites' statistics are asked for.

        Returns:
            The messages; none where all planned rounds are done.

        Raises:
            ConfigError: trust is secagg, where a round is five exchanges: use `run`.
            FederationError: fewer than `min-sites` sent statistics; the checkpoint holds what was done.
        """
        del server_round, arrays, config
        if self._shared:
            raise ConfigError("trust secagg needs more than one exchange a round: start the strategy by its own run()")
        self._prepare(grid)
        self._round = None
        if self.state.round >= self.context.plan.num_rounds:
            return []
        self._welcome(grid)
        uploads = gather(self.method, self.context, self.state)

        def take(node: int, tensors: Tensors) -> None:
            uploads[self.members[node].index] = tensors

        check = partial(check_norm, largest=self._largest_norm())
        exchange = self._link.training_round(self.state, check, take)
        self._round = _Round(exchange, uploads, self.progress)
        return exchange.messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies to `configure_train`'s messages, step the server, and write the checkpoint.

        Args:
            server_round: not used.
            replies: as they come. A reply that breaks a rule costs its sender the round and nobody else.

        Returns:
            The parameters after the round; None where no round was asked for.

        Raises:
            FederationError: fewer than `min-sites` answered; the checkpoint holds what was done.
        """
        del server_round
        if self._round is None:
            return None, None
        done, self._round = self._round, None
        with self._saved_on_failure():
            outcome = self._link.read(done.exchange, replies, f"round {self.state.round + 1}")
        self._step(outcome, done.uploads, done.before)
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

        Unlike Flower's own loop it knows secure aggregation, stops when the planned rounds are done, and pulls each
        reply by itself, so that one that Flower can't decode costs its sender alone.

        Raises:
            FederationError: fewer than `min-sites` answered; the checkpoint holds what was done.
        """
        self.summary()
        self._prepare(grid)
        timeout = self.context.config.operation.round_timeout
        while self.state.round < self.context.plan.num_rounds:
            if self._shared:
                self._secure_round(grid)
            else:
                number = self.state.round + 1
                messages = list(self.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
                self.aggregate_train(number, receive(grid, messages, timeout))
        return self.state

    def ask_scores(self, grid: Grid, heads: Tensors, fields: Fields) -> Outcome:
        """Send heads to every site, where the method makes one each site's own model too, and collect its scores."""

        def sent(index: int) -> Tensors:
            if self.method.personal_scores is None:
                return heads
            return {**heads, **self.method.params_for(self.context, self.state, index)}

        with self._saved_on_failure():
            return self._link.ask(grid, "evaluate", sent, {}, fields)

    def seconds(self) -> float:
        """Time spent on the run so far, earlier processes of a resumed run included."""
        return time.monotonic() - self._started

    def _welcome(self, grid: Grid) -> None:
        """Let sites in that came since the last round, and remember whose index is whose."""
        self._link.members = self._admit(grid, self.members)
        known = {member.name: member.index for member in self.members.values()}
        self._link.progress = replace(self.progress, members={**self.progress.members, **known})

    def _record(self, number: int, answered: int, missing: Mapping[str, str], before: Progress) -> RoundRecord:
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
            seconds=self._pace.lap(),
            seconds_left=self._pace.left(plan.num_rounds - number),
            bytes_up=sum(progress.bytes_up.values()) - sum(before.bytes_up.values()),
            bytes_down=sum(progress.bytes_down.values()) - sum(before.bytes_down.values()),
            guaranteed=not why_not_private(self.context),
        )

    def _prepare(self, grid: Grid) -> None:
        """Ask for the one-shot statistics, unless the state has them or is beyond them."""
        if self.state.round > 0 or self.state.statistics is not None:
            return
        with self._saved_on_failure():
            self._link.consent(grid)
            statistics = collect_statistics(grid, self._link, self.method, self.context, self._save)
        if statistics is not None:
            self.state = self.method.prepare(self.context, self.state, statistics)
            self._save()
        self._pace = Pace()  # the time left follows from the rounds alone

    @property
    def _shared(self) -> bool:
        return self.context.config.privacy.trust == "secagg"

    def _secure_round(self, grid: Grid) -> None:
        """One round's sum, as if each site in it had sent an equal part."""
        self._welcome(grid)
        before, name = self.progress, f"round-{self.state.round + 1}"
        arguments = training_arguments(self.context, self.method, self.state.params)
        with self._saved_on_failure():
            summed = self._link.secure_sum(grid, name, arguments, self._save, self.state)
            uploads = mean_uploads(arguments, summed.total, [self.members[node].index for node in summed.nodes])
            try:
                check_norm(uploads[min(uploads)], self._largest_norm())
            except WireError as error:
                self._link.refuse_sum(name, error)
        replies = {node: Reply({}, {}, {}, 0) for node in summed.nodes}
        missing = {node: why for node, why in summed.missing.items() if node not in replies}
        self._step(Outcome(replies, missing, {}), uploads, before)

    def _step(self, outcome: Outcome, uploads: Mapping[int, Tensors], before: Progress) -> None:
        """Step the server with a round's uploads, note who took part, and write the checkpoint."""
        number = self.state.round + 1
        self.state = self.method.server_step(self.context, self.state, uploads)
        check_tensors("train", self.state.params, {n: tuple(v.shape) for n, v in self.state.params.items()})
        taken = tuple(sorted(self.members[node].name for node in outcome.replies))
        missing = {self.members[node].name: why for node, why in outcome.missing.items()}
        record = self._record(number, len(taken), missing, before)
        self._link.progress = with_round(self.progress, taken, missing, record.history())
        self._save()
        self._watch.round(record, self.progress.seconds)

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
        self._link.progress = replace(self.progress, seconds=self.seconds(), refused=self._refusals.found)
        save_checkpoint(self._folder, self.state, self.progress)

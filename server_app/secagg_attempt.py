"""One attempt at a secure sum: its exchanges, who is still there, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.serverapp import Grid

from common.errors import FederationError
from common.methods.base import Shapes, Tensors
from common.secagg.messages import Session
from common.wire.allow_list import Kind
from server_app.charges import NO_CHARGES, Charges
from server_app.downlink import Member, Parcel
from server_app.exchange import Outcome, build_messages, exchange
from server_app.faults import Faults
from server_app.replies import Reply

SiteWords = Mapping[str, str | int | float]
_NOTHING: Tensors = {}
# From here on sites may have been charged: their records are read for the first of these.
_CHARGING: frozenset[Kind] = frozenset({"secagg_masked", "secagg_unmask"})


class Send(Protocol):
    """One exchange with some sites: kind, words of each, allowed tensors of a reply."""

    def __call__(self, kind: Kind, words: Mapping[int, SiteWords], shapes: Shapes) -> Outcome:
        """Send and collect."""
        ...


class SumLostError(FederationError):
    """An attempt at a sum came to nothing. `charged` says whether sites may have been charged for it."""

    def __init__(self, line: str, *, charged: bool) -> None:
        super().__init__(line)
        self.charged = charged


@dataclass
class Attempt:
    """The exchanges of one attempt: who is still there, and why the others are not."""

    send: Send
    members: Mapping[int, Member]
    session: Session
    extra: SiteWords
    faults: Faults
    missing: dict[int, str] = field(default_factory=dict)
    charged: bool = False

    @property
    def nodes(self) -> dict[int, int]:
        """Index -> node."""
        return {member.index: node for node, member in self.members.items()}

    def index(self, node: int) -> int:
        """The run's index of a node."""
        return self.members[node].index

    def ask(self, kind: Kind, words: Mapping[int, SiteWords], shapes: Shapes) -> Mapping[int, Reply]:
        """Replies by node; SumLostError if too few are left."""
        common: dict[str, str | int | float] = {**self.extra}
        common |= {"what": self.session.what, "attempt": self.session.attempt}
        told = {node: {**common, **own} for node, own in words.items()}
        self.charged |= kind in _CHARGING
        outcome = self.send(kind, told, shapes)
        self.missing |= outcome.missing
        self.check(len(outcome.replies), kind)
        return outcome.replies

    def check(self, left: int, kind: Kind) -> None:
        """Refuse to go on with fewer sites than hide and noise each other."""
        assumed = self.session.assumptions
        if left < assumed.threshold:
            reasons = "; ".join(f"{self.members[node].name} {why}" for node, why in sorted(self.missing.items()))
            raise self.lost(
                f"{left} of {assumed.num_sites} sites are left after {kind}, secure aggregation "
                f"bears {assumed.dropouts} missing ({reasons}); nothing was unmasked: mend them, then resume the run"
            )

    def drop(self, node: int, why: str) -> None:
        """Go on without a site."""
        self.missing[node] = why

    def lied(self, node: int, why: str) -> None:
        """Go on without a site, in this sum and in the rest of the run."""
        self.drop(node, why)
        self.faults.lied(self.members[node], self.session.what, why)

    def lost(self, why: str) -> SumLostError:
        """What to raise where this attempt ends."""
        return SumLostError(f"{self.session.what}: {why}", charged=self.charged)


def sender(
    grid: Grid,
    group: str,
    common: Callable[[int], SiteWords],
    timeout: float,
    note: Callable[[Kind, Outcome], None],
    parcel: Callable[[int, bool], Parcel] | None = None,
    charges: Charges = NO_CHARGES,
) -> Send:
    """How `secure_sum` sends: each site's own words and those of the exchange, one timeout for each exchange.

    Args:
        grid: the link to the sites.
        group: name of the round, for Flower.
        common: what every message to a site says.
        timeout: seconds to wait for replies.
        note: told of every exchange.
        parcel: (node, whether the whole) -> the parameters that come with the task; all sites must get the same.
        charges: what a site can have been charged in this run.
    """

    def once(kind: Kind, words: Mapping[int, SiteWords], shapes: Shapes, nodes: Iterable[int], whole: bool) -> Outcome:
        carried = {} if parcel is None or kind != "secagg_masked" else {node: parcel(node, whole) for node in nodes}
        messages = build_messages(
            kind,
            nodes,
            lambda node: {**common(node), **words[node], **(carried[node].words if carried else {})},
            lambda node: carried[node].tensors if carried else _NOTHING,
            group,
            timeout,
        )
        return exchange(grid, kind, messages, timeout, lambda _: shapes, charges=lambda _: charges)

    def send(kind: Kind, words: Mapping[int, SiteWords], shapes: Shapes) -> Outcome:
        outcome = once(kind, words, shapes, list(words), False)
        if outcome.stale:
            outcome = outcome.then(once(kind, words, shapes, sorted(outcome.stale), True))
        note(kind, outcome)
        return outcome

    return send

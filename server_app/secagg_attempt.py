"""One attempt at a secure sum: its exchanges, who is still there, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from common.errors import FederationError
from common.methods.base import Shapes
from common.secagg.messages import Session
from common.wire.allow_list import Kind
from server_app.exchange import Fields, Outcome
from server_app.faults import Faults
from server_app.members import Member
from server_app.replies import Reply

Send = Callable[[Kind, Mapping[int, Fields], Shapes], Outcome]
"""One exchange with some sites: kind, fields of each node's message, allowed tensors of a reply."""
# From here on sites may have been charged: their records are read for the first of these.
_CHARGING: frozenset[Kind] = frozenset({"secagg_masked", "secagg_unmask"})


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

    def ask(self, kind: Kind, fields: Mapping[int, Fields], shapes: Shapes) -> Mapping[int, Reply]:
        """Replies by node; SumLostError if too few are left."""
        common = {"what": self.session.what, "attempt": self.session.attempt}
        self.charged |= kind in _CHARGING
        outcome = self.send(kind, {node: {**common, **own} for node, own in fields.items()}, shapes)
        self.missing |= outcome.missing
        self.check(len(outcome.replies), kind)
        return outcome.replies

    def check(self, left: int, kind: Kind) -> None:
        """Refuse to go on with fewer sites than hide and noise each other."""
        assumed = self.session.assumptions
        if left < assumed.threshold:
            reasons = "; ".join(f"{self.members[node].name} {why}" for node, why in sorted(self.missing.items()))
            raise self.lost(
                f"{left} of {assumed.num_sites} sites are left after {kind}, secure aggregation tolerates "
                f"{assumed.dropouts} missing ({reasons}); nothing was unmasked: mend them, then resume the run"
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

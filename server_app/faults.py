"""The sites that a secure sum does without: those that lied, for the whole run, and those in a dispute.

It is the server's own judgement. The other sites neither see the reasons nor follow them: they check all that reaches
them by themselves, and take part as long as enough sites are left. So a server can always leave out a site that did
nothing wrong, as it can leave a message unsent; it gains nothing by it, and the run's summary names the site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from common.secagg.disputes import Dispute, partners, to_leave_out
from server_app.members import Member


@dataclass
class Faults:
    """Who is left out of a run's secure sums, and why.

    Attributes:
        dropouts: d of the run: so many sites, at most, are assumed to fail or lie.
        tell: called with every lie that is found: site's name, the sum's name, what it did.
        lies: name -> what it did; kept over a resumed run.
        disputes: between indices, of this process alone: where one stands against one, the next start asks both again.
    """

    dropouts: int
    tell: Callable[[str, str, str], None]
    lies: dict[str, str]
    disputes: set[Dispute] = field(default_factory=set)

    @property
    def summary(self) -> str:
        """Who lied, as the end of a line; empty where nobody did."""
        return "".join(f"; {name} {why}" for name, why in self.lies.items())

    def lied(self, member: Member, what: str, why: str) -> None:
        """Leave a site out of the rest of the run."""
        if member.name not in self.lies:
            self.lies[member.name] = why
            self.tell(member.name, what, why)

    def disputed(self, members: Iterable[Member], what: str, disputes: Iterable[Dispute]) -> None:
        """Note what sites refuse of each other. In a dispute with more sites than can all be at fault, a site lies."""
        self.disputes |= set(disputes)
        for member in members:
            against = len(partners(self.disputes, member.index))
            if against > max(self.dropouts, 1):
                self.lied(member, what, f"is in a dispute about cards or sealed shares with {against} sites")

    def left_out(self, members: Mapping[int, Member]) -> dict[int, str]:
        """Node -> why, of those without whom nobody lies and nobody is in a dispute."""
        found = {node: f"is left out: {self.lies[m.name]}" for node, m in members.items() if m.name in self.lies}
        liars = {members[node].index for node in found}
        open_disputes = {pair for pair in self.disputes if not liars & set(pair)}
        names = {member.index: (node, member.name) for node, member in members.items()}
        for index in to_leave_out(open_disputes):
            if index in names:
                others = sorted(names[other][1] for other in partners(open_disputes, index) if other in names)
                found[names[index][0]] = f"is left out: it and {', '.join(others)} refuse what the other sent"
        return found

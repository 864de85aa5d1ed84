"""Sites that come while a run is going, or come back as another node: heard and compared between two rounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from flwr.serverapp import Grid

from common.config.run import RunConfig
from common.errors import FedHypeVAEError, MeetingError
from common.wire.agreement import require_agreement
from common.wire.allow_list import SiteFacts
from server_app.meeting import Meeting, asked_nodes, say_hello
from server_app.members import Member
from server_app.refusals import Refusals

# A round waits no longer than this for a newcomer's hello, and for no newcomer more than so many times.
_PATIENCE_S = 60.0
_TRIES = 2


class Newcomers:
    """Looks, before every round, for nodes that are not members yet.

    A newcomer takes part from that round on: it releases no statistics, and is charged for the rounds it is in. A
    member that comes back under another node (with a new key, say) keeps its index, and so its code and ledger.

    Args:
        config: of the run.
        meeting: the sites that met at the start.
        known: index of every site that ever was in the run, by name.
        is_open: whether sites that were not there before are taken in, see `Method.takes_newcomers`.
        tell: gets a line for each site that comes.
        refusals: notes whose hello broke a rule.
    """

    def __init__(
        self,
        config: RunConfig,
        meeting: Meeting,
        known: Mapping[str, int],
        is_open: bool,
        tell: Callable[[str], None],
        refusals: Refusals,
    ) -> None:
        self.known = {**known, **{member.name: member.index for member in meeting.members.values()}}
        self._config = config
        self._meeting = meeting
        self._is_open = is_open
        self._tell = tell
        self._refusals = refusals
        self._tries: dict[int, int] = {}

    def admit(self, grid: Grid, members: Mapping[int, Member]) -> dict[int, Member]:
        """The members of the next round: the present ones, and new sites that passed the checks."""
        connected = set(grid.get_node_ids())
        new = sorted(
            node for node in set(asked_nodes(grid, self._config)) - set(members) if self._tries.get(node, 0) < _TRIES
        )
        now = dict(members)
        if not new:
            return now
        for node in new:
            self._tries[node] = self._tries.get(node, 0) + 1
        patience = min(self._config.operation.round_timeout, _PATIENCE_S)
        heard = say_hello(grid, self._config, new, patience, self._refusals)
        self._tries |= dict.fromkeys(heard.refused, _TRIES)
        for why in heard.missing.values():
            self._tell(f"a site came, but said no hello: {why}")
        for node, fact in heard.facts.items():
            self._tries[node] = _TRIES  # it has answered: there is nothing more to ask
            try:
                now = self._with(now, node, fact, connected)
            except FedHypeVAEError as error:
                self._tell(f"{fact.site} came and is not taken in: {error}")
        return now

    def _with(
        self, members: Mapping[int, Member], node: int, fact: SiteFacts, connected: Collection[int]
    ) -> dict[int, Member]:
        before = next((old for old, member in members.items() if member.name == fact.site), None)
        if before in connected:
            self._refusals.add(str(node), "hello", f"has the name of {fact.site}, which is connected already")
            raise MeetingError("a site of that name is connected already: give each its own site-name")
        if fact.site not in self.known and not self._is_open:
            raise MeetingError("this run is shared out among the sites that met at its start: it can join the next")
        own_encoders, task = self._config.rivals.own_encoders, self._config.federation.task
        require_agreement({**self._meeting.facts, fact.site: fact}, own_encoders=own_encoders, task=task)
        if not set(fact.identity.class_names) <= set(self._meeting.class_names):
            raise MeetingError("it labels findings that this run does not have: it can join the next")
        if self._meeting.data_is_public and not fact.public:
            raise MeetingError("its data is not public, and this run publishes scores of public data")
        index = self.known.setdefault(fact.site, max(self.known.values(), default=-1) + 1)
        self._tell(f"{fact.site} {'is back' if before is not None else 'came'}: it takes part from the next round on")
        return {**{old: one for old, one in members.items() if old != before}, node: Member(node, fact.site, index)}


def with_known_indices(meeting: Meeting, known: Mapping[str, int], is_open: bool) -> Meeting:
    """The meeting of a resumed run: who was in it before has the index it had; others follow, where the run is open."""
    if not known:
        return meeting
    if not is_open:
        kept = {node: member for node, member in meeting.members.items() if member.name in known}
        meeting = replace(meeting, members=kept)
    order = sorted(meeting.members.values(), key=lambda member: member.index)
    fresh = iter(range(max(known.values()) + 1, max(known.values()) + 1 + len(order)))
    indices = {member.name: known[member.name] if member.name in known else next(fresh) for member in order}
    members = {node: replace(member, index=indices[member.name]) for node, member in meeting.members.items()}
    return replace(meeting, members=members)

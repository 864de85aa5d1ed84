"""What goes down in a round: to each site the change of the version that it holds, or the whole where it holds another.

The server knows which version a site last answered with. It can be wrong (a lost disk, an older copy put back): the
site says then that it is stale, having charged nothing, and gets the whole in the same round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from common.methods.base import Method, RunContext, ServerState, Tensors
from common.wire.allow_list import PACKED
from common.wire.compression import OFF
from common.wire.versions import Held, held_key, next_held


class Member(Protocol):
    """A site as the server met it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def index(self) -> int:
        """Its index in the run."""
        ...


@dataclass(frozen=True)
class Parcel:
    """Parameters for one site, and the words that say of which version."""

    words: Mapping[str, str]
    tensors: Tensors


class Downlink:
    """The versions of a run's parameters, at the server and at its sites.

    Args:
        method: pure functions of the method.
        context: public context of the run.
        held: what the sites hold, by `held_key`; from a checkpoint, or nothing.
        known: site's name -> version that it last answered with.
    """

    def __init__(self, method: Method, context: RunContext, held: Mapping[str, Held], known: Mapping[str, str]) -> None:
        self.held = dict(held)
        self.known = dict(known)
        self._method, self._context = method, context
        self._changes: dict[str, Tensors] = {}

    def advance(self, state: ServerState, indices: Iterable[int]) -> None:
        """Make the versions of the round that comes; nothing changes if it was done for that round already."""
        for index in indices:
            key = held_key(self._method, index)
            before = self.held.get(key)
            held = next_held(self._context, self._method, state, index, before)
            if held is not before:
                self.held[key] = held
                self._changes[key] = {} if held.change is None else {PACKED: held.change}

    def tensors(self, index: int) -> Tensors:
        """What a site trains at in this round."""
        return self.held[held_key(self._method, index)].tensors

    def parcel(self, member: Member, *, whole: bool = False) -> Parcel:
        """What a site gets in this round; equal parcels hold the same mapping, to be packed once."""
        key = held_key(self._method, member.index)
        held = self.held[key]
        if self._context.config.federation.wire_bits == OFF:
            return Parcel({}, held.tensors)
        known = self.known.get(member.name, "")
        if not whole and known == held.version:
            return Parcel({"version": held.version, "base": held.version}, _NOTHING)
        if not whole and held.change is not None and known == held.base:
            return Parcel({"version": held.version, "base": held.base}, self._changes[key])
        return Parcel({"version": held.version, "base": ""}, held.tensors)

    def took(self, member: Member) -> None:
        """Note that a site answered this round, so that it holds its version."""
        self.known[member.name] = self.held[held_key(self._method, member.index)].version


_NOTHING: Tensors = {}

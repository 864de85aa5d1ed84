"""The only way anything about records leaves a site that shares no noise: checked, reserved, computed, kept, committed.

The order is the protection. A request is held against public bounds and the site's policy before any record is read;
room on the disk is taken, and the budget reserved, before the data is opened; a release is committed when its bytes are
on the disk, and then sent. From the first record on nothing can fail for a reason that lies in the records
(`last_resort`). A message that comes twice gets the same bytes twice, and is charged once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from client_app.release.granted import Admission, committed_rounds, granted, locked_run, room_for
from client_app.release.last_resort import from_records
from client_app.state.private_state import PrivateState
from client_app.task import Answer, Work
from common.methods.base import Shapes, Tensors
from common.privacy.events import PrivacyEvent
from common.records import SiteData
from common.wire.allow_list import Kind, check_tensors, num_bytes

_HEADER = 2**16  # bytes of a payload beside its values


@dataclass(frozen=True)
class Computed:
    """What a step makes of the records: noised tensors that may leave, and the private state after it, which stays."""

    tensors: Tensors
    state: Tensors | None = None


@dataclass(frozen=True)
class Step:
    """A step that is ready but for the records: what it needs of the site's disk was read.

    `compute` changes nothing outside what it returns. `state_bytes` is the room that its private state needs, a public
    number.
    """

    compute: Callable[[SiteData], Computed]
    state_bytes: int = 0


Begin = Callable[[PrivateState, frozenset[int]], Step]
"""(private state, rounds whose state counts: those that were committed) -> the step."""


def release(
    admission: Admission, round_key: str, events: tuple[PrivacyEvent, ...], shapes: Shapes, begin: Begin
) -> Answer:
    """Check, reserve, compute, keep, commit, log: the only way anything about records leaves.

    Args:
        admission: the site's task, which the policy let pass.
        round_key: the release's name in ledger and log.
        events: what it is charged.
        shapes: allowed names and shapes of what is computed.
        begin: makes the step, before any charge.

    Returns:
        What leaves. A release that was committed before leaves as the same bytes again.
    """
    place, work = admission.place, admission.work
    with locked_run(admission) as private, granted(admission) as grant:
        digest = grant.rounds[round_key].payload_digest if round_key in grant.rounds else None
        if digest is not None:
            payload = private.load_payload(round_key, digest)
        else:
            step = begin(private, committed_rounds(grant.committed))
            with room_for(place, num_bytes(shapes) + _HEADER + step.state_bytes):
                reservation = grant.reserve(round_key, events)
                payload, state = from_records(place, work, lambda data: packed(step, data, round_key, shapes))
            digest = keep(private, work, round_key, payload, state)
            grant.ledger.commit(reservation, digest)
        grant.log(round_key, events, digest, len(payload))
        private.drop_payloads(round_key)
        words = grant.words()
    return Answer(load_tensors(payload), words)


def packed(step: Step, data: SiteData, round_key: str, shapes: Shapes) -> tuple[bytes, Tensors | None]:
    """What a step makes of the records, as the bytes that leave, and the private state after it."""
    computed = step.compute(data)
    kind: Kind = "statistics" if round_key == "statistics" else "train"
    return payload_of(kind, computed.tensors, shapes), computed.state


def keep(private: PrivateState, work: Work, round_key: str, payload: bytes, state: Tensors | None) -> str:
    """Put state and payload on the disk, and return the payload's digest."""
    if state is not None:
        # under the next round's number: it counts only once this round is committed
        private.save(work.round_index + 1, state)
    return private.save_payload(round_key, payload)


def payload_of(kind: Kind, tensors: Tensors, shapes: Shapes) -> bytes:
    """The bytes of a release, once it has passed the allow-list.

    Args:
        kind: of the message.
        tensors: already noised, float32.
        shapes: allowed names and shapes of them.
    """
    check_tensors(kind, tensors, shapes)
    return save_tensors({name: tensors[name].contiguous() for name in sorted(tensors)})

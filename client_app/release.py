"""The only way anything about records leaves a site that shares no noise: checked, reserved, computed, kept, committed.

The order is the protection. A request is held against the site's own policy before any record is read; the budget is
reserved before the data is opened; a release is committed when its bytes are on the disk, and then sent. A message that
comes twice gets the same bytes twice, and is charged once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from client_app.ledger_runs import events_to_json
from client_app.place import Place
from client_app.private_state import PrivateState
from client_app.receipts import message_ledger, receipt_words
from client_app.release_log import ReleaseLog
from client_app.task import Answer, Work, fingerprint_of, request_of
from common.events import PrivacyEvent
from common.methods.base import Shapes, Tensors
from common.transfer import rounding, to_wire, wire_shapes
from common.wire import Kind, check_tensors, settings_digest, tell_charged

ROUNDINGS: Mapping[Kind, int] = {"statistics": -1, "baseline": -2}


def release(
    place: Place,
    work: Work,
    round_key: str,
    events: tuple[PrivacyEvent, ...],
    shapes: Mapping[str, tuple[int, ...]],
    compute: Callable[[PrivateState, frozenset[int]], Mapping[str, Tensor]],
    reference: Tensors | None = None,
) -> Answer:
    """Check, reserve, compute, keep, commit, log: the only way anything about records leaves.

    Args:
        place: the site.
        work: its task.
        round_key: the release's name in ledger and log.
        events: what it is charged.
        shapes: allowed names and shapes of what is computed.
        compute: (private state, rounds whose state counts: those that were committed) -> noised tensors.
        reference: what they are sent as differences from, where the server has it too.

    Returns:
        What leaves. A release that was committed before leaves as the same bytes again.
    """
    request = request_of(work.context)
    kind: Kind = "statistics" if round_key == "statistics" else "train"
    private, settings = PrivateState(place.folder / "state", work.run_id), settings_digest(work.context)
    log = ReleaseLog(place.folder / "releases.jsonl")
    if not request.protected:
        place.policy.check(request)
        with private.locked():
            private.claim(settings)
            done = (release.round_key for release in log.read() if release.run_id == work.run_id)
            payload = payload_of(work, kind, compute(private, round_numbers(done)), shapes, reference or {})
            log.append(work.run_id, round_key, (), private.save_payload(round_key, payload), len(payload))
            private.drop_payloads(round_key)
        return Answer(load_tensors(payload), {"receipt": "", "seal": "", "charged": "[]"})
    place.policy.check(request, recompute_epsilon=False)  # the cheap rules, before anything is opened
    limits, fingerprint = place.policy.limits, fingerprint_of(place, work)
    with ExitStack() as stack:
        ledger = stack.enter_context(message_ledger(place, work))
        known = ledger.runs.get(work.run_id)
        granted = known is not None and known.limits == limits and tuple(known.declared) == tuple(request.events)
        if not granted:
            place.policy.check(request)
        stack.enter_context(private.locked())
        private.claim(settings)
        ledger.declare_run(
            work.run_id,
            request.events,
            limits,
            fingerprint=fingerprint,
            settings=settings,
            close_idle_after=place.policy.close_idle_runs_after,
        )
        reservation = ledger.reserve(work.run_id, round_key, events, limits=limits, fingerprint=fingerprint)
        if reservation.payload_digest is not None:
            payload, digest = private.load_payload(round_key, reservation.payload_digest), reservation.payload_digest
        else:
            rounds = ledger.runs[work.run_id].rounds.items()
            done = (name for name, known in rounds if known.payload_digest is not None)
            payload = payload_of(work, kind, compute(private, round_numbers(done)), shapes, reference or {})
            digest = private.save_payload(round_key, payload)
            ledger.commit(reservation, digest)
        log.append(work.run_id, round_key, events_to_json(events), digest, len(payload))
        private.drop_payloads(round_key)
        charged = tell_charged(events_to_json(ledger.runs[work.run_id].charged))
        words = {"charged": charged, **receipt_words(place, ledger)}
    return Answer(load_tensors(payload), words)


def payload_of(work: Work, kind: Kind, tensors: Tensors, shapes: Shapes, reference: Tensors) -> bytes:
    """The bytes of a release, once it has passed the allow-list: packed in the run's number of bits.

    Only here does a site round what it sends, and only after the noise (`common.compression` says why it is free).

    Args:
        work: the task.
        kind: of the message.
        tensors: already noised, float32.
        shapes: allowed names and shapes of them.
        reference: what they are sent as differences from.
    """
    check_tensors(kind, tensors, shapes)
    bits, number = work.context.config.federation.wire_bits, ROUNDINGS.get(kind, work.round_index)
    sent = to_wire(tensors, bits, reference, rounding(work.context.config, work.index, number))
    check_tensors(kind, sent, wire_shapes(shapes, bits))
    return save_tensors({name: sent[name].contiguous() for name in sorted(sent)})


def round_numbers(round_keys: Iterable[str]) -> frozenset[int]:
    """Numbers, from 1, of the rounds among these keys; the state a round leaves bears its number."""
    return frozenset(int(key.split("-")[1]) for key in round_keys if key.startswith("round-"))

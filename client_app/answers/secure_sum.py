"""A site's five answers under `trust = "secagg"`: keys, shares, check, masked sum, unmasking (`common.secagg.site`).

The order is the protection, as in `release.release`. Policy first, in every message; what other sites sent is all
checked before the ledger reserves. It reserves before the records are read, when the masked vector is made; it commits,
and the site's log notes the release, when the site helps to unmask a sum that its vector is in: only then is anything
about records out of its hands. A vector that was masked and never unmasked stays charged. Nothing is answered twice,
and nothing is repeated: another attempt at a round draws new noise and is charged as another release.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from client_app.answers.peers import own_signer, pinned_peers
from client_app.answers.training import site_state, state_bytes
from client_app.ledger.charge import Reservation
from client_app.ledger.receipts import message_ledger
from client_app.local_step import check_device, client_step
from client_app.place import Place
from client_app.release.granted import Admission, Grant, admit, committed_rounds, granted, locked_run, room_for
from client_app.release.last_resort import from_records
from client_app.site_log import write_log
from client_app.state.private_state import PrivateState
from client_app.state.secure_sum import Attempt, AttemptFile
from client_app.task import Answer, Work, check_round
from common.errors import BlameError, PolicyRefusal, ProtocolError
from common.methods import get_method
from common.methods.base import StepInput, Tensors
from common.methods.shared_sums import (
    assumptions_of,
    check_shares_noise,
    statistics_arguments,
    statistics_vector,
    training_arguments,
)
from common.methods.site_release import noise_source
from common.privacy.events import PrivacyEvent
from common.records import SiteData
from common.secagg import site
from common.secagg.messages import (
    Card,
    Session,
    asked_digest,
    cards_from_json,
    indices_to_json,
    table_from_json,
    table_to_json,
)
from common.secagg.primitives import digest
from common.secagg.quantise import Words, encode, pack
from common.wire.allow_list import MASKED, check_tensors
from common.wire.received import check_received

STATISTICS = "statistics"
_Step = Callable[[SiteData], tuple[Words, Tensors | None]]


@dataclass(frozen=True)
class _Task:
    """What one message is about, once policy and plan allow it."""

    session: Session
    admission: Admission
    round_key: str
    events: tuple[PrivacyEvent, ...]
    private: PrivateState
    file: AttemptFile


def answer_keys(place: Place, work: Work) -> Answer:
    """Fresh public keys for one attempt, signed with the site's registered key."""
    # an old ledger is found here, before any site of the sum is charged
    with _task(place, work) as task, message_ledger(place, work):
        if not task.file.is_new(task.session.binding):
            raise ProtocolError("this attempt was begun before: a new one needs a new name")
        task.file.erase()
        own, card = site.make_keys(task.session, work.index, place.name, own_signer(place))
        secrets = (own.box_key.hex(), own.mask_key.hex(), own.seed.hex())
        text = json.dumps(asdict(card))
        task.file.save(Attempt(task.session.binding, "keys", secrets, text))
    return Answer({}, {"card": text})


def answer_shares(place: Place, work: Work) -> Answer:
    """Check the list of cards against the pinned keys; seal shares of this site's secrets for the others."""
    with _task(place, work) as task:
        attempt = task.file.load(task.session.binding, "keys")
        text = str(work.words["cards"])
        cards = cards_from_json(text, task.session.assumptions.num_sites)
        try:
            site.check_cards(task.session, cards, Card(**json.loads(attempt.own_card)), pinned_peers(place))
        except BlameError as error:
            return _refusal(place, task, cards, error)
        own, boxes, commitments = site.make_shares(task.session, _secrets(attempt), work.index, cards)
        shares = table_to_json({work.index: own})
        task.file.save(replace(attempt, phase="shares", cards=text, shares=shares))
    return Answer({}, {"boxes": table_to_json(boxes), "commitments": table_to_json(commitments)})


def answer_check(place: Place, work: Work) -> Answer:
    """Open the others' shares and hold them against what was committed to, before anything is charged."""
    with _task(place, work) as task:
        attempt = task.file.load(task.session.binding, "shares")
        sites = task.session.assumptions.num_sites
        cards, kept = _cards(task.session, attempt), table_from_json(attempt.shares, sites)
        boxes, bound = (table_from_json(str(work.words[word]), sites) for word in ("boxes", "commitments"))
        try:
            opened = site.open_shares(task.session, _secrets(attempt), work.index, cards, boxes, bound)
        except BlameError as error:
            return _refusal(place, task, cards, error)
        task.file.save(replace(attempt, phase="checked", shares=table_to_json({**opened, **kept})))
    return Answer({}, {"refused": indices_to_json([])})


def answer_masked(place: Place, work: Work) -> Answer:
    """The site's noised sum under its masks: charged before the records are read."""
    with _task(place, work) as task:
        attempt = task.file.load(task.session.binding, "checked")
        session, cards, signer = task.session, _cards(task.session, attempt), own_signer(place)
        senders = table_from_json(attempt.shares, session.assumptions.num_sites)
        if task.round_key != STATISTICS:
            check_received(work.context, get_method(work.context.config.method), work.index, work.tensors)
        # answered from here on, whatever happens: a second vector under the same masks would give away the difference
        attempt = replace(attempt, phase="masked", asked=asked_digest(work.round_index, work.tensors))
        task.file.save(attempt)
        with granted(task.admission) as grant:
            key, (step, size, bits) = _fresh_key(grant.committed, task.round_key), _begin(place, work, task, grant)
            with room_for(place, size):
                reservation = grant.reserve(key, task.events)
                values, state = from_records(place, work, step)
            if state is not None:
                # under the next round's number: it counts only once this round is committed
                task.private.save(work.round_index + 1, state)
            masked = site.mask(session, _secrets(attempt), work.index, cards, senders, values, bits)
            payload = pack(masked, bits)
            tensor = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
            check_tensors("secagg_masked", {MASKED: tensor}, {MASKED: (tensor.numel(),)})
            words = grant.words()
        task.file.save(
            replace(
                attempt,
                round_key=key,
                reservation=reservation.entry,
                attempt=reservation.attempt,
                payload_digest=hashlib.sha256(payload).hexdigest(),
                payload_bytes=len(payload),
            )
        )
        signature = site.sign_masked(session, cards, senders, attempt.asked, signer)
    return Answer({MASKED: tensor}, {"signature": signature.hex(), **words})


def answer_unmask(place: Place, work: Work) -> Answer:
    """One share of a secret of each site: the release itself, committed to the ledger before it is sent."""
    with _task(place, work) as task:
        attempt = task.file.load(task.session.binding, "masked")
        session, cards = task.session, _cards(task.session, attempt)
        shares = table_from_json(attempt.shares, session.assumptions.num_sites)
        survivors = table_from_json(str(work.words["survivors"]), session.assumptions.num_sites)
        if not attempt.payload_digest:
            raise ProtocolError("this site sent no masked vector in this attempt")
        site.check_survivors(session, work.index, cards, shares, attempt.asked, survivors)
        with granted(task.admission) as grant:
            held = Reservation(work.run_id, attempt.round_key, attempt.reservation, attempt.attempt)
            grant.ledger.commit(held, attempt.payload_digest)
            grant.log(attempt.round_key, task.events, attempt.payload_digest, attempt.payload_bytes)
            words = grant.words()
        given = site.reveal(shares, survivors)
        task.file.erase()  # before the answer leaves: nothing is revealed twice
    return Answer({}, {"shares": table_to_json(given), **words})


@contextmanager
def _task(place: Place, work: Work) -> Iterator[_Task]:
    """The message's task under the run's lock, if the site's policy allows it; no record is read."""
    context, what = work.context, str(work.words["what"])
    if context.config.privacy.trust != "secagg":
        raise PolicyRefusal("request", "the run's trust is not secagg; nothing was charged")
    check_shares_noise(get_method(context.config.method), context)
    if what == STATISTICS:
        events = context.plan.statistics_events
    else:
        check_round(work)
        if what != f"round-{work.round_index + 1}":
            raise PolicyRefusal("request", "the round's name is not that of its number; nothing was charged")
        events = context.plan.round_events
    if not events or not 0 <= work.index < context.problem.num_sites:
        raise PolicyRefusal("request", "there is nothing to sum, or no such index; nothing was charged")
    admission = admit(place, work)
    text = str(work.words["attempt"])
    if re.fullmatch("[0-9a-f]{32}", text) is None:
        raise ProtocolError("an attempt is named by 32 hexadecimal digits")
    public = digest("context", str(work.words["context"]))
    session = Session(work.run_id, what, text, public, assumptions_of(context))
    with locked_run(admission) as private:
        yield _Task(session, admission, what, events, private, AttemptFile(private))


def _begin(place: Place, work: Work, task: _Task, grant: Grant) -> tuple[_Step, int, int]:
    """The step that is ready but for the records, the room that its private state needs, and the modulus's bits.

    The step makes the site's sum as integers with its share of the noise, and the private state after it. What it needs
    of the disk is read here, and what can't be summed is refused, before any charge.
    """
    context, method = work.context, get_method(work.context.config.method)
    if task.round_key == STATISTICS:
        spec = method.statistics(context)
        if spec is None:
            raise PolicyRefusal("request", "the method has no statistics to release")

        def vector(data: SiteData) -> tuple[Words, None]:
            return statistics_vector(context, spec, data, noise_source(context.config, work.index, -1)), None

        return vector, 0, statistics_arguments(context, spec).bits
    arguments = training_arguments(context, method, work.tensors)
    before = site_state(task.private, work, committed_rounds(grant.committed))
    check_device(place, context)

    def sums(data: SiteData) -> tuple[Words, Tensors]:
        source = noise_source(context.config, work.index, work.round_index)
        step = StepInput(work.tensors, before, data, work.round_index, work.index, source, noised_later=True)
        after, summed = client_step(place, method, context, step)
        return encode(arguments, summed, source), after.tensors

    return sums, state_bytes(work, before), arguments.bits


def _fresh_key(committed: Collection[str], round_key: str) -> str:
    """The ledger's name of this round: another one where a sum of it was released already, and is asked for again."""
    name, number = round_key, 0
    while name in committed:
        number += 1
        name = f"{round_key}-again-{number}"
    return name


def _refusal(place: Place, task: _Task, cards: Sequence[Card], error: BlameError) -> Answer:
    """Name the sites whose cards or boxes can't be used; the attempt is over for this site, nothing was charged."""
    task.file.erase()
    why = "; ".join(f"{card.name}: {error.blamed[card.index]}" for card in cards if card.index in error.blamed)
    write_log(place.folder, f"{task.session.what}: refused what came from {why}; nothing was charged")
    return Answer({}, {"refused": indices_to_json(error.blamed)})


def _secrets(attempt: Attempt) -> site.Secrets:
    return site.Secrets(*(bytes.fromhex(secret) for secret in attempt.secrets))


def _cards(session: Session, attempt: Attempt) -> tuple[Card, ...]:
    return cards_from_json(attempt.cards, session.assumptions.num_sites)

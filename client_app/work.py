"""What a site does with a message: policy first, then the ledger, then the data, then the release.

The order is the protection. A request is held against the site's own policy before any record is read; the budget is
reserved before the data is opened; a release is committed when its bytes are on the disk, and then sent. A message that
comes twice gets the same bytes twice, and is charged once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from client_app.data import check_identity, check_matches, load_records, split_data
from client_app.ledger import Ledger
from client_app.ledger_runs import events_to_json
from client_app.place import Place
from client_app.private_state import PrivateState
from client_app.release_log import ReleaseLog
from client_app.request import RunRequest, short
from common.classifier import LinearHead, fit_linear_head, score, score_site
from common.errors import DataError, PolicyRefusal
from common.events import PrivacyEvent
from common.loop import noise_source, site_statistics
from common.methods import get_method
from common.methods.base import RunContext, SiteState, StepInput
from common.sampling import SiteData, on_sphere
from common.secagg.assumptions import charged_events
from common.secagg.release import assumptions_of
from common.statistics import class_means_spec
from common.wire import SCORE_NAMES, Kind, check_tensors, settings_digest
from embeddings.sets import SPLIT_NAMES, EmbeddingSet


@dataclass(frozen=True)
class Work:
    """One message's task, once it is read.

    Attributes:
        context: public context of the run.
        run_id: lasting name of the run.
        index: the site's index in the run.
        round_index: 0, 1, ...; -1 outside the rounds.
        tensors: what the server sent.
        words: further words of the message.
    """

    context: RunContext
    run_id: str
    index: int
    round_index: int
    tensors: Mapping[str, Tensor]
    words: Mapping[str, str | int | float]


@dataclass(frozen=True)
class Answer:
    """What goes back, all of it on the allow-list."""

    tensors: Mapping[str, Tensor]
    words: Mapping[str, str]


def request_of(context: RunContext, *, wants_metrics: bool = False, least_colluders: int = 0) -> RunRequest:
    """What the run asks of a site, as its policy reads it.

    Args:
        context: the run.
        wants_metrics: whether scores shall travel.
        least_colluders: how many colluders the policy assumes under secure aggregation; the events are those to be
            charged then.

    Raises:
        PolicyRefusal: the plan to be charged is not the one that the settings carry out.
    """
    config, plan, privacy = context.config, context.plan, context.config.privacy
    method = get_method(config.method)
    if method.private:
        # a method without training plans no round; rounds beyond the plan are refused where they are asked for
        rounds, spare = (config.training.num_rounds, privacy.spare_rounds) if plan.num_rounds else (0, 0)
        told = (plan.sampling_rate, plan.steps_per_round, plan.num_rounds, plan.spare_rounds, plan.delta)
        done = (privacy.sampling_rate, config.training.local_steps, rounds, spare, privacy.delta)
        if told != done or not all(isinstance(number, int) for number in told[1:4]):
            line = f"the plan to be charged is {short(told)}, the settings carry out {done}"
            raise PolicyRefusal("request", f"{line}; nothing was charged")
    events = charged_under(context, plan.all_events, least_colluders)
    return RunRequest(
        method=config.method,
        epsilon=privacy.epsilon if method.private else float("inf"),
        delta=privacy.delta,
        unit=privacy.unit,
        clip_norm=privacy.clip_norm,
        noise_multipliers=tuple(event.noise_multiplier for event in events),
        sampling_rate=privacy.sampling_rate,
        num_steps=(plan.num_rounds + plan.spare_rounds) * plan.steps_per_round,
        encoder_training=privacy.encoder_training,
        events=events,
        max_records_per_patient=privacy.records_per_unit,
        noise=privacy.noise,
        wants_metrics=wants_metrics,
        trust=privacy.trust,
        announced=plan.all_events,
    )


def charged_under(
    context: RunContext, events: tuple[PrivacyEvent, ...], least_colluders: int
) -> tuple[PrivacyEvent, ...]:
    """The events that the ledger is charged: the run's, or worse ones where a policy fears more colluders than it."""
    if context.config.privacy.trust == "local":
        return events
    return charged_events(events, assumptions_of(context), least_colluders)


def check_round(work: Work) -> None:
    """Refuse a round that the run's plan does not have."""
    if not 0 <= work.round_index < work.context.plan.num_rounds:
        raise PolicyRefusal(
            "request",
            f"the run has {work.context.plan.num_rounds} rounds, the server asks for number {work.round_index + 1}; "
            "nothing was charged",
        )


def _check_local(context: RunContext) -> None:
    """Refuse to send a whole noised vector where the run says that its noise is shared."""
    if context.config.privacy.trust != "local":
        raise PolicyRefusal("request", "under trust secagg nothing leaves but masked vectors; nothing was charged")


def answer_statistics(place: Place, work: Work) -> Answer:
    """The one-shot noised statistics: one Gaussian event, charged before the records are read."""
    context = work.context
    _check_local(context)
    spec = get_method(context.config.method).statistics(context)
    if spec is None:
        raise PolicyRefusal("request", "the method has no statistics to release; nothing was charged")

    def release(_: PrivateState, __: frozenset[int]) -> dict[str, Tensor]:
        data = training_data(place, work)
        source = noise_source(context.config, work.index, -1)
        return site_statistics(context, spec, context.plan.statistics_noise or 0.0, data, source)

    return _release(place, work, "statistics", context.plan.statistics_events, spec.shapes, release)


def answer_train(place: Place, work: Work) -> Answer:
    """One round of training; the new code and encoder stay on the site's disk."""
    context, method = work.context, get_method(work.context.config.method)
    _check_local(context)
    check_round(work)

    def release(private: PrivateState, committed: frozenset[int]) -> dict[str, Tensor]:
        private.keep_states(committed)
        site = site_state(private, work)
        source = noise_source(context.config, work.index, work.round_index)
        step = StepInput(work.tensors, site, training_data(place, work), work.round_index, work.index, source)
        after, uploads = method.client_step(context, step)
        # saved under the next round's number: it counts only once this round is committed
        private.save(work.round_index + 1, after.tensors)
        return uploads

    return _release(
        place,
        work,
        f"round-{work.round_index + 1}",
        context.plan.round_events,
        method.shapes_from(context, work.index),
        release,
    )


def answer_baseline(place: Place, work: Work) -> Answer:
    """Noised class means at the whole budget, for comparison: only where the policy declares the data public."""
    _check_public(place, work)
    context, training = work.context, work.context.config.training
    radius = 1.0 if training.sphere else training.embedding_radius
    spec = class_means_spec(context.problem.dim, context.problem.num_classes, radius)
    source = noise_source(context.config, work.index, -2)
    noise = float(work.words["noise_multiplier"])
    released = site_statistics(context, spec, noise, training_data(place, work), source)
    payload = _payload("baseline", released, spec.shapes)
    _log_public(place, work, "baseline", payload)
    return Answer(load_tensors(payload), {})


def answer_evaluate(place: Place, work: Work) -> dict[str, float]:
    """Scores on the site's own test split: only where the policy declares the data public and lets metrics leave."""
    _check_public(place, work)
    records = load_records(place.records, place.cache_dir)
    check_matches(records, work.context)
    train, validation, test = (_scored_split(records, name, work.context) for name in SPLIT_NAMES)
    heads = {
        name: LinearHead(work.tensors[f"{name}.weight"], work.tensors[f"{name}.bias"])
        for name in ("synthetic", "statistics")
        if f"{name}.weight" in work.tensors
    }
    local = fit_linear_head(*train, num_classes=work.context.problem.num_classes)
    found = {"local_only": score(local, *test)}
    if "synthetic" in heads:
        mixing = float(work.words["mixing"])
        found = score_site(train, validation, test, heads["synthetic"], mixing=mixing, local_head=local)
    if "statistics" in heads:
        found["statistics_only"] = score(heads["statistics"], *test)
    scores: dict[str, float] = {}
    for name in (name for name in SCORE_NAMES if name in found):
        value = found[name]
        scores[f"{name}.accuracy"] = value.accuracy
        scores[f"{name}.balanced_accuracy"] = value.balanced_accuracy
    _log_public(place, work, "evaluate", json.dumps(scores, sort_keys=True).encode())
    return scores


def _release(
    place: Place,
    work: Work,
    round_key: str,
    events: tuple[PrivacyEvent, ...],
    shapes: Mapping[str, tuple[int, ...]],
    compute: Callable[[PrivateState, frozenset[int]], Mapping[str, Tensor]],
) -> Answer:
    """Check, reserve, compute, keep, commit, log: the only way anything about records leaves.

    `compute` gets the private state and the rounds whose state counts: those that were committed.
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
            payload = _payload(kind, compute(private, round_numbers(done)), shapes)
            log.append(work.run_id, round_key, (), private.save_payload(round_key, payload), len(payload))
            private.drop_payloads(round_key)
        return Answer(load_tensors(payload), {"receipt": "", "charged": "[]"})
    place.policy.check(request, recompute_epsilon=False)  # the cheap rules, before anything is opened
    limits, fingerprint = place.policy.limits, fingerprint_of(place, work.context)
    with ExitStack() as stack:
        ledger = stack.enter_context(
            Ledger.open(
                place.policy.ledger_path(place.folder),
                place.policy.cohort_id,
                place.policy.witness_path(place.folder),
                create=place.new_ledger,
            )
        )
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
            close_idle_after=place.policy.close_idle_runs_after,
        )
        reservation = ledger.reserve(work.run_id, round_key, events, limits=limits, fingerprint=fingerprint)
        if reservation.payload_digest is not None:
            payload, digest = private.load_payload(round_key, reservation.payload_digest), reservation.payload_digest
        else:
            rounds = ledger.runs[work.run_id].rounds.items()
            done = (name for name, known in rounds if known.payload_digest is not None)
            payload = _payload(kind, compute(private, round_numbers(done)), shapes)
            digest = private.save_payload(round_key, payload)
            ledger.commit(reservation, digest)
        log.append(work.run_id, round_key, events_to_json(events), digest, len(payload))
        private.drop_payloads(round_key)
        charged = json.dumps(events_to_json(ledger.runs[work.run_id].charged))
        receipt = str(ledger.head)
    return Answer(load_tensors(payload), {"receipt": receipt, "charged": charged})


def _payload(kind: Kind, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The bytes of a release, once it has passed the allow-list."""
    check_tensors(kind, tensors, shapes)
    return save_tensors({name: tensors[name].contiguous() for name in sorted(tensors)})


def round_numbers(round_keys: Iterable[str]) -> frozenset[int]:
    """Numbers, from 1, of the rounds among these keys; the state a round leaves bears its number."""
    return frozenset(int(key.split("-")[1]) for key in round_keys if key.startswith("round-"))


def site_state(private: PrivateState, work: Work) -> SiteState:
    """The private state before this round: the newest that an earlier committed round left, or a fresh one."""
    earlier = [index for index in private.rounds() if index <= work.round_index]
    if not earlier:
        return get_method(work.context.config.method).init_site(work.context, work.index)
    saved = private.load(max(earlier))
    return SiteState({name: torch.from_numpy(value.copy()) for name, value in saved.tensors.items()})


def training_data(place: Place, work: Work) -> SiteData:
    records = load_records(place.records, place.cache_dir)
    check_matches(records, work.context)
    return split_data(records, "train", work.context.config.privacy.unit)


def _scored_split(records: EmbeddingSet, name: str, context: RunContext) -> tuple[Tensor, Tensor]:
    """One split as heads see it: on the unit sphere where the generator's embeddings are."""
    data = split_data(records, name, "record")
    return on_sphere(data.embeddings) if context.config.training.sphere else data.embeddings, data.labels


def _check_public(place: Place, work: Work) -> None:
    place.policy.check(request_of(work.context, wants_metrics=True), recompute_epsilon=False)
    if not (place.policy.data_is_public and place.policy.metrics_may_leave):
        raise PolicyRefusal("metrics_may_leave", "scores may not leave this site; nothing was charged")


def _log_public(place: Place, work: Work, what: str, payload: bytes) -> None:
    """Note in the site's log that something left without charge: only where its data is public."""
    digest = hashlib.sha256(payload).hexdigest()
    ReleaseLog(place.folder / "releases.jsonl").append(work.run_id, what, (), digest, len(payload))


def fingerprint_of(place: Place, context: RunContext) -> str:
    """Digest of the data set as its file states it, for the ledger; no record is read.

    Raises:
        DataError: the file is missing, or holds another width or class set than the run is about: nothing was charged.
    """
    from embeddings.store import read_metadata

    if not isinstance(place.records, Path):
        return f"demo/{place.records}"
    if not place.records.is_file():
        raise DataError(f"no embeddings at {place.records}: make them with `fedhypevae embed`")
    metadata = read_metadata(place.records)
    check_identity(metadata.identity.dimension, metadata.class_names, context)
    return metadata.fingerprint

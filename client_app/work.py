"""What a site does with a message: policy first, then the ledger, then the data, then the release.

The order is the protection. A request is held against the site's own policy before any record is read; the budget is
reserved before the data is opened; a release is committed when its bytes are on the disk, and then sent. A message that
comes twice gets the same bytes twice, and is charged once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from client_app.data import check_matches, load_records, split_data
from client_app.ledger import Ledger
from client_app.ledger_runs import events_to_json
from client_app.place import Place
from client_app.private_state import PrivateState
from client_app.release_log import ReleaseLog
from client_app.request import RunRequest
from common.classifier import LinearHead, score, score_site
from common.errors import DataError, PolicyRefusal
from common.events import PrivacyEvent
from common.loop import noise_source, site_statistics
from common.methods import get_method
from common.methods.base import RunContext, SiteState, StepInput
from common.sampling import SiteData, on_sphere
from common.statistics import class_means_spec
from common.wire import Kind, check_tensors
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


def request_of(context: RunContext, *, wants_metrics: bool = False) -> RunRequest:
    """What the run asks of a site, as its policy reads it.

    Raises:
        PolicyRefusal: the plan to be charged is not the one that the settings carry out.
    """
    config, plan, privacy = context.config, context.plan, context.config.privacy
    method = get_method(config.method)
    told = (plan.sampling_rate, plan.steps_per_round, plan.num_rounds, plan.delta)
    done = (privacy.sampling_rate, config.training.local_steps, config.training.num_rounds, privacy.delta)
    if told != done:
        raise PolicyRefusal(
            "request", f"the plan to be charged is {told}, the settings carry out {done}; nothing charged"
        )
    events = plan.all_events
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
    )


def answer_statistics(place: Place, work: Work) -> Answer:
    """The one-shot noised statistics: one Gaussian event, charged before the records are read."""
    context = work.context
    spec = get_method(context.config.method).statistics(context)
    if spec is None:
        raise PolicyRefusal("request", "the method has no statistics to release; nothing was charged")

    def release(_: PrivateState) -> dict[str, Tensor]:
        data = _training_data(place, work)
        source = noise_source(context.config, work.index, -1)
        return site_statistics(context, spec, context.plan.statistics_noise or 0.0, data, source)

    return _release(place, work, "statistics", context.plan.statistics_events, spec.shapes, release)


def answer_train(place: Place, work: Work) -> Answer:
    """One round of training; the new code and encoder stay on the site's disk."""
    context, method = work.context, get_method(work.context.config.method)

    def release(private: PrivateState) -> dict[str, Tensor]:
        site = _site_state(private, work)
        source = noise_source(context.config, work.index, work.round_index)
        step = StepInput(work.tensors, site, _training_data(place, work), work.round_index, work.index, source)
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
    released = site_statistics(context, spec, noise, _training_data(place, work), source)
    check_tensors("baseline", released, spec.shapes)
    return Answer(released, {})


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
    found = score_site(train, validation, test, heads["synthetic"], mixing=float(work.words["mixing"]))
    if "statistics" in heads:
        found["statistics_only"] = score(heads["statistics"], *test)
    scores: dict[str, float] = {}
    for name, value in found.items():
        scores[f"{name}.accuracy"] = value.accuracy
        scores[f"{name}.balanced_accuracy"] = value.balanced_accuracy
    return scores


def _release(
    place: Place,
    work: Work,
    round_key: str,
    events: tuple[PrivacyEvent, ...],
    shapes: Mapping[str, tuple[int, ...]],
    compute: Callable[[PrivateState], Mapping[str, Tensor]],
) -> Answer:
    """Check, reserve, compute, keep, commit, log: the only way anything leaves."""
    request = request_of(work.context)
    kind: Kind = "statistics" if round_key == "statistics" else "train"
    private = PrivateState(place.folder / "state", work.run_id)
    log = ReleaseLog(place.folder / "releases.jsonl")
    if not request.protected:
        place.policy.check(request)
        with private.locked():
            payload = _payload(kind, compute(private), shapes)
            log.append(work.run_id, round_key, (), private.save_payload(round_key, payload), len(payload))
            private.drop_payloads(round_key)
        return Answer(load_tensors(payload), {"receipt": "", "charged": "[]"})
    limits, fingerprint = place.policy.limits, _fingerprint(place)
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
        place.policy.check(request, recompute_epsilon=not granted)
        stack.enter_context(private.locked())
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
            payload = _payload(kind, compute(private), shapes)
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


def _site_state(private: PrivateState, work: Work) -> SiteState:
    """The private state before this round: the newest that an earlier round left, or a fresh one."""
    earlier = [index for index in private.rounds() if index <= work.round_index]
    if not earlier:
        return get_method(work.context.config.method).init_site(work.context, work.index)
    saved = private.load(max(earlier))
    return SiteState({name: torch.from_numpy(value.copy()) for name, value in saved.tensors.items()})


def _training_data(place: Place, work: Work) -> SiteData:
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


def _fingerprint(place: Place) -> str:
    """Digest of the data set as its file states it; no record is read."""
    from embeddings.store import read_metadata

    if not isinstance(place.records, Path):
        return f"demo/{place.records}"
    if not place.records.is_file():
        raise DataError(f"no embeddings at {place.records}: make them with `fedhypevae embed`")
    return read_metadata(place.records).fingerprint

"""One message's task, what it asks of the site's policy, and what it would charge; no record is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from client_app.place import Place
from client_app.policy.request import RunRequest, short
from client_app.records import check_matches, read_facts
from common.errors import DataError, PolicyRefusal
from common.methods import method_of
from common.methods.base import RunContext
from common.methods.shared_sums import assumptions_of
from common.privacy.events import PrivacyEvent
from common.secagg.assumptions import charged_events


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
        wants_metrics: whether scores are to travel.
        least_colluders: how many colluders the policy assumes under secure aggregation; the events are those to be
            charged then.

    Raises:
        PolicyRefusal: the plan to be charged is not the one that the settings carry out.
        ConfigError: the method does not carry out such settings.
    """
    config, plan, privacy = context.config, context.plan, context.config.privacy
    method = method_of(config)
    if method.private:
        # a method without training plans no round; rounds beyond the plan are refused where they are asked for
        rounds, spare = (config.training.num_rounds, privacy.spare_rounds) if plan.num_rounds else (0, 0)
        declared = (plan.sampling_rate, plan.steps_per_round, plan.num_rounds, plan.spare_rounds, plan.delta)
        configured = (privacy.sampling_rate, config.training.local_steps, rounds, spare, privacy.delta)
        if declared != configured or not all(isinstance(number, int) for number in declared[1:4]):
            line = f"the plan to be charged is {short(declared)}, the settings carry out {configured}"
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


def fingerprint_of(place: Place, work: Work) -> str:
    """Digest of the data set as its file states it, for the ledger; no record is read.

    Raises:
        DataError: the file is missing, has no patients where they are the unit, or holds another width or class set
            than the run is about; or its records were to be counted where the run counts none of its set of findings.
            Nothing was charged.
    """
    facts, problem = read_facts(place.records, place.cache_dir, work.context.config.privacy.unit), work.context.problem
    check_matches(facts, work.context, work.index)
    # a site that comes later is in no set, and is asked for rounds alone
    counted = work.round_index < 0 or work.words.get("what") == "statistics"
    if counted and problem.task == "multilabel" and problem.label_set_of(facts.class_names) < 0:
        raise DataError("this site labels a set of findings that no site had when the run began: it can join the next")
    return facts.fingerprint if isinstance(place.records, Path) else f"demo/{place.records}"

"""What a site does with a message of a run that shares no noise: statistics, and a round of training."""

from __future__ import annotations

import torch
from torch import Tensor

from client_app.data import check_matches, load_records, split_data
from client_app.local_step import client_step
from client_app.place import Place
from client_app.private_state import PrivateState
from client_app.received import with_held
from client_app.release import release
from client_app.task import Answer, Work, check_round
from common.errors import PolicyRefusal
from common.loop import noise_source, site_statistics
from common.methods import get_method
from common.methods.base import RunContext, SiteState, StepInput
from common.sampling import SiteData
from common.transfer import upload_reference


def answer_statistics(place: Place, work: Work) -> Answer:
    """The one-shot noised statistics: one Gaussian event, charged before the records are read."""
    context = work.context
    _check_local(context)
    spec = get_method(context.config.method).statistics(context)
    if spec is None:
        raise PolicyRefusal("request", "the method has no statistics to release; nothing was charged")

    def compute(_: PrivateState, __: frozenset[int]) -> dict[str, Tensor]:
        data = training_data(place, work)
        source = noise_source(context.config, work.index, -1)
        return site_statistics(context, spec, context.plan.statistics_noise or 0.0, data, source)

    return release(place, work, "statistics", context.plan.statistics_events, spec.shapes, compute)


def answer_train(place: Place, work: Work) -> Answer:
    """One round of training; the new code and encoder stay on the site's disk."""
    context, method = work.context, get_method(work.context.config.method)
    _check_local(context)
    check_round(work)
    work = with_held(place, work)

    def compute(private: PrivateState, committed: frozenset[int]) -> dict[str, Tensor]:
        private.keep_states(committed)
        site = site_state(private, work)
        source = noise_source(context.config, work.index, work.round_index)
        step = StepInput(work.tensors, site, training_data(place, work), work.round_index, work.index, source)
        after, uploads = client_step(place, method, context, step)
        # saved under the next round's number: it counts only once this round is committed
        private.save(work.round_index + 1, after.tensors)
        return uploads

    return release(
        place,
        work,
        f"round-{work.round_index + 1}",
        context.plan.round_events,
        method.shapes_from(context, work.index),
        compute,
        upload_reference(method, work.tensors),
    )


def site_state(private: PrivateState, work: Work) -> SiteState:
    """The private state before this round: the newest that an earlier committed round left, or a fresh one."""
    earlier = [index for index in private.rounds() if index <= work.round_index]
    if not earlier:
        return get_method(work.context.config.method).init_site(work.context, work.index)
    saved = private.load(max(earlier))
    return SiteState({name: torch.from_numpy(value.copy()) for name, value in saved.tensors.items()})


def training_data(place: Place, work: Work) -> SiteData:
    records = load_records(place.records, place.cache_dir)
    check_matches(records, work.context, work.index)
    return split_data(records, "train", work.context.config.privacy.unit)


def _check_local(context: RunContext) -> None:
    """Refuse to send a whole noised vector where the run says that its noise is shared."""
    if context.config.privacy.trust != "local":
        raise PolicyRefusal("request", "under trust secagg nothing leaves but masked vectors; nothing was charged")

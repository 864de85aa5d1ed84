"""What a site does with a message of a run that shares no noise: consent, statistics, and a round of training."""

from __future__ import annotations

import torch

from client_app.local_step import check_device, client_step
from client_app.place import Place
from client_app.release.granted import Admission, admit, check_consent
from client_app.release.release import Begin, Computed, Step, release
from client_app.state.private_state import PrivateState
from client_app.task import Answer, Work, check_round
from common.errors import PolicyRefusal
from common.methods import get_method
from common.methods.base import RunContext, Shapes, SiteState, StepInput
from common.methods.site_release import noise_source, site_statistics
from common.privacy.events import PrivacyEvent
from common.privacy.mechanism import planned_noise
from common.records import SiteData
from common.wire.received import check_received


def answer_consent(place: Place, work: Work) -> Answer:
    """Whether this site would take part: all that refuses a release is looked at, and nothing is charged or declared.

    Every site is asked before any is charged: a run that one of them refuses costs none of them its budget. The
    answer depends on the site's policy, its ledger and the head of its file, as that to the first release does; no
    record is read.
    """
    check_consent(admit(place, work))
    check_device(place, work.context)
    return Answer({}, {})


def answer_statistics(place: Place, work: Work) -> Answer:
    """The one-shot noised statistics: one Gaussian event, charged before the records are read."""
    context = work.context
    _check_local(context)
    spec = get_method(context.config.method).statistics(context)
    if spec is None:
        raise PolicyRefusal("request", "the method has no statistics to release; nothing was charged")

    def compute(data: SiteData) -> Computed:
        source = noise_source(context.config, work.index, -1)
        return Computed(site_statistics(context, spec, planned_noise(context.plan.statistics_noise), data, source))

    step = Step(compute)
    events = context.plan.statistics_events
    return _released(admit(place, work), "statistics", events, spec.shapes, lambda _, __: step)


def answer_train(place: Place, work: Work) -> Answer:
    """One round of training; the new code and encoder stay on the site's disk."""
    context, method = work.context, get_method(work.context.config.method)
    _check_local(context)
    check_round(work)
    admission = admit(place, work)
    check_received(context, method, work.index, work.tensors)

    def begin(private: PrivateState, committed: frozenset[int]) -> Step:
        site = site_state(private, work, committed)
        check_device(place, context)

        def compute(data: SiteData) -> Computed:
            source = noise_source(context.config, work.index, work.round_index)
            step = StepInput(work.tensors, site, data, work.round_index, work.index, source)
            after, uploads = client_step(place, method, context, step)
            return Computed(uploads, after.tensors)

        return Step(compute, state_bytes(work, site))

    events, shapes = context.plan.round_events, method.shapes_from(context, work.index)
    return _released(admission, f"round-{work.round_index + 1}", events, shapes, begin)


def site_state(private: PrivateState, work: Work, committed: frozenset[int]) -> SiteState:
    """The private state before this round: the newest that an earlier committed round left, or a fresh one.

    Read before the round is charged: a state that can't be read refuses it.
    """
    private.keep_states(committed)
    earlier = [index for index in private.rounds() if index <= work.round_index]
    if not earlier:
        return get_method(work.context.config.method).init_site(work.context, work.index)
    saved = private.load(max(earlier))
    return SiteState({name: torch.from_numpy(value.copy()) for name, value in saved.items()})


def state_bytes(work: Work, site: SiteState) -> int:
    """At least what the private state after a round takes on the disk: an optimiser keeps two moments of each value."""
    return 4 * sum(tensor.nbytes for tensor in (*work.tensors.values(), *site.tensors.values()))


def _check_local(context: RunContext) -> None:
    """Refuse to send a whole noised vector where the run says that its noise is shared."""
    if context.config.privacy.trust != "local":
        raise PolicyRefusal("request", "under trust secagg nothing leaves but masked vectors; nothing was charged")


def _released(
    admission: Admission, round_key: str, events: tuple[PrivacyEvent, ...], shapes: Shapes, begin: Begin
) -> Answer:
    if admission.request.protected:
        return release(admission, round_key, events, shapes, begin)
    from client_app.release.unprotected import release_unprotected

    return release_unprotected(admission, round_key, shapes, begin)

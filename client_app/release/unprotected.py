"""A run without a guarantee, on public data alone: nothing is charged, and the site's log is all that notes it.

`SitePolicy.check` lets such a run pass only where the policy declares the site's data public.
"""

from __future__ import annotations

from safetensors.torch import load as load_tensors

from client_app.records import training_data
from client_app.release.granted import Admission, committed_rounds, locked_run, log_of
from client_app.release.release import Begin, keep, packed
from client_app.task import Answer
from common.methods.base import Shapes


def release_unprotected(admission: Admission, round_key: str, shapes: Shapes, begin: Begin) -> Answer:
    """Compute, keep, log, without noise or charge; arguments as of `release.release`."""
    place, work, log = admission.place, admission.work, log_of(admission.place)
    with locked_run(admission) as private:
        done = (release.round_key for release in log.read() if release.run_id == work.run_id)
        step = begin(private, committed_rounds(done))
        data = training_data(place.records, place.cache_dir, work.context)
        payload, state = packed(step, data, round_key, shapes)
        log.append(work.run_id, round_key, (), keep(private, work, round_key, payload, state), len(payload))
        private.drop_payloads(round_key)
    return Answer(load_tensors(payload), {"receipt": "", "seal": "", "charged": "[]"})

"""Private steps of every method at a small size, as an adversary would see their sums: without noise, unit by unit.

Units keep their own random numbers whichever others are there, as in the mechanism, where these are secret.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import Method, PrivacyPlan, Problem, RunContext, SiteState, StepInput, Tensors
from common.privacy import mechanism
from common.privacy.mechanism import add_gaussian
from common.privacy.noise import NoiseSource
from common.records import SiteData
from tests.common.privacy.clipping_cases import UnitDraws

DIM, CLASSES, UNITS, RECORDS = 10, 3, 17, 2  # 17 and its multiples are no size of anything else
SMALL: dict[str, str | int | float] = {
    "num-sites": 1,
    "min-sites": 1,
    "statistics-share": 0.0,
    "public-total": UNITS,
    "num-rounds": 1,
    "spare-rounds": 0,
    "sleep-steps": 0,
    "latent-dim": 2,
    "encoder-width": 5,
    "prior-width": 4,
    "cvae-width": 6,
    "gan-width": 5,
    "noise-dim": 4,
    "architectures": "mlp-4",
}
PATIENT = {"unit": "patient", "max-records-per-patient": RECORDS}
MMD = {"mmd": "per-example", "mmd-weight": 0.5}
LAYERS = {"hidden-widths": "6,4", "trunk-width": 5}
STEPS: dict[str, dict[str, str | int | float]] = {
    "fedhypevae": {},
    "fedhypevae patients": PATIENT,
    "fedhypevae joint": {"encoder-training": "joint"},
    "fedhypevae layers": LAYERS,
    "fedhypevae mmd": MMD,
    "fedhypevae everything": {**LAYERS, **MMD, **PATIENT, "encoder-training": "joint"},
    "fedhypevae scores": {"elbo-weight": 0.0, "trunk-width": 5},
    "dp_fedsgd": {},
    "dp_fedsgd patients": PATIENT,
    "dp_cvae": {},
    "dp_cvae patients": PATIENT,
    "dp_cgan": {},
    "dp_cgan patients": PATIENT,
    "mh_pfedhn_gd_dp": {},
}


@dataclass(frozen=True)
class Step:
    """A method's step with everything but the records."""

    method: Method
    context: RunContext
    params: Tensors
    site: SiteState

    @property
    def patients(self) -> bool:
        return self.context.config.privacy.unit == "patient"

    @property
    def sensitivity(self) -> float:
        """What one unit may move the sum by."""
        clip_norm = self.context.config.privacy.clip_norm
        return 2.0 * clip_norm if self.method.name.startswith("mh_pfedhn") else clip_norm


def make_step(name: str, clip_norm: float = 0.03) -> Step:
    """One of `STEPS`, with parameters away from their starting values."""
    method = get_method(name.split()[0])
    flat = {**SMALL, **STEPS[name], "method": method.name, "clip-norm": clip_norm}
    config = RunConfig.from_flat(flat)
    plan = PrivacyPlan(None, 0.0, 1.0, 1, 1, 1e-5, 0)
    context = RunContext(config, Problem(DIM, tuple("abc"), 1), plan)
    generator = torch.Generator().manual_seed(5)

    def jittered(values: Tensors) -> dict[str, Tensor]:
        return {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in values.items()}

    params = jittered(method.params_for(context, method.init(context), 0))
    return Step(method, context, params, SiteState(jittered(method.init_site(context, 0).tensors)))


def make_data(step: Step, seed: int = 0) -> SiteData:
    """`UNITS` units; patients have one or two records each."""
    generator = torch.Generator().manual_seed(seed)
    records = RECORDS - torch.arange(UNITS) % 2 if step.patients else torch.ones(UNITS, dtype=torch.long)
    groups = torch.arange(UNITS).repeat_interleave(records)
    labels = torch.randint(CLASSES, groups.shape, generator=generator)
    return SiteData(torch.randn(len(groups), DIM, generator=generator), labels, groups)


def without(data: SiteData, unit: int) -> SiteData:
    """The data less one unit; the others keep their groups."""
    kept = data.groups != unit
    return SiteData(data.embeddings[kept], data.labels[kept], data.groups[kept])


class _Seen(Exception):
    """The step is at its sum."""


def step_sum(step: Step, data: SiteData, left_out: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """What one local step hands over to be noised: all that it knows of records, and may let out.

    Units that the step is to leave out draw no numbers.
    """
    source = UnitDraws(sorted(set(data.groups.tolist()) - set(left_out)))
    groups = data.groups if step.patients else None
    seen: dict[str, Tensor] = {}

    def record(tensors: Tensors, std: float, source: NoiseSource) -> dict[str, Tensor]:
        seen.update(add_gaussian(tensors, std, source))
        raise _Seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanism, "add_gaussian", record)
        work = StepInput(step.params, step.site, replace(data, groups=groups), 0, 0, source)
        with pytest.raises(_Seen):
            step.method.client_step(step.context, work)
    return seen


def moved_by(one: Tensors, other: Tensors) -> float:
    """Euclidean distance of two sums of the same names, shapes and types; NaN where a value is not finite."""
    facts = [{name: (value.shape, value.dtype) for name, value in sums.items()} for sums in (one, other)]
    if facts[0] != facts[1]:
        raise AssertionError("names, shapes or types depend on the records")
    gaps = [(one[name].double() - other[name].double()).square().sum() for name in one]
    return float(torch.stack(gaps).sum().sqrt())

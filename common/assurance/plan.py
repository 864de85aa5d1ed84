"""What a run would cost, before anything is spent: noise, ε as it grows, bytes and computing time.

What it would be worth is `expected_scores`' question.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods import get_method
from common.methods.base import Method, PrivacyPlan, Problem, RunContext, ServerState, StepInput
from common.privacy.composition import epsilon_pld, epsilon_prv, epsilon_rdp
from common.privacy.events import PrivacyEvent
from common.privacy.noise import SecureNoise
from common.records import SiteData
from common.wire.allow_list import num_bytes

_TIMED_STEPS = 3


@dataclass(frozen=True)
class Cohort:
    """A planned federation: sites, training records (or patients) of each, and the shape of the problem."""

    sites: int
    records: int
    dim: int
    num_classes: int

    def __post_init__(self) -> None:
        """Refuse sizes below the least (ConfigError)."""
        for name, least in (("sites", 1), ("records", 1), ("dim", 1), ("num_classes", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, found {getattr(self, name)}")

    @property
    def total(self) -> int:
        """Units of all sites together."""
        return self.sites * self.records


@dataclass(frozen=True)
class EpsilonPoint:
    """ε of everything released up to a point of the run, for adding or removing one unit."""

    label: str
    pld: float
    prv: float
    rdp: float


@dataclass(frozen=True)
class NoiseLevel:
    """Noise against signal in one coordinate of what the server adds up.

    Attributes:
        label: of the release.
        coordinates: how many there are.
        noise_std: of one coordinate of the sum over sites.
        signal_rms: of one coordinate if every unit's clipped contribution had the largest norm and one direction: no
            real signal is stronger.
    """

    label: str
    coordinates: int
    noise_std: float
    signal_rms: float

    @property
    def ratio(self) -> float:
        """Signal over noise; infinite without noise."""
        return self.signal_rms / self.noise_std if self.noise_std > 0 else math.inf


@dataclass(frozen=True)
class RunPlan:
    """What can be said of a run from its settings alone.

    Attributes:
        cohort: what was asked about.
        plan: noise multipliers and steps.
        epsilons: as the run goes on; the last one has the spare rounds too.
        levels: noise against signal, by release.
        bytes_up: values of one site in the whole run; under secagg masked ones are longer (`common.secagg.quantise`).
        bytes_down: values to one site in the whole run.
        step_seconds: one site's computing in one round, on this machine.
    """

    cohort: Cohort
    plan: PrivacyPlan
    epsilons: tuple[EpsilonPoint, ...]
    levels: tuple[NoiseLevel, ...]
    bytes_up: int
    bytes_down: int
    step_seconds: float


def plan_run(config: RunConfig, cohort: Cohort) -> RunPlan:
    """Noise, ε, bytes and time of a run; no record is needed.

    Args:
        config: the run; its ε must be finite and its method private.
        cohort: who would take part.

    Returns:
        The plan. Every ε is for adding or removing one unit.

    Raises:
        ConfigError: a method without protection, or a budget that can't be met.
    """
    method, context = planned_context(config, cohort)
    plan = context.plan
    epsilons = tuple(
        EpsilonPoint(label, *(accountant(events, plan.delta) for accountant in (epsilon_pld, epsilon_prv, epsilon_rdp)))
        for label, events in _milestones(plan)
    )
    up, down = run_bytes(method, context)
    seconds = _time_round(method, context, method.init(context), cohort) if plan.num_rounds else 0.0
    return RunPlan(cohort, plan, epsilons, _levels(method, context, cohort), up, down, seconds)


def run_bytes(method: Method, context: RunContext) -> tuple[int, int]:
    """Bytes of the values that the first site sends in a whole run, and of those that it receives; without headers."""
    rounds, spec = context.plan.num_rounds, method.statistics(context)
    up = num_bytes(method.shapes_from(context, 0)) * rounds + (0 if spec is None else num_bytes(spec.shapes))
    return up, num_bytes(method.received_by(context, 0)) * rounds


def planned_context(config: RunConfig, cohort: Cohort) -> tuple[Method, RunContext]:
    """The run's method, and its context with the cohort's sites (ConfigError: nothing to plan)."""
    config = config.replace(num_sites=cohort.sites, min_sites=min(config.operation.min_sites, cohort.sites))
    method = get_method(config.method)
    if not method.private or not math.isfinite(config.privacy.epsilon):
        raise ConfigError("a plan is about noise: name a private method and a finite epsilon")
    names = tuple(f"class-{index}" for index in range(cohort.num_classes))
    return method, RunContext(config, Problem(cohort.dim, names, cohort.sites), method.plan(config))


def _milestones(plan: PrivacyPlan) -> list[tuple[str, list[PrivacyEvent]]]:
    """Points of the run with everything released until then."""
    found: list[tuple[str, list[PrivacyEvent]]] = []
    if plan.statistics_events:
        found.append(("statistics", list(plan.statistics_events)))
    rounds = sorted({1, plan.num_rounds // 4, plan.num_rounds // 2, plan.num_rounds} - {0}) if plan.num_rounds else []
    for number in rounds:
        trained = [replace(event, count=event.count * number) for event in plan.round_events]
        found.append((f"round {number}", [*plan.statistics_events, *trained]))
    if plan.num_rounds and plan.spare_rounds:
        found.append((f"{plan.spare_rounds} repeated rounds", list(plan.all_events)))
    return found


def _levels(method: Method, context: RunContext, cohort: Cohort) -> tuple[NoiseLevel, ...]:
    plan, privacy = context.plan, context.config.privacy
    levels = []
    spec = method.statistics(context)
    root = noise_of_sum(context.config, cohort)
    if spec is not None and plan.statistics_noise is not None:
        size = _count(spec.shapes.values())
        signal = cohort.total * spec.sensitivity / math.sqrt(size)
        levels.append(NoiseLevel("statistics", size, plan.statistics_noise * spec.sensitivity * root, signal))
    if plan.num_rounds and plan.training_noise is not None:
        size = _count(method.shapes_from(context, 0).values())
        steps = plan.steps_per_round
        noise = plan.training_noise * privacy.clip_norm * root * math.sqrt(steps)
        signal = steps * plan.sampling_rate * cohort.total * privacy.clip_norm / math.sqrt(size)
        levels.append(NoiseLevel("one round", size, noise, signal))
        rounds = plan.num_rounds
        levels.append(NoiseLevel("all rounds", size, noise * math.sqrt(rounds), signal * rounds))
    return tuple(levels)


def noise_of_sum(config: RunConfig, cohort: Cohort) -> float:
    """Standard deviation of the noise in the sum over all sites, in units of the multiplier times the sensitivity."""
    root = math.sqrt(cohort.sites)
    return root if config.privacy.trust == "local" else root * config.privacy.assumptions(cohort.sites).share


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _time_round(method: Method, context: RunContext, state: ServerState, cohort: Cohort) -> float:
    """Seconds of one site's round on made-up records: the fastest of a few."""
    generator = torch.Generator().manual_seed(0)
    data = SiteData(
        torch.randn(cohort.records, cohort.dim, generator=generator),
        torch.arange(cohort.records) % cohort.num_classes,
        torch.arange(cohort.records),
    )
    times = []
    site, source = method.init_site(context, 0), SecureNoise()
    params = method.params_for(context, state, 0)
    for _ in range(_TIMED_STEPS):
        started = time.perf_counter()
        method.client_step(context, StepInput(params, site, data, 0, 0, source))
        times.append(time.perf_counter() - started)
    return min(times)

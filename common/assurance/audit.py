"""Audits of a run's configuration: attack the real code on made-up records, and hold the result against the claim.

A bound above the claimed ε proves that the code does not do what it says. A bound below proves little: the power,
stated beside it, says which faults would have gone unseen. Records are made up; on a site's own data the result would
be one more release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.assurance.audit_bounds import (
    FloatArray,
    one_run_power,
    one_run_scores_epsilon,
    two_world_mu,
    two_world_power,
)
from common.assurance.audit_canaries import audited_run, canary_records, some_records
from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods.base import Method, RunContext, ServerState, SiteState, StepInput
from common.methods.site_release import site_statistics
from common.privacy.combined import combine_statistics
from common.privacy.composition import epsilon_pld
from common.privacy.events import sampled_gaussian
from common.privacy.noise import NoiseSource, SecureNoise, TestNoise
from common.records import SiteData

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        kind: "two-world" or "one-run".
        epsilon_bound: lower bound of ε, at `confidence`.
        epsilon_claimed: what the accountant says of the same releases.
        delta: δ of both.
        confidence: probability that a correct implementation gives a bound that is not above its ε.
        draws: draws of each world, or canaries.
        power: in words, what would have been seen.
    """

    kind: str
    epsilon_bound: float
    epsilon_claimed: float
    delta: float
    confidence: float
    draws: int
    power: str

    @property
    def passed(self) -> bool:
        """Whether the bound leaves the claim standing."""
        return self.epsilon_bound <= self.epsilon_claimed


def two_world_audit(
    config: RunConfig,
    *,
    dim: int,
    num_classes: int,
    background: int = 1,
    draws: int = 10_000,
    confidence: float = 0.999,
    seed: int = 0,
    source: NoiseSource | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Release one real training step many times with and without a canary, and tell the two apart.

    Args:
        config: the run; its first local step is audited. The sleep phase, which reads no record, is left out.
        dim: width of the embeddings.
        num_classes: K.
        background: records that are in both worlds.
        draws: of each world.
        confidence: of the bound.
        seed: of the made-up records.
        source: noise; the operating system's by default.
        progress: called now and then with (draws done, draws in all).

    Returns:
        Bound and claim for *one step* of training, for adding or removing one unit.

    Raises:
        ConfigError: the method trains nothing with noise, or a run without a finite ε.

    Source: Nasr et al. (2023). The canary's direction is known to the attacker, as there.
    """
    method, context = audited_run(config, dim, num_classes, background + 1)
    context = replace(context, config=context.config.replace(local_steps=1))
    noise = context.plan.training_noise
    if not method.private or noise is None or noise == 0.0:
        raise ConfigError("an audit needs a private method with training noise; set epsilon to a finite number")
    used = SecureNoise() if source is None else source
    state, site = method.init(context), method.init_site(context, 0)
    records = canary_records(background + 1, dim, num_classes, seed, findings=context.problem.findings)
    direction = _directions(context, method, state, site, some_records(records, [0]))[0]
    scores = np.zeros((2, draws))
    worlds = (some_records(records, list(range(1, background + 1))), records)
    for draw in range(draws):
        for world, data in enumerate(worlds):
            _, upload = method.client_step(context, StepInput(state.params, site, data, 0, 0, used))
            scores[world, draw] = float(_flat(upload) @ direction)
        if progress is not None and draw % 100 == 0:
            progress(draw, draws)
    result = two_world_result(scores, noise, context.plan.sampling_rate, context.plan.delta, confidence)
    more = ", and a step without clipping" if "would be seen" in result.power else ": raise epsilon or lower num-rounds"
    return replace(result, power=result.power + more)


def two_world_result(
    scores: FloatArray, noise: float, sampling_rate: float, delta: float, confidence: float
) -> AuditResult:
    """What the attacker's scores of two worlds, (2, draws), say of a release with noise multiplier `noise`."""
    draws = scores.shape[1]
    mu = two_world_mu(scores[0], scores[1], sampling_rate, confidence)
    bound = 0.0 if mu <= 1e-3 else epsilon_pld([sampled_gaussian(1.0 / mu, sampling_rate)], delta)
    factor = two_world_power(noise, sampling_rate, draws, confidence)
    seen = f"noise below about {factor:.2f} of what is claimed would be seen"
    power = seen if factor > 0 else "too many draws would be needed to see anything at this noise"
    claimed = epsilon_pld([sampled_gaussian(noise, sampling_rate)], delta)
    return AuditResult("two-world", bound, claimed, delta, confidence, draws, power)


def one_run_audit(
    config: RunConfig,
    *,
    dim: int,
    num_classes: int,
    canaries: int = 1000,
    confidence: float = 0.999,
    seed: int = 0,
    source: NoiseSource | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Run all rounds on canaries, each in or out by a coin, and guess from everything released which were in.

    The server is the attacker: it sends the same parameters in every round, so that each canary pushes the same way.
    The guarantee holds for any server.

    Args:
        config: the run, with one site; the sleep phase is left out for speed.
        dim: width of the embeddings; up to dim x K canaries are nearly orthogonal.
        num_classes: K.
        canaries: m.
        confidence: of the bound.
        seed: of canaries and coins.
        source: noise; the operating system's by default.
        progress: called after each round with (rounds done, rounds in all).

    Returns:
        Bound and claim for the whole run, statistics included, for adding or removing one unit.

    Raises:
        ConfigError: a method without noise, or a run without a finite ε.

    Source: Steinke, Nasr, Jagielski (2023). Measured there and here, the bound of a correct run lies far below its ε.
    """
    method, context = audited_run(config, dim, num_classes, canaries // 2)
    plan = context.plan
    if not method.private or plan.training_noise is None or plan.training_noise == 0.0:
        raise ConfigError("an audit needs a private method with training noise; set epsilon to a finite number")
    used = SecureNoise() if source is None else source
    generator = np.random.default_rng([seed, 1])
    included = generator.random(canaries) < 0.5
    records = canary_records(canaries, dim, num_classes, seed, findings=context.problem.findings)
    data = some_records(records, np.flatnonzero(included).tolist())
    state, site = method.init(context), method.init_site(context, 0)
    # two attackers: one uses all that is released, one the rounds alone, in case these hold less noise than claimed
    evidence, rounds = _Evidence.none(canaries), _Evidence.none(canaries)
    spec, statistics_noise = method.statistics(context), plan.statistics_noise
    if spec is not None and statistics_noise is not None:
        release = site_statistics(context, spec, statistics_noise, data, used)
        combined = combine_statistics(spec, [release], statistics_noise)
        alone = [site_statistics(context, spec, 0.0, some_records(records, [j]), TestNoise(0)) for j in range(canaries)]
        for name, std in combined.noise_std.items():
            parts = torch.stack([one[name].flatten() for one in alone])
            evidence += _Evidence.of_releases(parts, release[name].flatten(), std)
        state = method.prepare(context, state, combined)
    directions = _directions(context, method, state, site, records)
    empty = _release(_without_noise(context), method, state, site, some_records(records, []))
    std = plan.training_noise * context.config.privacy.clip_norm * math.sqrt(plan.steps_per_round)
    total = torch.zeros_like(empty, dtype=torch.float64)
    for round_index in range(plan.num_rounds):
        work = StepInput(state.params, site, data, round_index, 0, used)
        site, upload = method.client_step(context, work)
        total += _flat(upload) - empty
        if progress is not None:
            progress(round_index + 1, plan.num_rounds)
    seen = _Evidence.of_releases(directions, total, std, plan.num_rounds)
    evidence, rounds = evidence + seen, rounds + seen
    events = plan.all_events
    claimed = epsilon_pld(events, plan.delta)
    each = 1.0 - (1.0 - confidence) / 2.0
    bound, correct, guesses = max(
        one_run_scores_epsilon(attack.scores(), included, plan.delta, each) for attack in (evidence, rounds)
    )
    mu = math.sqrt(sum(event.count * (event.sampling_rate / event.noise_multiplier) ** 2 for event in events))
    best = one_run_power(mu, canaries, plan.delta, confidence)
    power = f"{correct} of {guesses} guesses right; a correct run is expected to show ε of about {best:.2f} at most"
    return AuditResult("one-run", bound, claimed, plan.delta, confidence, canaries, power)


def _without_noise(context: RunContext) -> RunContext:
    plan = context.plan
    quiet = replace(
        plan,
        training_noise=None if plan.training_noise is None else 0.0,
        sampling_rate=1.0,
    )
    return RunContext(context.config.replace(sampling_rate=1.0), context.problem, quiet)


def _release(context: RunContext, method: Method, state: ServerState, site: SiteState, data: SiteData) -> Tensor:
    work = StepInput(state.params, site, data, 0, 0, TestNoise(0))
    return _flat(method.client_step(context, work)[1])


def _directions(context: RunContext, method: Method, state: ServerState, site: SiteState, records: SiteData) -> Tensor:
    """What each record by itself adds to a round's release now, (m, p): what an attacker looks for."""
    quiet = _without_noise(context)
    empty = _release(quiet, method, state, site, some_records(records, []))
    alone = [
        _release(quiet, method, state, site, some_records(records, [j])) - empty for j in range(records.labels.shape[0])
    ]
    return torch.stack(alone)


@dataclass(frozen=True)
class _Evidence:
    """What the releases so far say of the coins, in a linear Gaussian model: precision (m, m), and pull (m,).

    A release is sum_j coin_j direction_j + noise. The posterior mean of the coins removes what canaries share, which a
    plain inner product would leave in.
    """

    precision: Tensor
    pull: Tensor

    @classmethod
    def none(cls, count: int) -> _Evidence:
        # a fair coin has precision 4; next to nothing of it makes this least squares, which removes what canaries share
        # even where there is less noise than was claimed
        return cls(4e-6 * torch.eye(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64))

    @classmethod
    def of_releases(cls, directions: Tensor, total: Tensor, std: float, count: int = 1) -> _Evidence:
        """What the sum of `count` releases of the same directions says, each with noise `std` a coordinate."""
        rows = directions.double() / std
        gram = rows @ rows.T
        # pull towards the coins' deviation from their mean, 1/2
        pull = rows @ (total.double() / std) - 0.5 * count * gram.sum(1)
        return cls(count * gram, pull)

    def __add__(self, other: _Evidence) -> _Evidence:
        """Both, where their noise is independent."""
        return _Evidence(self.precision + other.precision, self.pull + other.pull)

    def scores(self) -> FloatArray:
        return torch.linalg.solve(self.precision, self.pull).numpy()


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

"""The two-world audit of a method that releases statistics and trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.assurance.audit import AuditResult, two_world_result
from common.assurance.audit_canaries import audited_run, canary_records, some_records
from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods.site_release import site_statistics
from common.privacy.combined import combine_statistics
from common.privacy.noise import NoiseSource, SecureNoise, TestNoise

_DIM, _CLASSES = 8, 3  # exact samplers are slow, and their noise knows nothing of the sizes


def audit_statistics(
    config: RunConfig,
    *,
    draws: int,
    confidence: float,
    source: NoiseSource | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AuditResult:
    """Release the one-shot statistics many times with and without a made-up record, and tell the two apart.

    Args:
        config: the run.
        draws: of each world.
        confidence: of the bound.
        source: noise; the operating system's by default.
        progress: called now and then with (draws done, draws in all).

    Returns:
        Bound and claim for the statistics, for adding or removing one unit.

    Raises:
        ConfigError: the method releases none with noise.

    Source: Nasr et al. (2023); the attacker knows the record, and weighs every part by its noise.
    """
    method, context = audited_run(config, _DIM, _CLASSES, 2)
    spec, noise = method.statistics(context), context.plan.statistics_noise
    if not method.private or spec is None or noise is None or noise == 0.0:
        raise ConfigError("an audit needs a private method that releases something with noise: set a finite epsilon")
    used = SecureNoise() if source is None else source
    both = canary_records(2, _DIM, _CLASSES, 0, findings=context.problem.findings)
    worlds = [some_records(both, [0]), both]
    alone, empty = (site_statistics(context, spec, 0.0, some_records(both, rows), TestNoise(0)) for rows in ([1], []))
    std = combine_statistics(spec, [site_statistics(context, spec, noise, both, used)], noise).noise_std
    direction = {name: (alone[name] - empty[name]) / std[name] ** 2 for name in std}
    scores = np.zeros((2, draws))
    for draw in range(draws):
        for world, data in enumerate(worlds):
            scores[world, draw] = _score(site_statistics(context, spec, noise, data, used), direction)
        if progress is not None and draw % 100 == 0:
            progress(draw, draws)
    return two_world_result(scores, noise, 1.0, context.plan.delta, confidence)


def _score(release: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> float:
    return float(sum(torch.sum(release[name] * direction[name]) for name in direction))

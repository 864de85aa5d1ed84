"""The sites' noised statistics put together: sums become means, shrunk by their noise. Post-processing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from common.privacy.statistics import StatisticsSpec, part_weights, unpack_pairs, unpack_symmetric
from common.records import clip_to_ball


@dataclass(frozen=True)
class ReleasedStatistics:
    """Noised statistics of all sites together, as the server knows them: public from here on.

    Attributes:
        total: noised number of records, at least 1; a record or patient that was scaled down counts in part.
        centre: (d_x,), noised mean embedding, shrunk.
        class_counts: (K,), noised, at least 1; of findings the records that have each.
        class_means: (K, d_x), of the records of a class or with a finding; or None.
        covariance: (d_x, d_x) within classes, shrunk, or None.
        class_features: (K, D) noised mean Fourier features, or None.
        noise_std: standard deviation of the noise in one coordinate of a sum, by part.
        class_offsets: (K, d_x), noised class means less the centre, not shrunk; or None.
        site_counts: (m, K), each site's noised counts, in the order of its index; equal rows where only their sum is
            known; None where they were not kept.
        site_indices: (m,), the sites' indices in the run; None where they are unknown.
        known_counts: (K,), noised number of records that know each finding, at least 1; None of classes.
        pair_counts: (K, K), noised number of records with both findings; None of classes.
    """

    total: float
    centre: Tensor
    class_counts: Tensor
    class_means: Tensor | None
    covariance: Tensor | None
    class_features: Tensor | None
    noise_std: Mapping[str, float]
    class_offsets: Tensor | None = None
    site_counts: Tensor | None = None
    site_indices: Tensor | None = None
    known_counts: Tensor | None = None
    pair_counts: Tensor | None = None

    @property
    def prevalence(self) -> Tensor | None:
        """Share of the records with each finding, of those that know it, within (0, 1): (K,); None of classes."""
        if self.known_counts is None:
            return None
        least = (0.5 / self.known_counts).clamp(max=0.5)
        return (self.class_counts / self.known_counts).clamp(min=least, max=1.0 - least)

    @property
    def class_shares(self) -> Tensor:
        """Shares of the classes, (K,), summing to 1: the noised ones, shrunk towards equal shares by their noise.

        Source: James & Stein (1961), positive part; counts that are mostly noise say nothing about the classes.
        """
        mean = self.class_counts.mean()
        return (mean + _shrunk(self.class_counts - mean, self.noise_std["class_counts"])) / self.class_counts.sum()


def combine_statistics(
    spec: StatisticsSpec,
    releases: Iterable[Mapping[str, Tensor]],
    noise_multiplier: float,
    sites: Sequence[int] | None = None,
) -> ReleasedStatistics:
    """Add the sites' releases and turn sums into means; post-processing.

    Args:
        spec: what was released.
        releases: one mapping a site.
        noise_multiplier: σ of each site's release.
        sites: their indices in the run, where it matters who sent what.

    Returns:
        The statistics. The centre is shrunk towards zero and the class means towards the centre by the noise in them
        (James & Stein 1961, positive part), so that few records give an origin that is off by little, and an empty
        class lands on the centre rather than anywhere. A centre that the noise takes out of the ball that holds every
        embedding is brought back to it.

    Raises:
        ConfigError: no release, or counts are not part of the release.
    """
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in spec.shapes.items()}
    each: list[Tensor] = []
    for site in releases:  # one at a time: memory does not grow with the sites
        for name, so_far in sums.items():
            so_far += site[name]
        each.append(site["class_counts"].float() if "class_counts" in sums else torch.zeros(0))
    if not each or "class_counts" not in spec.shapes:
        raise ConfigError("statistics need at least one site and the class counts, found none")
    sums = {name: value.float() for name, value in sums.items()}
    weights = part_weights(spec)
    spread = {name: noise_multiplier * spec.sensitivity / weights[name] * math.sqrt(len(each)) for name in spec.shapes}
    counts = sums["class_counts"].clamp(min=1.0)
    findings = spec.max_positives > 0
    total = max(float(sums["records" if findings else "class_counts"].sum()), 1.0)
    centre = torch.zeros(spec.dim)
    if "total_sum" in sums:
        centre = clip_to_ball(_shrunk(sums["total_sum"] / total, spread["total_sum"] / total), spec.radius)
    means, offset = None, None
    if "class_sums" in sums:
        if "total_sum" not in sums and not findings:
            noise = spread["class_sums"] * math.sqrt(spec.num_classes)
            centre = clip_to_ball(_shrunk(sums["class_sums"].sum(0) / total, noise / total), spec.radius)
        offset = sums["class_sums"] / counts[:, None] - centre
        means = centre + _shrunk(offset, spread["class_sums"] / counts)
    covariance = None
    if "second_moment" in sums and means is not None:
        covariance = _within_covariance(
            unpack_symmetric(sums["second_moment"], spec.dim) / total,
            means,
            counts / counts.sum(),
            spread["second_moment"] / total,
        )
    features = None
    if "class_features" in sums:
        features = sums["class_features"] / counts[:, None]
    indices = None if sites is None else torch.tensor(list(sites))
    known = None
    if findings:
        known = (sums["records"] @ spec.labelled.float() - sums["unknown_counts"]).clamp(min=1.0, max=total)
    pairs = unpack_pairs(sums["pair_counts"], spec.num_classes) if findings else None
    return ReleasedStatistics(
        total, centre, counts, means, covariance, features, spread, offset, torch.stack(each), indices, known, pairs
    )


def _shrunk(mean: Tensor, noise_std: Tensor | float) -> Tensor:
    """Noised means (..., d) shrunk towards zero by the noise in them; James & Stein (1961), positive part."""
    noise = torch.as_tensor(mean.shape[-1] * noise_std**2)
    kept = (1.0 - noise / mean.square().sum(-1).clamp(min=1e-12)).clamp(min=0.0)
    return kept[..., None] * mean


def _within_covariance(moment: Tensor, means: Tensor, shares: Tensor, noise_std: float) -> Tensor:
    """Shared covariance within classes: noised second moment less the means', eigenvalues cut at the noise level.

    A symmetric matrix of noise of standard deviation s has eigenvalues up to about 2 s sqrt(d) (Wigner 1958): what
    lies below is noise, and is replaced by the mean of what it holds, so that the trace is kept.
    """
    within = moment - (means * shares[:, None]).T @ means
    values, vectors = torch.linalg.eigh(within)
    level = 2.0 * noise_std / math.sqrt(2.0) * math.sqrt(moment.shape[0])
    signal = values > level
    rest = values[~signal].mean().clamp(min=1e-6) if bool((~signal).any()) else values.new_tensor(0.0)
    cleaned = torch.where(signal, values, rest.expand_as(values))
    return (vectors * cleaned) @ vectors.T

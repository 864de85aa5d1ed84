"""The one-shot release of class statistics (Eq. 11), noised at the sites before training.

A record with class y and embedding x, |x| <= R, contributes the vector

    (a * onehot(y), b * onehot(y) x, t * x, c * x x^T, e * onehot(y) phi(x))

of its class counts, class sums, total sum, second moment and random Fourier features, phi of norm 1. Its norm is at
most S = sqrt(a^2 + b^2 R^2 + t^2 R^2 + c^2 R^4 + e^2): the sensitivity to adding or removing one record. A patient's
vector (the sum over the records) is clipped to the same S. The weights are public.

**Findings.** A record with findings, p in {0, 1}^K those that are present and u in {0, 1}^K those that are unknown, has

    (a, a * p, v * u, w * (p_j p_k for j < k), b * p x, t * x, c * x x^T)

With at most P findings present and U unknown, both public, |p|^2 <= P, |u|^2 <= U, and at most P (P - 1) / 2 of the
pairs are 1. So its norm is at most

    S = sqrt(a^2 (1 + P) + v^2 U + w^2 P (P - 1) / 2 + b^2 P R^2 + t^2 R^2 + c^2 R^4).

A finding that is known and absent is a 0 in every part: a record whose K findings are all known costs no more than
another. Which findings a site labels at all is public: those that it does not are no part of u, and the number of
records has an entry for each set of findings that sites label, of which a record is in one. Counting the
known ones in place of the unknown would put K ones into each such vector, and sqrt(K) times the
noise; how many records know a finding follows all the same, from how many there are less those that do not.

A record beyond a cap is scaled down as a whole, to norm S: that is the rule of each record by itself. A patient of up
to R records has the sum of their vectors, of norm up to R S. It is clipped to S too. Noise for R S without clipping
would be R times as large, and give a patient of R like records the same share of signal, and one of fewer records less.
So S bounds whatever a record or patient is; the caps say what is left whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from common.findings import are_findings, label_vectors
from common.kernels import fourier_features
from common.privacy.clipping import NEIGHBOURING, ClippedSum
from common.privacy.noise import NoiseSource
from common.records import UnitBatch, clip_to_ball

# of the counts where they serve training, as class shares and as the total that rates are scaled by
TRAINING_COUNT_WEIGHT = 0.6


@dataclass(frozen=True)
class StatisticsSpec:
    """What is released, and with which share of the sensitivity.

    Attributes:
        dim: d_x.
        num_classes: K.
        radius: R, embeddings are clipped to this norm; 1 holds all of unit length.
        count_weight: a. class_weight: b. total_weight: t. moment_weight: c. feature_weight: e; 0 leaves a part out.
        frequencies: (D / 2, d_x), public, for the Fourier features; None without them.
        max_positives: P, of records with findings; 0 where a record has one class.
        max_unknowns: U. unknown_weight: v. pair_weight: w.
        label_sets: the sets of findings that sites label, by number; empty where all label all.
    """

    dim: int
    num_classes: int
    radius: float = 1.0
    count_weight: float = 0.3
    class_weight: float = 1.0
    total_weight: float = 1.0
    moment_weight: float = 0.0
    feature_weight: float = 0.0
    frequencies: Tensor | None = None
    max_positives: int = 0
    max_unknowns: int = 0
    unknown_weight: float = 0.3
    pair_weight: float = 0.6
    label_sets: tuple[tuple[int, ...], ...] = ()

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the weighted vector to adding or removing one unit."""
        square, most = self.radius * self.radius, max(self.max_positives, 1)
        counted = self.count_weight**2
        if self.max_positives > 0:
            counted = counted * (1 + most) + self.unknown_weight**2 * self.max_unknowns
            counted += self.pair_weight**2 * most * (most - 1) / 2
        return math.sqrt(
            counted
            + (self.class_weight**2 * most + self.total_weight**2) * square
            + self.moment_weight**2 * square * square
            + self.feature_weight**2
        )

    @property
    def labelled(self) -> Tensor:
        """(G, K) float64, 1 for the findings of each set that sites label."""
        marks = torch.zeros(max(len(self.label_sets), 1), self.num_classes, dtype=torch.float64)
        for row, members in zip(marks, self.label_sets or (tuple(range(self.num_classes)),), strict=True):
            row[list(members)] = 1.0
        return marks

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every part of the release, by name."""
        parts: dict[str, tuple[int, ...]] = {}
        if self.max_positives > 0:
            parts["records"] = (max(len(self.label_sets), 1),)
            parts["unknown_counts"] = (self.num_classes,)
            parts["pair_counts"] = (self.num_classes * (self.num_classes - 1) // 2,)
        if self.count_weight > 0:
            parts["class_counts"] = (self.num_classes,)
        if self.class_weight > 0:
            parts["class_sums"] = (self.num_classes, self.dim)
        if self.total_weight > 0:
            parts["total_sum"] = (self.dim,)
        if self.moment_weight > 0:
            parts["second_moment"] = (self.dim * (self.dim + 1) // 2,)
        if self.feature_weight > 0 and self.frequencies is not None:
            parts["class_features"] = (self.num_classes, 2 * self.frequencies.shape[0])
        return parts


def class_means_spec(dim: int, num_classes: int) -> StatisticsSpec:
    """Counts and class sums alone: the best use of a whole budget for class means."""
    return StatisticsSpec(dim, num_classes, total_weight=0.0)


def statistics_sum(spec: StatisticsSpec, batch: UnitBatch) -> ClippedSum:
    """Weighted sums of every part over all units, each unit's whole vector clipped to the sensitivity.

    Args:
        spec: what is summed.
        batch: all units of the site (no sampling).

    Returns:
        The sums, not yet noised, in float64: no sum over units of float32 records overflows it. Sensitivity
        `spec.sensitivity` for adding or removing one unit, rounding of the unit's part included. A unit that is not
        finite contributes zero.

    Raises:
        ConfigError: the site labels a set of findings that the run does not know; which one it labels is public.
    """
    embeddings = clip_to_ball(batch.embeddings.double(), spec.radius)
    present = batch.mask.double()
    one_hot = label_vectors(batch.labels, spec.num_classes, torch.float64) * present[..., None]
    unknown = None
    if are_findings(batch.labels):
        if not 0 <= batch.label_set < len(spec.labelled):
            raise ConfigError("this site labels a set of findings that no site had when the run began")
        unknown = torch.where(batch.labels < 0, present[..., None], 0.0) * spec.labelled[batch.label_set].to(present)
    features = None
    if spec.feature_weight > 0 and spec.frequencies is not None:
        features = fourier_features(embeddings, spec.frequencies.double())
    norms = _unit_norms(spec, embeddings, present, one_hot, unknown, features)
    # inner products of d numbers err by at most d roundings, and a unit's norm adds those of all pairs of its records
    rounding = (spec.dim + 64) * batch.mask.shape[1] ** 2 * 2.0**-52
    weight = (spec.sensitivity / (1.0 + rounding) / norms.clamp(min=1e-12)).clamp(max=1.0)
    usable = torch.isfinite(norms) & torch.isfinite(embeddings).all(-1).all(-1)
    embeddings = torch.where(usable[:, None, None], embeddings, 0.0).flatten(0, 1)
    weights = (present * torch.where(usable, weight, 0.0)[:, None]).flatten()
    hot = one_hot.flatten(0, 1)
    marks = hot * weights[:, None]
    sums: dict[str, Tensor] = {}
    for name, shape in spec.shapes.items():
        if name == "class_counts":
            sums[name] = spec.count_weight * marks.sum(0)
        elif name == "records":
            sums[name] = weights.new_zeros(shape)
            sums[name][batch.label_set] = spec.count_weight * weights.sum()
        elif name == "unknown_counts" and unknown is not None:
            sums[name] = spec.unknown_weight * weights @ unknown.flatten(0, 1)
        elif name == "pair_counts":
            sums[name] = spec.pair_weight * (marks.T @ hot)[tuple(_pairs(spec.num_classes))]
        elif name == "class_sums":
            sums[name] = spec.class_weight * marks.T @ embeddings
        elif name == "total_sum":
            sums[name] = spec.total_weight * weights @ embeddings
        elif name == "second_moment":
            sums[name] = spec.moment_weight * pack_symmetric((embeddings * weights[:, None]).T @ embeddings)
        elif name == "class_features" and features is not None:
            sums[name] = spec.feature_weight * marks.T @ features.flatten(0, 1).nan_to_num(0.0)
    return ClippedSum(sums, spec.sensitivity, NEIGHBOURING)


def release_statistics(
    spec: StatisticsSpec, batch: UnitBatch, noise_multiplier: float, source: NoiseSource
) -> dict[str, Tensor]:
    """The site's noised statistics: one Gaussian release with std = noise_multiplier x sensitivity.

    Args:
        spec: what is released.
        batch: all units of the site.
        noise_multiplier: σ >= 0; 0 only in a run without a guarantee.
        source: exact discrete noise where it is secure.

    Returns:
        Float32 tensors, unweighted (counts are counts); private for adding or removing one unit.

    Source: Eq. 11 of the paper, which has no budget for them; Balle & Wang (2018) for the single release.
    """
    summed = statistics_sum(spec, batch)
    std = noise_multiplier * summed.sensitivity
    weights = part_weights(spec)
    released: dict[str, Tensor] = {}
    for name, value in summed.tensors.items():
        noisy = torch.from_numpy(source.exact_gaussian(value.numpy(), std)) if std > 0 else value
        # Eq. (11), what meta-codes are fitted to
        released[name] = (noisy / weights[name]).float()
    return released


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Upper triangle with off-diagonal entries times sqrt(2): an isometry, so noise on it is charged once an entry."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns] * torch.where(rows == columns, 1.0, math.sqrt(2.0)).to(matrix)


def unpack_symmetric(packed: Tensor, dim: int) -> Tensor:
    """The inverse of `pack_symmetric`: (dim (dim + 1) / 2,) -> (dim, dim)."""
    rows, columns = torch.triu_indices(dim, dim)
    values = packed * torch.where(rows == columns, 1.0, math.sqrt(0.5)).to(packed)
    matrix = packed.new_zeros(dim, dim)
    matrix[rows, columns] = values
    matrix[columns, rows] = values
    return matrix


def part_weights(spec: StatisticsSpec) -> dict[str, float]:
    """By what each part of the summed vector was multiplied."""
    return {
        "class_counts": spec.count_weight,
        "class_sums": spec.class_weight,
        "total_sum": spec.total_weight,
        "second_moment": spec.moment_weight,
        "class_features": spec.feature_weight,
        "records": spec.count_weight,
        "unknown_counts": spec.unknown_weight,
        "pair_counts": spec.pair_weight,
    }


def unpack_pairs(packed: Tensor, num_findings: int) -> Tensor:
    """Counts of pairs j < k as a symmetric matrix with 0 along its diagonal: (K (K - 1) / 2,) -> (K, K)."""
    matrix = packed.new_zeros(num_findings, num_findings)
    matrix[tuple(_pairs(num_findings))] = packed
    return matrix + matrix.T


def _pairs(num_findings: int) -> Tensor:
    return torch.triu_indices(num_findings, num_findings, 1)


def _unit_norms(
    spec: StatisticsSpec,
    embeddings: Tensor,
    present: Tensor,
    one_hot: Tensor,
    unknown: Tensor | None,
    features: Tensor | None,
) -> Tensor:
    """Norm of every unit's vector from inner products between its records: (U,)."""
    same = one_hot @ one_hot.mT
    both = present[:, :, None] * present[:, None, :]
    inner = embeddings @ embeddings.mT
    gram = spec.count_weight**2 * same + spec.class_weight**2 * same * inner
    gram = gram + both * (spec.total_weight**2 * inner + spec.moment_weight**2 * inner * inner)
    if unknown is not None:
        # two records with s findings in common have s (s - 1) / 2 pairs of them in common
        gram = gram + spec.count_weight**2 * both + spec.unknown_weight**2 * (unknown @ unknown.mT)
        gram = gram + spec.pair_weight**2 * (same * (same - 1.0) / 2.0)
    if features is not None:
        gram = gram + spec.feature_weight**2 * same * (features @ features.mT)
    return gram.sum((1, 2)).clamp(min=0.0).sqrt()

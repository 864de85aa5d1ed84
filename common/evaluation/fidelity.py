"""How near a synthetic set is to real embeddings: distances between sets, coverage, and tests.

Every measure here reads real records without noise, and good ones reveal members: compute them where the
records are and leave the results there, unless the data set is public. All are estimated from samples; two
tables may be compared only where the row counts, bandwidths and neighbours are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from common.evaluation.neighbours import ManifoldScores, check_sets, manifold_scores
from common.evaluation.nonlinear_heads import MLPConfig, fit_mlp_head
from common.evaluation.scores import accuracy
from common.kernels import gaussian_kernel

_TWO_SAMPLE = MLPConfig(width=64, epochs=10, min_steps=200)


@dataclass(frozen=True)
class FidelityConfig:
    """Settings that two compared results must share; bandwidths in units of the embeddings (here unit
    length).

    At most `max_rows` of each side are used, drawn with the generator passed in; the fewer of the two
    counts for the two-sample test.
    """

    bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0)
    neighbours: int = 5
    max_rows: int = 2000
    two_sample: MLPConfig = _TWO_SAMPLE

    def __post_init__(self) -> None:
        if len(self.bandwidths) == 0 or min(self.bandwidths) <= 0:
            raise ConfigError(f"expected bandwidths above 0, found {self.bandwidths}")
        if self.neighbours < 1 or self.max_rows < self.neighbours + 2:
            raise ConfigError(
                f"expected neighbours of at least 1 and max_rows of at least neighbours + 2, "
                f"found {self.neighbours} and {self.max_rows}"
            )


@dataclass(frozen=True)
class Fidelity:
    """All measures of one pair of sets. A measure that needs more rows than there are is None."""

    real_rows: int
    synthetic_rows: int
    mmd2: float
    frechet: float | None
    manifold: ManifoldScores | None
    two_sample: float | None


def chunked_mmd2(real: Tensor, synthetic: Tensor, bandwidths: Sequence[float], chunk: int = 1024) -> float:
    """MMD² with a Gaussian kernel averaged over bandwidths, for sets whose kernel matrix is large.

    Args:
        real: (n, d).
        synthetic: (m, d).
        bandwidths: h of exp(−|x − y|² / 2h²), in units of the embeddings.
        chunk: at most chunk x chunk kernel values a bandwidth are held.

    Returns:
        The V-statistic of Eq. 6, at least 0.

    Source: Gretton et al. 2012, eq. 5.
    """
    check_sets(real, synthetic, 1)
    real, synthetic = real.double(), synthetic.double()

    def mean_kernel(left: Tensor, right: Tensor) -> float:
        blocks = ((a, b) for a in torch.split(left, chunk) for b in torch.split(right, chunk))
        return sum(float(gaussian_kernel(a, b, bandwidths).sum()) for a, b in blocks) / (len(left) * len(right))

    return mean_kernel(real, real) + mean_kernel(synthetic, synthetic) - 2 * mean_kernel(real, synthetic)


def frechet_distance(real: Tensor, synthetic: Tensor) -> float:
    """Squared Fréchet distance between Gaussians with the two sets' means and covariances.

    Biased upwards by about a term of order d / n: compare equal row counts only.

    Args:
        real: (n, d), n >= 2.
        synthetic: (m, d), m >= 2.

    Returns:
        |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½), in squared units of the embeddings.

    Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    check_sets(real, synthetic, 2)
    first, second = torch.cov(real.double().T), torch.cov(synthetic.double().T)
    width = real.shape[1]
    first, second = first.reshape(width, width), second.reshape(width, width)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    shift = (real.double().mean(0) - synthetic.double().mean(0)).square().sum()
    return max(float(shift + first.trace() + second.trace() - 2 * product), 0.0)


def two_sample_accuracy(
    real: Tensor, synthetic: Tensor, generator: torch.Generator, config: MLPConfig | None = None
) -> float:
    """Held-out accuracy of a network that tells real rows from synthetic ones.

    Both sides are cut to the fewer rows; half of each trains, the other half is scored.

    Args:
        real: (n, d), n >= 4.
        synthetic: (m, d), m >= 4.
        generator: draws the rows, the halves and the network's start.
        config: the network.

    Returns:
        Accuracy in [0, 1]: about 0.5 where the sets can't be told apart, 1 where they always can.

    Source: Lopez-Paz and Oquab 2017, sec. 3.
    """
    check_sets(real, synthetic, 4)
    count = min(len(real), len(synthetic))
    sides = [side[torch.randperm(len(side), generator=generator)[:count]] for side in (real, synthetic)]
    half = count // 2
    train = torch.cat([side[:half] for side in sides])
    held_out = torch.cat([side[half:] for side in sides])
    train_labels = torch.arange(2).repeat_interleave(half)
    head = fit_mlp_head(train, train_labels, 2, generator, config)
    return accuracy(torch.arange(2).repeat_interleave(count - half), head.logits(held_out).argmax(1))


def fidelity(
    real: Tensor, synthetic: Tensor, generator: torch.Generator, config: FidelityConfig | None = None
) -> Fidelity:
    """All measures of one pair of sets, on at most `max_rows` of each.

    Args:
        real: (n, d), n >= 1: rows that the generator did not see, where there are enough.
        synthetic: (m, d), m >= 1.
        generator: draws the rows and the two-sample test.
        config: bandwidths, neighbours and row counts.
    """
    config = FidelityConfig() if config is None else config
    check_sets(real, synthetic, 1)
    real, synthetic = (
        side[torch.randperm(len(side), generator=generator)[: config.max_rows]] for side in (real, synthetic)
    )
    fewest = min(len(real), len(synthetic))
    return Fidelity(
        real_rows=len(real),
        synthetic_rows=len(synthetic),
        mmd2=chunked_mmd2(real, synthetic, config.bandwidths),
        frechet=frechet_distance(real, synthetic) if fewest >= 2 else None,
        manifold=manifold_scores(real, synthetic, config.neighbours) if fewest > config.neighbours else None,
        two_sample=two_sample_accuracy(real, synthetic, generator, config.two_sample) if fewest >= 4 else None,
    )

"""Fits of linear heads against scikit-learn, a textbook formula, and stated properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from common.errors import ConfigError, DataError
from common.evaluation.heads import (
    FineTuneConfig,
    HeadConfig,
    LinearHead,
    center_and_scale,
    fine_tune_head,
    fit_linear_head,
    gaussian_head,
)

CLASSES, WIDTH = 3, 5


def _blobs(seed: int, rows: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    return means[labels] + spread * torch.randn(rows, WIDTH, generator=generator), labels


def test_fit_linear_head_agrees_with_scikit_learn() -> None:
    x, y = _blobs(1, 400)
    config = HeadConfig(l2=0.02, tolerance=1e-7)
    head = fit_linear_head(x, y, CLASSES, config)
    center = x.mean(0)
    scale = (x - center).square().mean().sqrt()
    # Its penalty is ½‖W‖² against C times the *summed* loss.
    other = LogisticRegression(C=1 / (config.l2 * len(y)), tol=1e-10, max_iter=5000).fit(
        ((x - center) / scale).numpy(), y
    )
    expected = torch.from_numpy(other.predict_proba(((x - center) / scale).numpy())).float()
    assert torch.allclose(head.probabilities(x), expected, atol=2e-4)


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_fit_linear_head_does_not_depend_on_the_scale_or_origin(factor: float) -> None:
    x, y = _blobs(2, 200)
    config = HeadConfig(tolerance=1e-6)
    moved = factor * (x + 4.0)
    expected = fit_linear_head(x, y, CLASSES, config).probabilities(x)
    assert torch.allclose(fit_linear_head(moved, y, CLASSES, config).probabilities(moved), expected, atol=2e-3)


def test_fit_linear_head_reaches_the_same_minimum_from_anywhere_and_twice_the_same_bits() -> None:
    x, y = _blobs(3, 200)
    config = HeadConfig(tolerance=1e-6)
    first, again = fit_linear_head(x, y, CLASSES, config), fit_linear_head(x, y, CLASSES, config)
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    far = LinearHead(torch.full((CLASSES, WIDTH), 3.0), torch.arange(3.0))
    assert torch.allclose(
        fit_linear_head(x, y, CLASSES, config, far).probabilities(x), first.probabilities(x), atol=1e-3
    )


def test_fit_linear_head_starts_at_initial() -> None:
    x, y = _blobs(4, 200)
    start = LinearHead(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(5)), torch.ones(CLASSES))
    # A tolerance that any gradient meets: the start comes back, carried through the scaling and out again.
    stopped = fit_linear_head(x, y, CLASSES, HeadConfig(tolerance=1e6), start)
    assert torch.allclose(stopped.logits(x), start.logits(x), atol=1e-4)


def test_fit_linear_head_with_absent_classes_never_predicts_them() -> None:
    x, y = _blobs(6, 100)
    head = fit_linear_head(x[y == 1], y[y == 1], CLASSES)
    assert bool((head.logits(x).argmax(1) == 1).all())


def test_fit_linear_head_with_identical_rows_learns_the_class_shares() -> None:
    head = fit_linear_head(torch.ones(4, 2), torch.tensor([0, 0, 0, 1]), 2, HeadConfig(tolerance=1e-7))
    assert torch.allclose(head.probabilities(torch.ones(1, 2)), torch.tensor([[0.75, 0.25]]), atol=1e-3)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "n >= 1"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), r"\(2, 2\) and \(3,\)"),
        (torch.zeros(2, 2), torch.tensor([0, 3]), "0 to 3"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), "integer labels"),
        (torch.tensor([[0.0], [float("nan")]]), torch.tensor([0, 1]), r"first \[1\]"),
    ],
)
def test_fit_linear_head_refuses_bad_data(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_linear_head(x, y, CLASSES)


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"l2": -1.0}, {"l2": float("nan")}, {"max_iterations": 0}, {"tolerance": 0.0}):
        with pytest.raises(ConfigError):
            HeadConfig(**settings)
    with pytest.raises(ConfigError):
        FineTuneConfig(logit_scale=-0.1)


def test_gaussian_head_gives_the_bayes_posterior() -> None:
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(CLASSES, WIDTH, generator=generator)
    root = torch.randn(WIDTH, WIDTH, generator=generator)
    covariance, priors = root @ root.T + torch.eye(WIDTH), torch.tensor([0.2, 0.5, 0.3])
    x = torch.randn(8, WIDTH, generator=generator)
    joint = torch.stack(
        [
            prior.log() + torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
            for mean, prior in zip(means, priors, strict=True)
        ],
        dim=1,
    )
    assert torch.allclose(gaussian_head(means, covariance, 10 * priors).probabilities(x), joint.softmax(1), atol=1e-5)


def test_gaussian_head_with_a_diagonal_equals_the_full_matrix() -> None:
    means, diagonal, priors = (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(8)),
        torch.arange(1.0, 5),
        torch.ones(3),
    )
    full, short = gaussian_head(means, torch.diag(diagonal), priors), gaussian_head(means, diagonal, priors)
    assert torch.allclose(full.weight, short.weight)
    assert torch.allclose(full.bias, short.bias)


def test_gaussian_head_refuses_what_is_no_covariance() -> None:
    with pytest.raises(DataError, match="positive definite"):
        gaussian_head(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.ones(2))
    with pytest.raises(DataError, match="positive definite"):
        gaussian_head(torch.zeros(2, 2), torch.tensor([1.0, 0.0]), torch.ones(2))
    with pytest.raises(DataError, match="priors"):
        gaussian_head(torch.zeros(2, 2), torch.eye(2), torch.tensor([1.0, -1.0]))


def test_gaussian_head_agrees_with_scikit_learn() -> None:
    x, y = _blobs(9, 300)
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy().astype(np.float64), y.numpy())
    probabilities = torch.from_numpy(expected.predict_proba(x.numpy().astype(np.float64))).float()
    means = torch.stack([x[y == label].double().mean(0) for label in range(CLASSES)])
    centred = x.double() - means[y]
    head = gaussian_head(means, centred.T @ centred / len(y), torch.bincount(y).double())
    assert torch.allclose(head.probabilities(x), probabilities, atol=1e-3)


def test_fine_tune_head_pulled_without_end_only_flattens() -> None:
    x, y = _blobs(11, 50)
    start = fit_linear_head(x, y, CLASSES)
    tuned = fine_tune_head(start, x, y, FineTuneConfig(logit_scale=0.7, proximal=1e6))
    assert torch.allclose(tuned.logits(x), 0.7 * start.logits(x), atol=1e-4)


def test_fine_tune_head_moves_towards_the_site_and_less_with_a_stronger_pull() -> None:
    x, y = _blobs(12, 200)
    start = LinearHead(torch.zeros(CLASSES, WIDTH), torch.zeros(CLASSES))
    free = fine_tune_head(start, x, y, FineTuneConfig(proximal=0.0))
    held = fine_tune_head(start, x, y, FineTuneConfig(proximal=10.0))
    assert float(held.weight.norm()) < 0.5 * float(free.weight.norm())
    loss = torch.nn.functional.cross_entropy
    assert float(loss(free.logits(x), y)) < float(loss(held.logits(x), y)) < float(loss(start.logits(x), y))


def test_fine_tune_head_refuses_another_width() -> None:
    x, y = _blobs(13, 20)
    with pytest.raises(DataError, match="width 5"):
        fine_tune_head(LinearHead(torch.zeros(CLASSES, 4), torch.zeros(CLASSES)), x, y)


def test_fine_tune_head_minimises_its_stated_objective() -> None:
    x, y = _blobs(14, 60)
    center, scale = x.mean(0), (x - x.mean(0)).square().mean().sqrt()
    start = LinearHead(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(15)), torch.ones(CLASSES))
    config = FineTuneConfig(logit_scale=0.5, proximal=0.1, tolerance=1e-7)
    tuned = fine_tune_head(start, x, y, config)
    weight, bias = tuned.weight.clone().requires_grad_(), tuned.bias.clone().requires_grad_()
    # At the minimum the gradient, taken here by autograd in the coordinates of x, is zero.
    shift_bias = (bias + weight @ center) - 0.5 * (start.bias + start.weight @ center)
    pull = (scale * (weight - 0.5 * start.weight)).square().sum() + shift_bias.square().sum()
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + 0.5 * config.proximal * pull
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert float(gradient.abs().max()) < 1e-4


def _findings(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Two findings along axes of their own, a fifth of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    y = (x[:, :2] + torch.randn(rows, 2, generator=generator) > 0.5).to(torch.int8)
    y[torch.rand(rows, 2, generator=generator) < 0.2] = -1
    return x, y


def test_each_finding_is_a_logistic_regression_over_the_records_where_it_is_known() -> None:
    x, y = _findings(4, 300)
    config = HeadConfig(l2=0.02, tolerance=1e-7)
    head = fit_linear_head(x, y, 2, config)
    assert head.findings
    center, scale = center_and_scale(x)
    scaled = ((x - center) / scale).numpy()
    for finding in range(2):
        known = y[:, finding].numpy() >= 0
        other = LogisticRegression(C=1 / (config.l2 * known.sum()), tol=1e-10, max_iter=5000)
        other.fit(scaled[known], y[known, finding].numpy())
        expected = torch.from_numpy(other.predict_proba(scaled)[:, 1]).float()
        assert torch.allclose(head.probabilities(x)[:, finding], expected, atol=2e-4)


def test_what_is_unknown_plays_no_part_in_a_fit() -> None:
    x, y = _findings(5, 100)
    row = int(torch.nonzero((y == -1).all(dim=1))[0])
    moved = x.clone()
    moved[row] = x.mean(0)  # centre and scale are of all rows: a row in the middle leaves the centre alone
    kept = torch.arange(100) != row
    config = HeadConfig(l2=0.0, tolerance=1e-8, max_iterations=5000)  # without a penalty the scale plays no part
    expected = fit_linear_head(x[kept], y[kept], 2, config).probabilities(x)
    assert torch.allclose(fit_linear_head(moved, y, 2, config).probabilities(x), expected, atol=2e-3)


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_finding_of_one_value_leaves_the_others_and_is_finite(value: int) -> None:
    x, y = _findings(6, 100)
    alone = fit_linear_head(x, y[:, :1], 1)
    y[:, 1] = value
    both = fit_linear_head(x, y, 2)
    assert torch.allclose(both.probabilities(x)[:, 0], alone.probabilities(x)[:, 0], atol=2e-3)
    chances = both.probabilities(x)[:, 1]
    assert bool(torch.isfinite(chances).all())
    assert {-1: bool((chances == 0.5).all()), 0: float(chances.max()) < 0.1, 1: float(chances.min()) > 0.9}[value]


def test_findings_are_fine_tuned_towards_a_global_head() -> None:
    x, y = _findings(7, 60)
    strong = fit_linear_head(*_findings(8, 2000), 2)
    near = fine_tune_head(strong, x, y, FineTuneConfig(logit_scale=1.0, proximal=1e4))
    assert near.findings
    assert torch.allclose(near.probabilities(x), strong.probabilities(x), atol=1e-2)


def test_fits_refuse_findings_of_no_meaning() -> None:
    x, y = _findings(9, 20)
    y[3, 1] = 2
    with pytest.raises(DataError, match="-1"):
        fit_linear_head(x, y, 2)
    with pytest.raises(DataError, match=r"\(n, 3\)"):
        fit_linear_head(x, y, 3)

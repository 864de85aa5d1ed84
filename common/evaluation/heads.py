"""Fits of linear heads on embeddings: logistic regression, fine-tuning at a site, Gaussian classes.

A head is what a person trains on a published synthetic set, and what every method of the comparison is
judged by. The fits are convex problems solved to a tolerance, with no random number in them, so that no row
of a table owes its place to an undertrained rival. Nothing here is private by itself: a head fitted on a
site's records stays at the site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError, DataError
from common.findings import are_findings

_SMALLEST_PRIOR = 1e-12


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of embeddings: `logits = x weightᵀ + bias`; weight (K, d), bias (K,).

    `findings` says that the K outputs are yes/no answers of their own, and not one choice among K classes.
    """

    weight: Tensor
    bias: Tensor
    findings: bool = False

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits (n, K) of embeddings (n, d)."""
        return embeddings.to(self.weight.dtype) @ self.weight.T + self.bias

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """Probabilities (n, K) of embeddings (n, d): of classes, rows summing to one; or of each finding."""
        return probabilities_of(self.logits(embeddings), findings=self.findings)

    def scaled(self, factor: float) -> LinearHead:
        """The same decisions with all logits multiplied by `factor` > 0: flatter probabilities below one."""
        if not factor > 0:
            raise ConfigError(f"a head's logits can only be scaled by a positive factor, found {factor}")
        return replace(self, weight=self.weight * factor, bias=self.bias * factor)


def probabilities_of(logits: Tensor, *, findings: bool) -> Tensor:
    """Probabilities (n, K) of classes, or of findings."""
    return torch.sigmoid(logits) if findings else torch.softmax(logits, dim=1)


@dataclass(frozen=True)
class HeadConfig:
    """Settings of a fit. Weights are penalised for embeddings centred and divided by one scalar, their RMS.

    `l2` is the weight of ½‖W‖² against the *mean* cross-entropy, of each finding over the records where it is known. On
    OrganAMNIST 0.003 is within 0.2 points of the best accuracy at 1,008 and 16,135 records and within 1.3 at 128, so
    that one value serves all sites, whatever their size. `tolerance` bounds the largest entry of the gradient at the
    end.
    """

    l2: float = 3e-3
    max_iterations: int = 500
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise ConfigError(f"l2 must be a number of at least 0, found {self.l2}")
        if self.max_iterations < 1:
            raise ConfigError(f"max_iterations must be at least 1, found {self.max_iterations}")
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance must be above 0, found {self.tolerance}")


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings of `fine_tune_head`.

    `logit_scale` flattens the global head first, since a private head is over-confident at a site; with 0 the global
    head plays no part. `proximal`
    is the weight of ½(‖W − W₀‖² + ‖b − b₀‖²), for embeddings scaled as in `HeadConfig`.
    """

    logit_scale: float = 0.7
    proximal: float = 0.015
    max_iterations: int = 500
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not (self.logit_scale >= 0 and self.proximal >= 0):
            raise ConfigError(
                f"fine-tuning needs logit_scale >= 0 and proximal >= 0, found {self.logit_scale} and {self.proximal}"
            )
        HeadConfig(0.0, self.max_iterations, self.tolerance)


def fit_linear_head(
    embeddings: Tensor,
    labels: Tensor,
    num_classes: int,
    config: HeadConfig | None = None,
    initial: LinearHead | None = None,
) -> LinearHead:
    """Logistic regression, L2-regularised, by L-BFGS to a tolerance: multinomial, or one for each finding.

    Args:
        embeddings: (n, d), n >= 1, any floating type and any scale.
        labels: (n,), integers in [0, num_classes), of which some may be absent; or findings (n, num_classes) int8 with
            1 present, 0 absent, -1 unknown: what is unknown takes no part.
        num_classes: K, classes or findings.
        config: penalty and stopping rule.
        initial: where to start; changes the time taken, not the minimum.

    Returns:
        The head for the embeddings as given, in float32.

    Raises:
        DataError: "expected embeddings (n, d) and labels (n,) ..., found ...".
    """
    config = HeadConfig() if config is None else config
    x, y = check_rows(embeddings, labels, num_classes)
    center, scale = center_and_scale(x)
    anchor = torch.zeros(num_classes, x.shape[1] + 1)
    start = anchor if initial is None else _to_scaled(_matching(initial, num_classes, x.shape[1]), center, scale)
    # The bias is free: a penalty on it would pull the class shares towards equal ones.
    penalty = torch.full((x.shape[1] + 1,), config.l2)
    penalty[-1] = 0.0
    fitted = _minimise((x - center) / scale, y, start, anchor, penalty, config.max_iterations, config.tolerance)
    return _from_scaled(fitted, center, scale, y.ndim == 2)


def fine_tune_head(
    initial: LinearHead, embeddings: Tensor, labels: Tensor, config: FineTuneConfig | None = None
) -> LinearHead:
    """A site's own head: the fit to its records that is pulled towards a global head.

    The result and its scores depend on the site's records without noise: neither may leave the site.

    Args:
        initial: global head, (K, d).
        embeddings: the site's training embeddings (n, d).
        labels: (n,), integers in [0, K); or findings (n, K), as `fit_linear_head`.
        config: strength of the pull and stopping rule.

    Returns:
        The personal head, in float32.

    Raises:
        DataError: as `fit_linear_head`.

    Source: Li et al. 2020 (FedProx), eq. 2, for its proximal term.
    """
    config = FineTuneConfig() if config is None else config
    num_classes = initial.weight.shape[0]
    x, y = check_rows(embeddings, labels, num_classes)
    center, scale = center_and_scale(x)
    matching = _matching(initial, num_classes, x.shape[1])
    flattened = LinearHead(matching.weight * config.logit_scale, matching.bias * config.logit_scale)
    anchor = _to_scaled(flattened, center, scale)
    penalty = torch.full((x.shape[1] + 1,), config.proximal)
    fitted = _minimise((x - center) / scale, y, anchor, anchor, penalty, config.max_iterations, config.tolerance)
    return _from_scaled(fitted, center, scale, y.ndim == 2)


def gaussian_head(class_means: Tensor, covariance: Tensor, priors: Tensor) -> LinearHead:
    """Bayes' rule for Gaussian classes that share one covariance (the LDA head).

    Args:
        class_means: (K, d).
        covariance: (d, d), positive definite, or its diagonal (d,).
        priors: (K,), not negative; need not sum to one. A class of prior 0 is all but never predicted.

    Returns:
        The head W = Σ⁻¹μ, b = log π − ½ μᵀΣ⁻¹μ, in float32.

    Raises:
        DataError: the covariance is not positive definite, or shapes disagree.

    Source: Fisher 1936; Hastie, Tibshirani and Friedman 2009, eq. 4.10.
    """
    num_classes, width = class_means.shape
    if covariance.shape not in {(width, width), (width,)} or priors.shape != (num_classes,):
        raise DataError(
            f"expected means (K, d), a covariance (d, d) or (d,) and priors (K,), found "
            f"{tuple(class_means.shape)}, {tuple(covariance.shape)} and {tuple(priors.shape)}"
        )
    if not (bool((priors >= 0).all()) and float(priors.sum()) > 0):
        raise DataError("expected priors that are not negative, with a positive sum: check the class counts")
    means, sigma = class_means.double(), covariance.double()
    if sigma.ndim == 1:
        definite, weight = bool((sigma > 0).all()), means / sigma
    else:
        factor, info = torch.linalg.cholesky_ex(sigma)
        definite, weight = int(info) == 0, torch.cholesky_solve(means.T, factor).T
    if not definite:
        raise DataError("expected a positive definite covariance: add a ridge to its diagonal")
    shares = (priors.double() / priors.double().sum()).clamp(min=_SMALLEST_PRIOR)
    bias = shares.log() - 0.5 * (means * weight).sum(1)
    return LinearHead(weight.float(), bias.float())


def _minimise(
    x: Tensor,
    y: Tensor,
    start: Tensor,
    anchor: Tensor,
    penalty: Tensor,
    max_iterations: int,
    tolerance: float,
) -> Tensor:
    """Mean cross-entropy + ½ Σ penalty · (parameters − anchor)², over parameters (K, d + 1), bias last."""
    rows, findings = torch.arange(len(y)), y.ndim == 2
    known = (y >= 0).to(x.dtype)
    weights, wanted = known / known.sum(0).clamp(min=1), (y == 1).to(x.dtype)

    def loss_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        parameters = torch.from_numpy(flat).to(torch.float32).view(start.shape)
        scores = torch.addmm(parameters[:, -1], x, parameters[:, :-1].T)
        pull = penalty * (parameters - anchor)
        if findings:
            loss = (weights * (functional.softplus(scores) - wanted * scores)).sum(dtype=torch.float64)
            residual = weights * (torch.sigmoid(scores) - wanted)
        else:
            log_probabilities = torch.log_softmax(scores, dim=1)
            loss = -log_probabilities[rows, y].mean(dtype=torch.float64)
            residual = log_probabilities.exp()
            residual[rows, y] -= 1.0
            residual /= len(y)
        loss = loss + 0.5 * (pull * (parameters - anchor)).sum(dtype=torch.float64)
        gradient = torch.cat([residual.T @ x, residual.sum(0)[:, None]], dim=1) + pull
        return float(loss), gradient.double().flatten().numpy()

    from scipy.optimize import minimize  # here, since a site starts a process for every message and few fit a head

    options = {"maxiter": max_iterations, "gtol": tolerance, "ftol": 1e-10}
    flat_start = start.double().flatten().numpy()
    result = minimize(loss_and_gradient, flat_start, jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(result.x).to(torch.float32).view(start.shape)


def check_rows(embeddings: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The two in float32 and int64 (of findings int8), or a DataError."""
    findings = are_findings(labels) and labels.ndim == 2
    shape = (*embeddings.shape[:1], num_classes) if findings else embeddings.shape[:1]
    if embeddings.ndim != 2 or labels.shape != shape or len(labels) == 0:
        raise DataError(
            f"expected embeddings (n, d) and labels (n,), or int8 findings (n, {num_classes}), with n >= 1, found "
            f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    if findings and not bool(((labels >= -1) & (labels <= 1)).all()):
        raise DataError("expected findings of 1, 0 and -1 (unknown), found others")
    if not findings and (labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise DataError(
            f"expected integer labels in [0, {num_classes}), found {labels.dtype} from {labels.min()} to {labels.max()}"
        )
    x = embeddings.to(torch.float32)
    if not bool(torch.isfinite(x).all()):
        rows = torch.nonzero(~torch.isfinite(x).all(dim=1)).flatten().tolist()
        raise DataError(f"expected finite embeddings, found NaN or infinity in {len(rows)} row(s), first {rows[:5]}")
    return x, labels if findings else labels.to(torch.int64)


def _matching(head: LinearHead, num_classes: int, width: int) -> LinearHead:
    if head.weight.shape != (num_classes, width) or head.bias.shape != (num_classes,):
        raise DataError(
            f"expected a head of {num_classes} classes and width {width}, found "
            f"weight {tuple(head.weight.shape)} and bias {tuple(head.bias.shape)}"
        )
    return head


def center_and_scale(x: Tensor) -> tuple[Tensor, float]:
    """Mean (d,) and one RMS for all coordinates: directions keep their relative weight, the scale goes."""
    center = x.mean(dim=0)
    scale = float((x - center).square().mean().sqrt())
    return center, scale if scale > 0 else 1.0


def _to_scaled(head: LinearHead, center: Tensor, scale: float) -> Tensor:
    """Parameters (K, d + 1), bias last, that act on (x − center) / scale."""
    weight = head.weight.to(torch.float32)
    bias = head.bias.to(torch.float32) + weight @ center
    return torch.cat([weight * scale, bias[:, None]], dim=1)


def _from_scaled(parameters: Tensor, center: Tensor, scale: float, findings: bool) -> LinearHead:
    """The head that acts on x, from parameters that act on (x − center) / scale."""
    weight = parameters[:, :-1] / scale
    return LinearHead(weight, parameters[:, -1] - weight @ center, findings)

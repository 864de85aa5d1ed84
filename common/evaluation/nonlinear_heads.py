"""Heads that are not linear: nearest neighbours and a small network, and what a synthetic set teaches each.

A private generator carries class boundaries long before it carries the shape of the classes. A linear head
sees only the former, so a set of samples is also judged by heads that a linear rule published alone could
not serve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError, DataError
from common.evaluation.heads import (
    HeadConfig,
    LinearHead,
    center_and_scale,
    check_rows,
    fit_linear_head,
    probabilities_of,
)
from common.evaluation.scores import SiteScores, Split, score
from common.findings import label_losses


@dataclass(frozen=True)
class NeighbourHead:
    """Votes of the nearest embeddings (n, d) with labels (n,) or (n, K): Euclidean distance, `neighbours` <= n."""

    embeddings: Tensor
    labels: Tensor
    num_classes: int
    neighbours: int

    def probabilities(self, embeddings: Tensor, chunk: int = 1024) -> Tensor:
        """Vote shares (m, K) for embeddings (m, d), with at most chunk x n distances in memory.

        Of a finding those neighbours vote that know it, and the share of all rows that have it counts as one vote more.
        """
        votes = []
        for block in torch.split(embeddings.to(self.embeddings.dtype), chunk):
            nearest = torch.cdist(block, self.embeddings).topk(self.neighbours, largest=False).indices
            given = self.labels[nearest]
            if self.labels.ndim == 1:
                votes.append(functional.one_hot(given, self.num_classes).to(torch.float32).mean(dim=1))
            else:
                present, known = (given == 1).sum(dim=1), (given >= 0).sum(dim=1)
                votes.append((present + self._prevalence()) / (known + 1))
        return torch.cat(votes)

    def _prevalence(self) -> Tensor:
        return (self.labels == 1).sum(dim=0) / (self.labels >= 0).sum(dim=0).clamp(min=1)


@dataclass(frozen=True)
class MLPHead:
    """One hidden layer of rectified units on (x − center) / scale."""

    center: Tensor
    scale: float
    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor
    findings: bool = False

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits (n, K) of embeddings (n, d)."""
        scaled = (embeddings.to(torch.float32) - self.center) / self.scale
        hidden = torch.relu(scaled @ self.hidden_weight.T + self.hidden_bias)
        return hidden @ self.weight.T + self.bias

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """Probabilities (n, K), of classes or of findings."""
        return probabilities_of(self.logits(embeddings), findings=self.findings)


@dataclass(frozen=True)
class MLPConfig:
    """Settings of `fit_mlp_head`: AdamW over `epochs`, at least `min_steps`, its rate falling to zero."""

    width: int = 128
    epochs: int = 20
    min_steps: int = 500
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.width, self.epochs, self.batch_size) < 1 or self.min_steps < 0:
            raise ConfigError(
                "expected width, epochs and batch_size of at least 1 and min_steps of at least 0, found "
                f"{self.width}, {self.epochs}, {self.batch_size} and {self.min_steps}"
            )


def fit_neighbour_head(embeddings: Tensor, labels: Tensor, num_classes: int, neighbours: int = 15) -> NeighbourHead:
    """A k-nearest-neighbour head; k falls to the number of rows where there are fewer.

    Args:
        embeddings: (n, d), n >= 1.
        labels: (n,), integers in [0, num_classes); or findings (n, num_classes), int8.
        num_classes: K.
        neighbours: k, at least 1.

    Raises:
        DataError: as `common.evaluation.heads.fit_linear_head`.
    """
    if neighbours < 1:
        raise ConfigError(f"neighbours must be at least 1, found {neighbours}")
    x, y = check_rows(embeddings, labels, num_classes)
    return NeighbourHead(x, y, num_classes, min(neighbours, len(y)))


def fit_mlp_head(
    embeddings: Tensor,
    labels: Tensor,
    num_classes: int,
    generator: torch.Generator,
    config: MLPConfig | None = None,
) -> MLPHead:
    """A network of one hidden layer, trained on shuffled batches.

    Args:
        embeddings: (n, d), n >= 1, any scale.
        labels: (n,), integers in [0, num_classes), of which some may be absent; or findings (n, num_classes), int8.
        num_classes: K.
        generator: draws the first weights and the order of the rows.
        config: width and training.

    Raises:
        DataError: as `common.evaluation.heads.fit_linear_head`.
    """
    config = MLPConfig() if config is None else config
    x, y = check_rows(embeddings, labels, num_classes)
    center, scale = center_and_scale(x)
    x = (x - center) / scale
    width = x.shape[1]
    parameters = [
        torch.randn(config.width, width, generator=generator) * (2 / width) ** 0.5,
        torch.zeros(config.width),
        torch.randn(num_classes, config.width, generator=generator) * (1 / config.width) ** 0.5,
        torch.zeros(num_classes),
    ]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    batch_size = min(config.batch_size, len(y))
    batches_per_epoch = len(y) // batch_size
    steps = max(config.epochs * batches_per_epoch, config.min_steps)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        batch = step % batches_per_epoch
        if batch == 0:
            order = torch.randperm(len(y), generator=generator)
        rows = order[batch * batch_size : (batch + 1) * batch_size]
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / steps)
        hidden = torch.relu(x[rows] @ parameters[0].T + parameters[1])
        loss = label_losses(hidden @ parameters[2].T + parameters[3], y[rows]).mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    hidden_weight, hidden_bias, weight, bias = (parameter.detach() for parameter in parameters)
    return MLPHead(center, scale, hidden_weight, hidden_bias, weight, bias, y.ndim == 2)


def score_heads(
    synthetic: Split,
    test: Split,
    num_classes: int,
    generator: torch.Generator,
    linear: HeadConfig | None = None,
    neighbours: int = 15,
    mlp: MLPConfig | None = None,
    fitted: LinearHead | None = None,
) -> dict[str, SiteScores]:
    """Scores on real test rows of a linear, a kNN and an MLP head trained on a synthetic set alone.

    Args:
        synthetic: embeddings (n, d) and labels (n,) to train on.
        test: real rows; they and the scores stay where they are.
        num_classes: K.
        generator: of the MLP's first weights and order.
        linear: settings of the linear head.
        neighbours: k of the kNN head.
        mlp: settings of the MLP head.
        fitted: the linear head, where it is fitted on this synthetic set already; `linear` is not used then.

    Returns:
        `linear`, `knn` and `mlp`.
    """
    if synthetic[0].shape[-1] != test[0].shape[-1]:
        raise DataError(f"expected equal widths, found {synthetic[0].shape[-1]} and {test[0].shape[-1]}")
    x, y = test
    return {
        "linear": score(fit_linear_head(*synthetic, num_classes, linear) if fitted is None else fitted, x, y),
        "knn": score(fit_neighbour_head(*synthetic, num_classes, neighbours).probabilities(x), x, y),
        "mlp": score(fit_mlp_head(*synthetic, num_classes, generator, mlp).probabilities(x), x, y),
    }

"""Labels as models read them: one class a record, or several findings of which some may be unknown.

A finding that nobody knows takes no part: it adds nothing to a loss, and its gradient is exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def are_findings(labels: Tensor) -> bool:
    """Whether labels are findings, int8 (..., K) with 1, 0 or -1; else classes, int64 (...)."""
    return labels.dtype == torch.int8


def label_vectors(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """What models are conditioned on, y: (..., K) with 1 for the class or for each finding that is present, else 0.

    Args:
        labels: classes (...) or findings (..., K); an unknown finding counts as absent here.
        num_classes: K.
        dtype: of the result.
    """
    if are_findings(labels):
        return (labels == 1).to(dtype)
    return functional.one_hot(labels, num_classes).to(dtype)


def label_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every record in nats: (..., K) -> (...).

    Of classes that of the softmax; of findings the sum of the sigmoids' over the findings that are known.

    Args:
        scores: (..., K).
        labels: classes (...) or findings (..., K).
    """
    if are_findings(labels):
        known = (labels >= 0).to(scores.dtype)
        wanted = label_vectors(labels, scores.shape[-1], scores.dtype)
        return functional.binary_cross_entropy_with_logits(scores, wanted, known, reduction="none").sum(-1)
    flat = functional.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


def residuals(scores: Tensor, labels: Tensor) -> Tensor:
    """Gradient of `label_losses` by the scores, (..., K): zero where a finding is unknown."""
    wanted = label_vectors(labels, scores.shape[-1], scores.dtype)
    if are_findings(labels):
        return torch.where(labels >= 0, torch.sigmoid(scores) - wanted, 0.0)
    return torch.softmax(scores, -1) - wanted

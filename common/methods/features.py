"""Embeddings of unit length as a model sees them: around the released centre, scaled; row by row."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from common.methods.base import RunContext, StepInput
from common.methods.constants import CENTRE
from common.records import SiteData, by_unit, clip_to_ball


def normalised(context: RunContext, embeddings: Tensor, centre: Tensor) -> Tensor:
    """Embeddings as the generator sees them: around the centre, clipped; row by row."""
    return clip_to_ball(embeddings - centre, context.config.training.feature_norm)


def feature_scale(context: RunContext, dim: int) -> float:
    """A public factor that brings the coordinates of centred embeddings to about 1."""
    return math.sqrt(dim) / context.config.training.feature_norm


def head_features(context: RunContext, embeddings: Tensor, centre: Tensor) -> Tensor:
    """Embeddings as a non-private head sees them: centred, with coordinates of about 1."""
    return (embeddings - centre) * feature_scale(context, embeddings.shape[-1])


def network_data(context: RunContext, work: StepInput) -> SiteData:
    """A site's records by unit, with coordinates of about 1: centred, clipped; row by row."""
    data = by_unit(work.data, context.config.privacy.unit, context.problem.num_classes)
    rows = normalised(context, data.embeddings, work.params[CENTRE])
    return replace(data, embeddings=rows * feature_scale(context, rows.shape[-1]))

"""DP-Gauss: one noised release of class counts and sums a site, a Gaussian a class, and its LDA head. No training.

The whole budget buys the statistics. A generator that is trained must beat this, or its training is worth nothing.
With `covariance_weight` above 0 the release has a shared second moment too (DP-LDA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import ConfigError
from common.evaluation.heads import LinearHead, gaussian_head
from common.generator.row_law import Middle, RowLaw
from common.methods.base import (
    Artifact,
    Method,
    PrivacyPlan,
    RunContext,
    ServerState,
    Shapes,
    SiteState,
    StepInput,
    Tensors,
)
from common.methods.plans import private_plan
from common.privacy.combined import ReleasedStatistics
from common.privacy.statistics import StatisticsSpec, class_means_spec


def plan(config: RunConfig) -> PrivacyPlan:
    """One release and no round."""
    if config.privacy.statistics_share == 0:
        raise ConfigError("dp_gauss releases statistics and nothing else: set statistics-share above 0, found 0")
    still = config.training.model_copy(update={"num_rounds": 0})
    return private_plan(config.model_copy(update={"training": still}))


def statistics(context: RunContext) -> StatisticsSpec:
    """Class counts and class sums; a shared second moment where asked for."""
    spec = class_means_spec(context.problem.dim, context.problem.num_classes)
    return replace(spec, moment_weight=1.0 if context.config.synthesis.covariance_weight > 0 else 0.0)


def init(context: RunContext) -> ServerState:
    """Nothing is known."""
    problem = context.problem
    return ServerState(
        0,
        {
            "class_means": torch.zeros(problem.num_classes, problem.dim),
            "class_counts": torch.ones(problem.num_classes),
        },
    )


def prepare(context: RunContext, state: ServerState, released: ReleasedStatistics) -> ServerState:
    """The Gaussians: noised class means, counts shrunk towards equal ones, and the covariance if it was released."""
    params = dict(state.params) | {"class_counts": released.total * released.class_shares}
    if released.class_means is not None:
        params["class_means"] = released.class_means
    if released.covariance is not None:
        params["covariance"] = released.covariance
    return replace(state, params=params, statistics=released)


def receives(context: RunContext, site_index: int) -> Shapes:
    """No round, nothing received."""
    return {}


def upload_shapes(context: RunContext) -> Shapes:
    """No round, nothing sent."""
    return {}


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """A site has nothing to do in a round, and reads no record."""
    return work.site, {}


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """Count the round."""
    return replace(state, round=state.round + 1)


def finish(context: RunContext, state: ServerState) -> Artifact:
    """The Gaussians, and the head of Bayes' rule for them."""
    problem = context.problem
    variance = context.config.model.residual_energy / problem.dim
    covariance = state.params.get("covariance", torch.full((problem.dim,), variance))
    head = gaussian_head(state.params["class_means"], covariance, state.params["class_counts"])
    settings: dict[str, str | int | float | bool] = {
        "dim": problem.dim,
        "num_classes": problem.num_classes,
        "observation_variance": variance,
    }
    return Artifact("generator", {**state.params, "head.weight": head.weight, "head.bias": head.bias}, settings)


def law(context: RunContext, artifact: Artifact) -> RowLaw:
    """The class Gaussians; labelled by Bayes' rule. Post-processing."""
    tensors = artifact.tensors
    means, scale, root = tensors["class_means"].double(), 1.0, None
    if "covariance" in tensors:
        # the symmetric root: it does not hang on the eigenvectors that a library picks
        values, vectors = torch.linalg.eigh(tensors["covariance"].double())
        root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    else:
        scale = float(artifact.settings["observation_variance"]) ** 0.5

    def middle(labels: Tensor, uniforms: Tensor, normals: Tensor) -> Middle:
        del uniforms, normals
        return Middle(means[labels], means.new_full((len(labels), 1), scale), torch.zeros_like(labels))

    head = LinearHead(tensors["head.weight"].double(), tensors["head.bias"].double())
    return RowLaw(context.problem.dim, 0, 0, middle, [head], root)


METHOD = Method(
    name="dp_gauss",
    private=True,
    plan=plan,
    statistics=statistics,
    init=init,
    prepare=prepare,
    upload_shapes=upload_shapes,
    client_step=client_step,
    server_step=server_step,
    finish=finish,
    law=law,
    shares_noise=True,
    receives=receives,
)

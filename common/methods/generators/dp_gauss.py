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
from common.findings import label_vectors
from common.generator.finding_rows import OFFSETS
from common.generator.label_tree import LabelTree, joint_shares
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
from common.methods.constants import CENTRE
from common.methods.labels import for_task, label_tensors, with_label_offsets
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
    """Class counts and class sums; a shared second moment where asked for; of findings the total sum too."""
    spec = class_means_spec(context.problem.dim, context.problem.num_classes)
    if context.problem.findings:
        return for_task(context, replace(spec, total_weight=1.0))
    return replace(spec, moment_weight=1.0 if context.config.synthesis.covariance_weight > 0 else 0.0)


def init(context: RunContext) -> ServerState:
    """Nothing is known."""
    problem = context.problem
    if problem.findings:
        nothing = torch.zeros(problem.num_classes, problem.dim)
        return ServerState(0, {CENTRE: torch.zeros(problem.dim), "effects": nothing, "contrasts": nothing})
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
    if context.problem.findings:
        params = {CENTRE: released.centre, **finding_effects(released)}
    elif released.class_means is not None:
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
    settings: dict[str, str | int | float | bool] = {
        "dim": problem.dim,
        "num_classes": problem.num_classes,
        "observation_variance": variance,
    }
    if problem.findings:
        tensors = {**state.params, **label_tensors(context, state.statistics)}
        weight = tensors.pop("contrasts") / variance
        tensors |= {"head.weight": weight, "head.bias": -weight @ tensors[CENTRE]}
        placed = with_label_offsets(_finding_law(context, tensors, variance), tensors)
        placed["head.bias"] = placed["head.bias"] + placed.pop(OFFSETS)
        return Artifact("generator", placed, settings)
    covariance = state.params.get("covariance", torch.full((problem.dim,), variance))
    head = gaussian_head(state.params["class_means"], covariance, state.params["class_counts"])
    return Artifact("generator", {**state.params, "head.weight": head.weight, "head.bias": head.bias}, settings)


def law(context: RunContext, artifact: Artifact) -> RowLaw:
    """The class Gaussians; labelled by Bayes' rule. Post-processing."""
    tensors = artifact.tensors
    if context.problem.findings:
        return _finding_law(context, tensors, float(artifact.settings["observation_variance"]))
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


def finding_effects(released: ReleasedStatistics) -> dict[str, Tensor]:
    """What each finding adds to an embedding, and how records with it differ from those without; post-processing.

    Args:
        released: statistics of findings, with class means.

    Returns:
        `effects` (K, d_x): columns of the linear model x = centre + sum over k of (y_k - share_k) effect_k, by least
        squares from the released moments of the findings and of findings times embeddings. `contrasts` (K, d_x): the
        mean of records with a finding less that of those without.
    """
    if released.prevalence is None or released.class_means is None:
        raise ConfigError("dp_gauss needs the sums of findings, found none in the release")
    share = released.prevalence.double()
    moved = (released.class_means - released.centre).double()
    covariance = joint_shares(released) - torch.outer(share, share)
    covariance.diagonal().copy_(share * (1.0 - share))
    # noise may leave it no positive definite inverse: its eigenvalues are held above a tenth of the least variance
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=float(0.1 * covariance.diagonal().min()))
    effects = vectors @ ((vectors.T @ (share[:, None] * moved)) / values[:, None])
    return {"effects": effects.float(), "contrasts": (moved / (1.0 - share)[:, None]).float()}


def _finding_law(context: RunContext, tensors: Tensors, variance: float) -> RowLaw:
    effects, tree = tensors["effects"].double(), LabelTree.of(tensors)
    share = torch.zeros(len(effects), dtype=torch.float64) if tree is None else tree.prevalence
    origin = tensors[CENTRE].double() - share @ effects

    def middle(labels: Tensor, uniforms: Tensor, normals: Tensor) -> Middle:
        del uniforms, normals
        means = origin + label_vectors(labels, len(effects), torch.float64) @ effects
        scale = means.new_full((len(labels), 1), variance**0.5)
        return Middle(means, scale, torch.zeros(len(labels), dtype=torch.int64))

    head = LinearHead(tensors["head.weight"].double(), tensors["head.bias"].double())
    return RowLaw(context.problem.dim, 0, 0, middle, [head], task=context.problem.task)


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

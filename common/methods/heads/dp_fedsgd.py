"""DP-FedSGD: a linear head from clipped, noised sums of per-example gradients. The honest private rival.

Abadi et al. (2016), one step a round at every site. It is FedHypeVAE's discriminative term and nothing else: the label
columns of a generator without latent and code are the head, so centring, clipping, noise, step and averaging are that
method's own functions on a reduced configuration. What is published is the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from common.config.run import RunConfig
from common.methods.base import Artifact, Method, PrivacyPlan, RunContext, ServerState
from common.methods.constants import CENTRE
from common.methods.fedhypevae import server, site
from common.methods.fedhypevae.rates import CLASS_OFFSETS, generator_shape
from common.methods.heads.linear import head_artifact
from common.methods.plans import private_plan

T = TypeVar("T")


def head_config(config: RunConfig) -> RunConfig:
    """The configuration of a generator that is nothing but a head; noise, rates and centring are kept."""
    model = config.model.model_copy(update={"latent_dim": 0, "code_dim": 0, "trunk_width": 0, "hidden_widths": ""})
    training = config.training.model_copy(
        update={
            "elbo_weight": 0.0,
            "discriminative_weight": 1.0,
            "mmd": "off",
            "lipschitz_penalty": 0.0,
        }
    )
    privacy = config.privacy.model_copy(update={"encoder_training": "sleep"})
    synthesis = config.synthesis.model_copy(update={"covariance_weight": 0.0})
    parts = {"model": model, "training": training, "privacy": privacy, "synthesis": synthesis}
    return config.model_copy(update=parts)


def plan(config: RunConfig) -> PrivacyPlan:
    """As every private method's."""
    return private_plan(head_config(config))


def finish(context: RunContext, state: ServerState) -> Artifact:
    """The averaged head as it acts on embeddings, in place of the generator around it."""
    reduced = _reduced(context)
    generator = server.finish(reduced, state).tensors
    weight = generator[f"{generator_shape(reduced).output_layer}.class_weight"].T
    bias = context.config.training.class_bias_scale * generator["class_bias.weight"]
    if context.problem.findings and CLASS_OFFSETS in state.params:
        bias = bias + state.params[CLASS_OFFSETS]  # the scores as they were trained: findings as often as at the sites
    return head_artifact(context, weight, bias, generator[CENTRE], 1.0)


def _reduced(context: RunContext) -> RunContext:
    return replace(context, config=head_config(context.config))


def _on_head(function: Callable[..., T]) -> Callable[..., T]:
    """One of FedHypeVAE's functions, on the reduced configuration."""

    def call(context: RunContext, *rest: object) -> T:
        return function(_reduced(context), *rest)

    call.__doc__ = function.__doc__
    return call


METHOD = Method(
    name="dp_fedsgd",
    private=True,
    plan=plan,
    statistics=_on_head(server.statistics_spec),
    init=_on_head(server.init),
    init_site=_on_head(server.init_site),
    prepare=_on_head(server.prepare),
    upload_shapes=_on_head(server.upload_shapes),
    client_step=_on_head(site.client_step),
    server_step=_on_head(server.server_step),
    finish=finish,
    upload_weights=_on_head(server.upload_weights),
    shares_noise=True,
    receives=_on_head(server.receives),
)

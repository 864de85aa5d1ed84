"""What an attacker reads off one upload: the analytic inversion of a batch of one, with and without protection.

A linear layer's gradient of one record is an outer product of that record and the loss's gradient: one upload without
noise shows the record up to scale (Zhu et al. 2019; Geiping et al. 2020), and its label. For demonstrations on public
or made-up records only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import ConfigError
from common.generator.layers import PlainLayers, generated_rows
from common.methods import get_method
from common.methods.base import Problem, RunContext, StepInput
from common.methods.fedhypevae.rates import generator_shape
from common.methods.plans import private_plan
from common.privacy.noise import NoiseSource
from common.records import SiteData, on_sphere


@dataclass(frozen=True)
class Inversion:
    """An attack's outcome.

    Attributes:
        embedding: (d_x,) reconstructed direction, of length 1.
        label: reconstructed class.
        cosine: with the record that was attacked; 1 is a perfect reconstruction, 0 is none.
    """

    embedding: Tensor
    label: int
    cosine: float


def invert_batch_of_one(
    config: RunConfig,
    embedding: Tensor,
    label: int,
    num_classes: int,
    noise_multiplier: float,
    source: NoiseSource,
) -> Inversion:
    """Train one real step on one record, and reconstruct the record from what would be sent.

    Args:
        config: the run; the method must be `fedhypevae`.
        embedding: (d_x,) the record, public or made up.
        label: its class.
        num_classes: K >= 3; with two classes the direction's sign stays open.
        noise_multiplier: σ of the step; 0 for a step without protection.
        source: of the noise.

    Returns:
        What the attacker finds. The attacker knows the parameters and the site's code: the strongest case.

    Raises:
        ConfigError: another method.

    Source: Geiping et al. 2020, proposition 3.1 (the input of a linear layer is the quotient of two gradients); here
        over the label's columns, by the leading singular vectors.
    """
    if config.method != "fedhypevae":
        raise ConfigError(f"inversion is built for the method fedhypevae, found {config.method}")
    # the strongest case for the attacker: everybody takes part, nothing but this record, nothing released before
    alone = config.replace(
        num_sites=1,
        min_sites=1,
        num_rounds=1,
        local_steps=1,
        sampling_rate=1.0,
        spare_rounds=0,
        public_total=1,
        sleep_steps=0,
        unit="record",
    )
    plan = private_plan(alone.replace(epsilon=float("inf")))
    names = tuple(f"class-{index}" for index in range(num_classes))
    problem = Problem(embedding.shape[0], names, 1)
    context = RunContext(alone, problem, replace(plan, training_noise=noise_multiplier))
    method = get_method("fedhypevae")
    state, site = method.init(context), method.init_site(context, 0)
    record = SiteData(on_sphere(embedding[None].float()), torch.tensor([label]))
    _, upload = method.client_step(context, StepInput(state.params, site, record, 0, 0, source))
    layer = generator_shape(context).output_layer
    left, _, right = torch.linalg.svd(upload[f"{layer}.class_weight"], full_matrices=False)
    direction, weights = left[:, 0], right[0]
    layers = PlainLayers.at(state.params, site.tensors.get("code"))
    row_scale, _ = generated_rows(layers.params, layer, layers.features)
    if row_scale is not None:
        direction = direction / row_scale
    # p - y is negative at the record's own class alone, which settles the sign and gives the label away
    sign = -1.0 if int((weights < 0).sum()) > num_classes // 2 else 1.0
    direction = on_sphere(sign * direction)
    cosine = float(torch.cosine_similarity(direction, embedding.float(), dim=0))
    return Inversion(direction, int((sign * weights).argmin()), cosine)

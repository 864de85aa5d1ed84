"""A site that joins after training fits its own code and nothing else, and draws personalised embeddings.

The generator is frozen and public by then. The fit reads the site's records without noise: it costs nothing as long as
code, samples and scores stay at the site and never seed a later training. Keep it apart from the private training
state.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from common.adam import adam_step
from common.errors import ConfigError, DataError
from common.generator.hypernetwork import class_scores, generate, project_code
from common.generator.meta_code import generated_moments
from common.generator.row_numbers import row_key
from common.generator.row_sets import RowSet
from common.methods.base import Artifact, RunContext, seeded
from common.methods.constants import CENTRE
from common.methods.features import normalised
from common.methods.fedhypevae.rates import generator_shape
from common.methods.fedhypevae.server import law
from common.records import SiteData, on_sphere

_MOMENT_DRAWS = 64


def fit_code(
    context: RunContext,
    artifact: Artifact,
    data: SiteData,
    *,
    moment_weight: float = 1.0,
    steps: int = 200,
    rate: float = 0.05,
) -> Tensor:
    """Fit a code to a site's records with the generator frozen.

    The loss is the cross-entropy of the generator's own class posterior under the code, plus the squared distance of
    the generated class means from the site's own, weighted by the site's class shares.

    Args:
        context: the run that made the generator.
        artifact: the published generator.
        data: the site's records, at least one.
        moment_weight: weight of the class means, at least 0.
        steps: projected steps of Adam. rate: learning rate.

    Returns:
        The code, (d_v,), within the run's radius. It depends on the records without noise: it stays at the site.

    Raises:
        ConfigError: the generator has no code, or learned findings or grades. DataError: there are no records.

    Source: Eq. 11 of the paper, with the site's own moments in place of the released ones.
    """
    shape = generator_shape(context)
    if shape.model.code_dim == 0:
        raise ConfigError("the generator has no code to fit: train with code-dim above 0")
    if shape.findings:
        raise ConfigError(f"a code is fitted to one class a record: task {context.problem.task} has none to fit it to")
    if data.labels.shape[0] == 0:
        raise DataError("expected at least one record to fit a code to, found none")
    params = artifact.tensors
    rows = normalised(context, on_sphere(data.embeddings), params[CENTRE])
    one_hot = functional.one_hot(data.labels, shape.num_classes).to(rows)
    counts = one_hot.sum(0)
    means, shares = one_hot.T @ rows / counts.clamp(min=1.0)[:, None], counts / counts.sum()
    draws = torch.randn(_MOMENT_DRAWS, shape.model.latent_dim, generator=seeded("join", context.config.federation.seed))
    fitted, moments = {"code": params["meta.codes"].mean(0)}, dict[str, Tensor]()
    for _ in range(steps):
        code = fitted["code"].detach().clone().requires_grad_()
        generated = generate(shape, params, code)
        scores = class_scores(shape, generated.layers, rows)
        loss = functional.cross_entropy(scores, data.labels)
        made, _ = generated_moments(shape, generated, draws)
        loss = loss + moment_weight * (shares * (made - means).square().sum(1)).sum()
        (gradient,) = torch.autograd.grad(loss, code)
        fitted, moments = adam_step(fitted, {"code": gradient}, moments, rate)
        fitted["code"] = project_code(fitted["code"], context.config.training.code_radius)
    return fitted["code"]


def sample_personal(
    context: RunContext, artifact: Artifact, code: Tensor, labels: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Synthetic embeddings under a site's own code: (n,) -> (n, d_x), (n,). They stay at the site with the code.

    Drawn as the published set is, with the code in place of the meta-codes.
    """
    own = {**artifact.tensors, "meta.codes": code[None], "meta.weights": torch.ones(1)}
    of_code = law(context, replace(artifact, tensors=own))
    return RowSet(of_code, row_key("personal", seed), len(labels), lambda numbers: labels[numbers], 1).all()

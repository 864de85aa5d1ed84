"""Algorithm 1 of the paper, slowly: one record at a time, autograd, explicit matrices. The fast round must equal it.

Numbers at the ends of lines are the paper's lines (Gupta, Jangid & Sethi 2026). It departs from the paper where the
product does: a clipped and noised sum of one vector (Φ, v) in place of a mean over Φ, an encoder that learns in its
sleep, a discriminative term in the loss. It has no momentum, no MMD and no statistics; every record is a unit, and all
of them are drawn (q = 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from common.generator.cvae import sleep
from common.generator.hypernetwork import project_code, project_spectral_norms
from common.methods import get_method
from common.methods.base import RunContext, seeded
from common.methods.fedhypevae.rates import generator_shape
from common.methods.site_release import noise_source
from common.privacy.mechanism import add_gaussian
from common.records import SiteData, on_sphere
from tests.common.privacy.clipping_cases import Case, reference_loss


def algorithm_1(context: RunContext, sites: list[SiteData]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Φ after the last round, and each site's encoder ψ and code v."""
    method, config, shape = get_method("fedhypevae"), context.config, generator_shape(context)
    training, clip = config.training, config.privacy.clip_norm
    noise = context.plan.training_noise or 0.0
    phi = {name: value for name, value in method.init(context).params.items() if not name.startswith("constant.")}  # 1
    kept = [dict(method.init_site(context, index).tensors) for index in range(len(sites))]  # 1
    for number in range(training.num_rounds):  # 2
        uploads = []
        for index, site in enumerate(sites):  # 3
            source = noise_source(config, index, number)
            code = kept[index].pop("code")
            numbers = seeded("sleep", config.federation.seed, index, number)
            settings = {"steps": training.sleep_steps, "rate": training.encoder_rate, "batch_size": 256}
            encoder = sleep(shape, phi, code, kept[index], **settings, generator=numbers)  # 6, Eq. 8 without records
            x, y, one = on_sphere(site.embeddings), site.labels, torch.ones(1)  # 4
            x = x * (training.feature_norm / x.norm(dim=1, keepdim=True)).clamp(max=1.0)
            drawn = torch.from_numpy(source.gaussian((len(y), 1, shape.model.latent_dim), 1.0)).float()
            total = {name: torch.zeros_like(value) for name, value in {**phi, "code": code}.items()}
            case = Case(shape, training, phi, code, encoder, x, y, one, joint=False)
            for record in range(len(y)):
                hot = functional.one_hot(y[record : record + 1], shape.num_classes).float()
                leaves = {name: value.clone().requires_grad_() for name, value in {**phi, "code": code}.items()}
                inputs = x[record : record + 1], hot, one, drawn[record], hot, drawn[record], hot
                loss = reference_loss(case, leaves, *inputs)  # 5, Eq. 1
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
                norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in found))
                for name, gradient in zip(leaves, found, strict=True):
                    total[name] += gradient * min(1.0, clip / norm)  # 8, Eq. 9
            total = add_gaussian(total, noise * clip, source)  # 8, Eq. 9
            scale = clip * config.federation.public_total / len(sites)
            slope = total.pop("code") / scale + 2.0 * training.code_penalty * code / clip  # all in units of C
            code = project_code(code - training.code_rate * slope, training.code_radius)  # 6, Eq. 8
            kept[index] = {**encoder, "code": code}
            uploads.append(total)  # 9
        for name in phi:  # 11, Eq. 10
            rate = training.learning_rate if "class_" in name else training.generator_rate
            phi[name] = phi[name] - rate * sum(sent[name] for sent in uploads) / (clip * config.federation.public_total)
        phi = project_spectral_norms(phi, training.lipschitz_bound)  # Eq. 5
    return phi, kept

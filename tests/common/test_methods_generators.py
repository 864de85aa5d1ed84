"""DP-CVAE, DP-CGAN and DP-Gauss: steps against independent ones, sensitivity, and their non-private forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from common.adam import adam_step
from common.config.run import RunConfig
from common.errors import ConfigError
from common.evaluation.heads import gaussian_head
from common.generator.tape import Tape
from common.loop import problem_of, run_loop
from common.methods import get_method
from common.methods.base import RunContext, StepInput, seeded
from common.methods.generators import dp_cgan, dp_cvae, dp_gauss
from common.methods.generators.dp_network import init_layers, noised_gradient_sum
from common.methods.site_release import noise_source
from common.privacy.noise import TestNoise
from common.records import SiteData, UnitBatch, unit_length
from tests.row_cases import rows_of

_SMALL = {
    "num_sites": 2,
    "num_rounds": 2,
    "spare_rounds": 0,
    "statistics_share": 0.0,
    "public_total": 12,
    "epsilon": math.inf,
    "noise": "test",
    "clip_norm": math.inf,
    "cvae_width": 5,
    "noise_dim": 3,
    "gan_width": 4,
}
_DIM, _CLASSES = 6, 3


def _config(method: str, **changes: str | float | bool) -> RunConfig:
    return RunConfig().replace(method=method, **{**_SMALL, **changes})


def _sites(count: int = 2, rows: int = 6) -> list[SiteData]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(rows) % _CLASSES
    return [unit_length(SiteData(torch.randn(rows, _DIM, generator=generator), labels)) for _ in range(count)]


def _batch(units: int = 5, rows: int = 2) -> UnitBatch:
    generator = torch.Generator().manual_seed(8)
    mask = torch.ones(units, rows)
    mask[0, 1] = 0.0
    labels = torch.randint(_CLASSES, (units, rows), generator=generator)
    return UnitBatch(torch.randn(units, rows, _DIM, generator=generator) * mask[..., None], labels, mask)


def _context(method: str, **changes: str | float | bool) -> RunContext:
    config = _config(method, **changes)
    return RunContext(config, problem_of(_sites(), ["a", "b", "c"]), get_method(method).plan(config))


def test_adam_step_is_torchs_adam() -> None:
    start, rate = torch.tensor([1.0, -2.0, 0.5]), 0.1
    reference = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([reference], lr=rate, betas=(0.5, 0.9))
    params, moments = {"w": start}, {}
    for scale in (1.0, -0.3, 2.0):
        reference.grad = scale * torch.tensor([0.2, 5.0, 0.0])
        optimiser.step()
        params, moments = adam_step(params, {"w": reference.grad.clone()}, moments, rate, (0.5, 0.9))
    assert torch.allclose(params["w"], reference.detach(), atol=1e-6)


def test_layers_have_the_published_sizes() -> None:
    config = RunConfig().replace(method="dp_cvae", statistics_share=0.0, public_total=1)
    problem = _context("dp_cvae").problem
    context = RunContext(config, type(problem)(768, tuple("abcdefghijk"), 10), _context("dp_cvae").plan)
    decoder = sum(value.numel() for name, value in dp_cvae.init(context).params.items() if "decoder" in name)
    encoder = sum(value.numel() for value in dp_cvae.init_site(context, 0).tensors.values())
    assert (encoder, decoder) == (382_664, 357_632)


def test_dp_cvae_without_clipping_and_noise_is_a_plain_cvae() -> None:
    """Two local steps against torch modules, autograd and torch's own Adam."""
    config, sites = _config("dp_cvae", local_steps=2, num_rounds=1, num_sites=1, min_sites=1), _sites(1)
    result = run_loop(config, sites, ["a", "b", "c"])
    context = result.context
    params = {**dp_cvae.init(context).params, **dp_cvae.init_site(context, 0).tensors}

    def layer(name: str) -> nn.Linear:
        module = nn.Linear(params[f"{name}.weight"].shape[1], params[f"{name}.weight"].shape[0])
        module.load_state_dict({"weight": params[f"{name}.weight"], "bias": params[f"{name}.bias"]})
        return module

    body = nn.Sequential(*(part for at in range(3) for part in (layer(f"encoder.{at}"), nn.ReLU())))
    mean, log_variance = layer("encoder.mean"), layer("encoder.log_variance")
    decoder = nn.Sequential(
        *(part for at in range(3) for part in (layer(f"decoder.{at}"), nn.ReLU())), layer("decoder.3")
    )
    model = nn.ModuleList([body, mean, log_variance, decoder])
    optimiser = torch.optim.Adam(model.parameters(), lr=config.rivals.adam_rate)
    rows = functional.normalize(sites[0].embeddings, dim=1)
    rows = rows * config.training.feature_norm * math.sqrt(_DIM) / config.training.feature_norm
    one_hot = functional.one_hot(sites[0].labels, _CLASSES).float()
    source = noise_source(config, 0, 0)
    for _ in range(2):
        hidden = body(torch.cat([rows, one_hot], 1))
        spread = torch.exp(0.5 * log_variance(hidden))
        noise = torch.from_numpy(source.gaussian((len(rows), 1, 3), 1.0)).float()[:, 0]
        rebuilt = decoder(torch.cat([mean(hidden) + spread * noise, one_hot], 1))
        target = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        divergence = torch.distributions.kl_divergence(torch.distributions.Normal(mean(hidden), spread), target)
        loss = (0.5 * (rows - rebuilt).square().sum(1) + divergence.sum(1)).sum() / _DIM
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.allclose(result.state.params["decoder.3.weight"], decoder[6].weight, atol=1e-5)
    assert torch.allclose(result.sites[0].tensors["encoder.mean.weight"], mean.weight, atol=1e-5)


def test_dp_cvae_averages_the_decoders_of_its_sites() -> None:
    config, sites = _config("dp_cvae", num_rounds=1), _sites()
    result = run_loop(config, sites, ["a", "b", "c"])
    method, state = get_method("dp_cvae"), dp_cvae.init(result.context)
    sent = []
    for index, data in enumerate(sites):
        work = StepInput(
            state.params, method.init_site(result.context, index), data, 0, index, noise_source(config, index, 0)
        )
        sent.append(method.client_step(result.context, work)[1]["decoder.0.weight"])
    assert torch.allclose(result.state.params["decoder.0.weight"], (sent[0] + sent[1]) / 2)


@pytest.mark.parametrize("method", ["dp_cvae", "dp_cgan"])
def test_one_unit_moves_the_sum_by_at_most_the_clip_norm(method: str) -> None:
    """With the unit's own draws held fixed; without clipping the same unit moves it by more."""
    clip, batch = 0.05, _batch()
    rest = UnitBatch(batch.embeddings[1:], batch.labels[1:], batch.mask[1:])
    huge = UnitBatch(batch.embeddings.clone(), batch.labels, batch.mask)
    huge.embeddings[0] *= 1e3
    noise = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
    moved = {}
    for bound in (clip, math.inf):
        context = _context(method, clip_norm=bound)
        sums = [
            _sum(context, method, units, noise[-len(units.labels) :], TestNoise(0)) for units in (batch, huge, rest)
        ]
        moved[bound] = [_distance(one, sums[2]) for one in sums[:2]]
    assert max(moved[clip]) <= clip * (1 + 1e-4)
    assert min(moved[math.inf]) > clip


def test_dp_cgan_clips_a_records_real_and_fake_row_as_one_vector() -> None:
    clip, batch = 0.1, _batch()
    noise = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
    context = _context("dp_cgan", clip_norm=clip)
    discriminator, generator = dp_cgan.init_site(context, 0).tensors, dp_cgan.init(context).params
    expected = {name: torch.zeros_like(value) for name, value in discriminator.items()}
    for unit in range(5):
        leaves = {name: value.clone().requires_grad_() for name, value in discriminator.items()}
        loss = torch.zeros(())
        for row in range(2):
            one_hot = functional.one_hot(batch.labels[unit, row], _CLASSES).float()
            fake = dp_cgan.generate(_Plain(generator), noise[unit, row], one_hot)
            for features, real in ((batch.embeddings[unit, row], 1.0), (fake, 0.0)):
                hidden = torch.cat([features, one_hot])
                for name in ("discriminator.0", "discriminator.1"):
                    hidden = functional.leaky_relu(leaves[f"{name}.weight"] @ hidden + leaves[f"{name}.bias"], 0.2)
                logit = leaves["discriminator.2.weight"] @ hidden + leaves["discriminator.2.bias"]
                cost = functional.binary_cross_entropy_with_logits(logit, torch.tensor([real]))
                loss = loss + batch.mask[unit, row] * cost
        grads = torch.autograd.grad(loss, list(leaves.values()))
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        assert norm > clip
        for name, grad in zip(leaves, grads, strict=True):
            expected[name] += grad * clip / norm
    found = _sum(context, "dp_cgan", batch, noise, TestNoise(0))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-4)


def test_dp_cgan_without_clipping_and_noise_is_a_plain_conditional_gan() -> None:
    """Two local steps at each of two sites against torch modules and torch's own Adam; then the plain average."""
    config, sites = _config("dp_cgan", local_steps=2, num_rounds=1), _sites()
    result = run_loop(config, sites, ["a", "b", "c"])
    context, averaged = result.context, dict[str, torch.Tensor]()

    def network(params: Mapping[str, torch.Tensor], name: str) -> nn.Sequential:
        parts: list[nn.Module] = []
        for layer in range(3):
            weight, bias = params[f"{name}.{layer}.weight"], params[f"{name}.{layer}.bias"]
            module = nn.Linear(weight.shape[1], weight.shape[0])
            module.load_state_dict({"weight": weight, "bias": bias})
            parts += [module, nn.LeakyReLU(0.2)]
        return nn.Sequential(*parts[:-1])

    for index, site in enumerate(sites):
        maker = network(dp_cgan.init(context).params, "generator")
        discriminator = network(dp_cgan.init_site(context, index).tensors, "discriminator")
        optimisers = [
            torch.optim.Adam(one.parameters(), lr=config.rivals.adam_rate, betas=(0.5, 0.999))
            for one in (discriminator, maker)
        ]
        rows = functional.normalize(site.embeddings, dim=1) * math.sqrt(_DIM)
        one_hot = functional.one_hot(site.labels, _CLASSES).float()
        source = noise_source(config, index, 0)
        for step in range(2):
            noise = torch.from_numpy(source.gaussian((len(rows), 1, 3), 1.0)).float()[:, 0]
            fake = maker(torch.cat([noise, one_hot], 1)).detach()
            told = [discriminator(torch.cat([features, one_hot], 1))[:, 0] for features in (rows, fake)]
            loss = sum(
                functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, truth), reduction="sum")
                for scores, truth in zip(told, (1.0, 0.0), strict=True)
            )
            optimisers[0].zero_grad()
            loss.backward()
            optimisers[0].step()
            public = seeded("generator", config.federation.seed, index, 0, step)
            wanted = functional.one_hot(torch.randint(_CLASSES, (256,), generator=public), _CLASSES).float()
            made = maker(torch.cat([torch.randn(256, 3, generator=public), wanted], 1))
            optimisers[1].zero_grad()
            functional.softplus(-discriminator(torch.cat([made, wanted], 1))).mean().backward()
            optimisers[1].step()
        kept = result.sites[index].tensors["discriminator.1.weight"]
        assert torch.allclose(kept, discriminator[2].weight, atol=1e-5)
        for name, value in maker.state_dict().items():
            averaged[name] = averaged.get(name, torch.zeros_like(value)) + value / len(sites)
    for layer in range(3):
        assert torch.allclose(
            result.state.params[f"generator.{layer}.weight"], averaged[f"{2 * layer}.weight"], atol=1e-5
        )


def test_dp_cgan_generator_learns_from_the_judge_alone() -> None:
    context = _context("dp_cgan")
    discriminator, generator = dp_cgan.init_site(context, 0).tensors, _only_generator(context)
    labels, noise = torch.tensor([0, 2]), torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    pulled = dp_cgan.generator_gradients(generator, discriminator, labels, noise, _CLASSES)
    name, step = "generator.2.bias", 1e-3
    losses = []
    for sign in (1.0, -1.0):
        shifted = {**generator, name: generator[name] + sign * step * torch.eye(_DIM)[0]}
        one_hot = functional.one_hot(labels, _CLASSES).float()
        fake = dp_cgan.generate(_Plain(shifted), noise, one_hot)
        scores = dp_cgan.discriminator_scores(_Plain(discriminator), torch.cat([fake, one_hot], 1))
        losses.append(float(-torch.log(torch.sigmoid(scores)).double().mean()))
    assert pulled[name][0].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=2e-4)


def test_dp_gauss_without_noise_is_lda_on_pooled_means() -> None:
    sites = _sites(2, 9)
    config = _config("dp_gauss", statistics_share=0.5)
    result = run_loop(config, sites, ["a", "b", "c"])
    rows, labels = torch.cat([site.embeddings for site in sites]), torch.cat([site.labels for site in sites])
    means = torch.stack([rows[labels == label].mean(0) for label in range(_CLASSES)])
    tensors = result.artifact.tensors
    assert torch.allclose(tensors["class_means"], means, atol=1e-5)
    assert torch.allclose(tensors["class_counts"], torch.full((3,), 6.0), atol=1e-5)
    variance = torch.full((_DIM,), config.model.residual_energy / _DIM)
    assert torch.allclose(tensors["head.weight"], gaussian_head(means, variance, torch.ones(3)).weight, atol=1e-3)


def test_dp_gauss_samples_have_the_released_moments() -> None:
    config = _config("dp_gauss", statistics_share=0.5)
    result = run_loop(config, _sites(2, 9), ["a", "b", "c"])
    law = replace(dp_gauss.law(result.context, result.artifact), heads=())
    rows, labels = rows_of(law, torch.zeros(4000, dtype=torch.long), 3)
    assert bool((labels == 0).all())
    assert torch.allclose(rows.mean(0), result.artifact.tensors["class_means"][0], atol=0.03)
    assert rows.var(0).mean().item() == pytest.approx(config.model.residual_energy / _DIM, rel=0.05)


def test_dp_gauss_spends_everything_on_one_release() -> None:
    plan = get_method("dp_gauss").plan(RunConfig().replace(method="dp_gauss", epsilon=1.0, delta=1e-4))
    assert plan.statistics_noise == pytest.approx(3.186, abs=2e-3)
    assert [event.kind for event in plan.all_events] == ["gaussian"]
    with pytest.raises(ConfigError, match="statistics-share"):
        get_method("dp_gauss").plan(_config("dp_gauss"))


class _Plain:
    """Linear layers straight from tensors."""

    def __init__(self, params: dict[str, torch.Tensor]) -> None:
        self.params = params

    def linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.params[f"{name}.weight"].T + self.params[f"{name}.bias"]


def _only_generator(context: RunContext) -> dict[str, torch.Tensor]:
    return {name: value for name, value in dp_cgan.init(context).params.items() if name.startswith("generator.")}


def _sum(
    context: RunContext, method: str, batch: UnitBatch, noise: torch.Tensor, source: TestNoise
) -> dict[str, torch.Tensor]:
    site = (dp_cvae if method == "dp_cvae" else dp_cgan).init_site(context, 0).tensors
    server = (dp_cvae if method == "dp_cvae" else dp_cgan).init(context).params

    def losses(tape: Tape, units: UnitBatch, _: object) -> torch.Tensor:
        if method == "dp_cvae":
            return dp_cvae.record_losses(tape, units, _CLASSES, noise)
        return dp_cgan.discriminator_losses(tape, server, units, _CLASSES, noise)

    shared = {name: value for name, value in server.items() if name.startswith("decoder.")}
    return noised_gradient_sum(context, {**site, **shared}, batch, losses, source)


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in one))


def test_init_layers_gives_torchs_scale() -> None:
    params = init_layers({"a": (400, 300)}, torch.Generator().manual_seed(0))
    assert params["a.weight"].shape == (300, 400)
    assert params["a.weight"].std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)

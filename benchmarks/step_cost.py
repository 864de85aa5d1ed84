"""What privacy costs in one client step: time and memory, beside the same step without it and beside Opacus.

Batch 512, embeddings of width 768, 11 classes, the default model. One step is the forward pass, every record's clipped
gradient and their sum; drawing the noise is timed by itself. Ways are run in turn, so that a change of the machine's
load meets all of them, and medians of paired ratios are reported.

    python -m benchmarks.step_cost --repeats 30
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.clipping import clipped_gradient_sum
from common.config import RunConfig
from common.cvae import PlainLayers, encode, gaussian_kl, gaussian_log_likelihood, init_encoder_params
from common.hypernetwork import GeneratorShape, class_prior, class_scores, decode, init_code, init_hypernet_params
from common.noise import SecureNoise, add_gaussian
from common.objective import record_losses
from common.tape import Tape

BATCH, DIM, CLASSES = 512, 768, 11
Way = Callable[[], object]


class OpacusGenerator(nn.Module):
    """The same work in layers that Opacus knows; the label columns, used twice in our model, are two matrices here."""

    def __init__(self, shape: GeneratorShape, config: RunConfig) -> None:
        super().__init__()
        model = config.model
        self.shape, self.training_config = shape, config.training
        self.code = nn.Embedding(1, model.code_dim)
        self.base = nn.Linear(model.latent_dim, DIM, bias=False)
        self.classes = nn.Linear(CLASSES, DIM, bias=False)
        self.scale = nn.Linear(model.code_dim, DIM, bias=False)
        self.shift = nn.Linear(model.code_dim, DIM)
        self.scores = nn.Linear(DIM, CLASSES)
        self.score_shift = nn.Linear(model.code_dim, CLASSES, bias=False)
        self.prior_trunk = nn.Linear(model.code_dim, model.prior_width)
        self.prior_embedding = nn.Linear(CLASSES, model.label_embedding_dim, bias=False)
        self.prior_head = nn.Linear(model.prior_width + model.label_embedding_dim, 2 * model.latent_dim)

    def forward(self, x: Tensor, hot: Tensor, mean: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
        """Losses, (B, 1)."""
        code = self.code(torch.zeros(x.shape[0], dtype=torch.long))
        latent = mean + torch.exp(log_scale) * noise
        row_scale = 1 + self.scale(code)
        inner = self.base(latent) + self.shape.observation_variance * self.classes(hot)
        decoded = row_scale * inner + self.shift(code)
        head = self.prior_head(torch.cat([torch.tanh(self.prior_trunk(code)), self.prior_embedding(hot)], -1))
        prior_mean, raw = head.chunk(2, -1)
        divergence = gaussian_kl(mean, log_scale, prior_mean, 2 * torch.tanh(raw / 2))
        elbo = gaussian_log_likelihood(x, decoded, self.shape.observation_variance) - divergence
        scores = self.scores(row_scale * x) + self.score_shift(code)
        entropy = functional.cross_entropy(scores, hot.argmax(1), reduction="none")
        return (entropy - self.training_config.elbo_weight / DIM * elbo)[:, None]


def build_ways() -> dict[str, Way]:
    """Every way of doing the step, by name; each call is one whole step on the same records."""
    config = RunConfig()
    shape = GeneratorShape.of(DIM, CLASSES, config.model, config.training)
    generator = torch.Generator().manual_seed(0)
    params, encoder = init_hypernet_params(shape, generator), init_encoder_params(shape, generator)
    code = init_code(shape, 1.0, generator)
    x = functional.normalize(torch.randn(BATCH, DIM, generator=generator), dim=1)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    hot = functional.one_hot(labels, CLASSES).float()
    clip_norm, training, source = config.privacy.clip_norm, config.training, SecureNoise()
    shapes = {name: value.shape for name, value in params.items()} | {"code": code.shape}

    def normals() -> Tensor:
        return torch.from_numpy(source.gaussian((BATCH, shape.model.latent_dim), 1.0)).float()

    def private() -> dict[str, Tensor]:
        tape = Tape(params, code, BATCH)
        batch = (x[:, None], labels[:, None], torch.ones(BATCH, 1))
        losses = record_losses(shape, training, tape, PlainLayers(encoder), *batch, source)
        return clipped_gradient_sum(tape.factors(losses), shapes, clip_norm).tensors

    def plain() -> tuple[Tensor, ...]:
        leaves = {name: value.clone().requires_grad_() for name, value in {**params, "code": code}.items()}
        mean, log_scale = encode(shape, PlainLayers(encoder), x, hot)
        latent = mean + torch.exp(log_scale) * normals()
        divergence = gaussian_kl(mean, log_scale, *class_prior(leaves, leaves["code"], hot))
        decoded = decode(shape, leaves, leaves["code"], latent, hot)
        elbo = gaussian_log_likelihood(x, decoded, shape.observation_variance) - divergence
        entropy = functional.cross_entropy(class_scores(shape, leaves, leaves["code"], x), labels, reduction="none")
        loss = (entropy - training.elbo_weight / DIM * elbo).mean()
        return torch.autograd.grad(loss, list(leaves.values()))

    def opacus_inputs() -> tuple[Tensor, ...]:
        mean, log_scale = encode(shape, PlainLayers(encoder), x, hot)
        return x, hot, mean, log_scale, normals()

    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    hooked = GradSampleModule(OpacusGenerator(shape, config), loss_reduction="sum")
    ghosted = GradSampleModuleFastGradientClipping(
        OpacusGenerator(shape, config), loss_reduction="sum", max_grad_norm=clip_norm, use_ghost_clipping=True
    )
    functional_module = OpacusGenerator(shape, config)

    def hooks() -> list[Tensor]:
        hooked.zero_grad(set_to_none=True)
        hooked(*opacus_inputs()).sum().backward()
        samples = [parameter.grad_sample for parameter in hooked.parameters()]
        norms = torch.stack([sample.flatten(1).square().sum(1) for sample in samples]).sum(0).sqrt()
        factor = (clip_norm / norms).clamp(max=1.0)
        return [torch.einsum("b,b...->...", factor, sample) for sample in samples]

    def ghost() -> None:
        ghosted.zero_grad(set_to_none=True)
        ghosted.enable_hooks()
        losses = ghosted(*opacus_inputs())[:, 0]
        losses.sum().backward(retain_graph=True)
        factor = ghosted.get_clipping_coef().detach()
        ghosted.zero_grad(set_to_none=True)
        ghosted.disable_hooks()
        (factor * losses).sum().backward()

    def one_loss(leaves: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        batch = tuple(value[None] for value in inputs)
        return torch.func.functional_call(functional_module, leaves, batch)[0, 0]

    per_example = torch.func.vmap(torch.func.grad(one_loss), in_dims=(None, 0, 0, 0, 0, 0))

    def vmap() -> list[Tensor]:
        leaves = {name: value.detach() for name, value in functional_module.named_parameters()}
        samples = list(per_example(leaves, *opacus_inputs()).values())
        norms = torch.stack([sample.flatten(1).square().sum(1) for sample in samples]).sum(0).sqrt()
        factor = (clip_norm / norms).clamp(max=1.0)
        return [torch.einsum("b,b...->...", factor, sample) for sample in samples]

    zeros = {name: torch.zeros(value) for name, value in shapes.items()}
    return {
        "plain": plain,
        "private": private,
        "opacus ghost": ghost,
        "opacus hooks": hooks,
        "vmap": vmap,
        "noise alone": lambda: add_gaussian(zeros, 1.0, source),
    }


def extra_memory(way: Way) -> int:
    """Most bytes of tensors held at once during one call, beyond what was held before."""
    from torch.profiler import ProfilerActivity, profile

    way()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    # events in order of time: a running sum of allocations gives the peak
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda item: item.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(repeats: int) -> dict[str, object]:
    """Times, paired ratios to the plain step, and extra memory of every way."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ways = build_ways()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    rows = {}
    for name, seconds in times.items():
        ratios = [one / base for one, base in zip(seconds, times["plain"], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "milliseconds": round(1e3 * statistics.median(seconds), 3),
            "ratio_to_plain": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
            "peak_memory_mib": round(extra_memory(ways[name]) / 2**20, 2),
        }
    return {
        "batch": BATCH,
        "dim": DIM,
        "classes": CLASSES,
        "threads": 1,
        "repeats": repeats,
        "torch": torch.__version__,
        "ways": rows,
    }


def main() -> None:
    """Measure, print, and write results/step_cost.json beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="paired runs of every way")
    result = measure(parser.parse_args().repeats)
    target = Path(__file__).parent / "results" / "step_cost.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".json.part")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(target)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

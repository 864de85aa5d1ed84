"""One paper-sized run against the same loop without privacy, where its time goes, and a million rows of its generator.

The paper's run: 10 sites of 1,613 records, 50 rounds of 5 local epochs, width 768. Here an epoch is one step at the
sampling rate 1, the default. Some rounds of the private loop and of the other are timed in turns, and the ratio is
that of whole rounds: sleep phase, noise and the server's step included. Without privacy nothing is clipped and no noise
is drawn: one gradient of the sum a step by autograd, with the same sleep phase and server step.

    python -m benchmarks.whole --rounds 3        # rounds of each in a turn
    python -m benchmarks.whole --rounds 50       # the paper's number
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.flame import draw_flame, own_times, sample_stack
from benchmarks.records import RESULTS, conditions, write_result
from benchmarks.server import CLASSES, DIM, made_records
from benchmarks.step_ways import DECODERS
from common.config.run import RunConfig
from common.generator.cvae import encode, gaussian_kl, gaussian_log_likelihood
from common.generator.hypernetwork import GeneratorShape, class_prior, class_scores, decode
from common.generator.layers import PlainLayers
from common.loop import run_loop
from common.methods.base import ServerState, Tensors
from common.methods.fedhypevae import site as hypevae_site
from common.privacy.noise import NoiseSource
from common.records import UnitBatch

SITES, RECORDS, ROUNDS, EPOCHS = 10, 1_613, 50, 5


def paper_config(rounds: int) -> RunConfig:
    """The paper's sizes."""
    fixed = {"num-sites": SITES, "num-rounds": rounds, "local-steps": EPOCHS, "meta-steps": 0, "spare-rounds": 0}
    return RunConfig.from_flat({**DECODERS["paper-sized"], **fixed})


def seconds_of_rounds(rounds: int, *, private: bool) -> float:
    """Processor seconds of some rounds, the first left out, in the plain loop."""
    config, marks = paper_config(rounds + 1), list[float]()

    def note(round_index: int, state: ServerState) -> None:
        del round_index, state
        marks.append(time.process_time())

    names = tuple(f"class-{index}" for index in range(CLASSES))
    data = made_records(RECORDS, DIM)
    if private:
        run_loop(config, [data] * SITES, names, note)
    else:
        with without_privacy(config):
            run_loop(config, [data] * SITES, names, note)
    return marks[-1] - marks[0]


def without_privacy(config: RunConfig) -> Any:
    """The loop's noised sum replaced by one gradient of all records' summed loss."""
    shape = GeneratorShape.of(DIM, CLASSES, config.model, config.training)

    def gradient(
        context: object,
        params: Tensors,
        code: Tensor | None,
        encoder: Tensors,
        batch: UnitBatch,
        source: NoiseSource,
        **_: bool,
    ) -> dict[str, Tensor]:
        del context
        x, labels, training = batch.embeddings[:, 0], batch.labels[:, 0], config.training
        hot = torch.nn.functional.one_hot(labels, CLASSES).float()
        own = {} if code is None else {"code": code}
        trained = {name: value for name, value in params.items() if not name.startswith("constant.")}
        leaves = {name: value.clone().requires_grad_() for name, value in {**trained, **own}.items()}
        layers = PlainLayers.at(leaves, leaves.get("code"))
        mean, log_scale = encode(shape, PlainLayers(encoder), x, hot)
        normals = torch.from_numpy(source.gaussian(tuple(mean.shape), 1.0)).float()
        latent = mean + torch.exp(log_scale) * normals
        divergence = gaussian_kl(mean, log_scale, *class_prior(layers, hot))
        likelihood = gaussian_log_likelihood(x, decode(shape, layers, latent, hot), shape.observation_variance)
        scores = class_scores(shape, layers, x)
        entropy = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        loss = (entropy - training.elbo_weight / DIM * (likelihood - divergence)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        # scaled like a clipped sum, so that the parameters stay finite; no record is looked at for it
        return {name: config.privacy.clip_norm * grad for name, grad in zip(leaves, grads, strict=True)}

    return mock.patch.object(hypevae_site, "_noised_sum", gradient)


def ratio_to_plain(rounds: int, turns: int) -> dict[str, Any]:
    """Private and plain rounds in turns: seconds a round, and the paired ratio."""
    private, plain = [], []
    for _ in range(turns):
        private.append(seconds_of_rounds(rounds, private=True) / rounds)
        plain.append(seconds_of_rounds(rounds, private=False) / rounds)
    ratios = [one / other for one, other in zip(private, plain, strict=True)]
    return {
        "rounds_timed": rounds * turns,
        "seconds_per_round": round(statistics.median(private), 3),
        "seconds_per_round_without_privacy": round(statistics.median(plain), 3),
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "seconds_of_50_rounds": round(ROUNDS * statistics.median(private), 1),
    }


def run(rounds: int, turns: int) -> dict[str, Any]:
    """The ratio, the profile and its picture."""
    torch.set_num_threads(1)
    result = {**conditions(), "sites": SITES, "records": RECORDS, "local_steps": EPOCHS, "dim": DIM}
    result |= ratio_to_plain(rounds, turns)
    root = sample_stack(lambda: seconds_of_rounds(1, private=True))
    result["own_time"] = own_times(root)
    draw_flame(root, RESULTS / "flame.png", "Two paper-sized rounds of ten sites, with their statistics")
    return result


def main() -> None:
    """Measure, print, and write results/whole.json and results/flame.png beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each kind in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    result = run(asked.rounds, asked.turns)
    for name in ("seconds_per_round", "seconds_per_round_without_privacy", "ratio", "spread"):
        print(f"{name}: {result[name]}")
    write_result("whole", result, asked.out)


if __name__ == "__main__":
    main()

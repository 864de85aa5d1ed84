"""One paper-sized run against the same loop without privacy, where its time goes, and a million rows of its generator.

The paper's run: 10 sites of 1,613 records, 50 rounds of 5 local epochs, width 768. Here an epoch is one step at the
sampling rate 1, the default. Some rounds of the private loop and of the other are timed in turns, and the ratio is
that of whole rounds: sleep phase, noise and the server's step included. Without privacy nothing is clipped and no noise
is drawn: one gradient of the sum a step by autograd, with the same sleep phase and server step.

    python -m benchmarks.whole --rounds 3        # rounds of each in a turn
    python -m benchmarks.whole --rounds 50       # the paper's number
    python -m benchmarks.whole --device cuda     # by the wall clock, with the card's work done; whole_cuda.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from benchmarks.flame import draw_flame, own_times, sample_stack
from benchmarks.records import RESULTS, conditions, write_result
from benchmarks.server import CLASSES, DIM, made_records
from benchmarks.step_ways import DECODERS
from client_app.local_step import client_step
from client_app.place import Place
from common import loop
from common.config.run import RunConfig
from common.devices import choose_device
from common.generator.cvae import encode, gaussian_kl, gaussian_log_likelihood
from common.generator.hypernetwork import GeneratorShape, class_prior, class_scores, decode
from common.generator.layers import PlainLayers
from common.loop import run_loop
from common.methods import get_method
from common.methods.base import Method, ServerState, Tensors
from common.methods.fedhypevae import site as hypevae_site
from common.privacy.noise import NoiseSource
from common.records import UnitBatch

SITES, RECORDS, ROUNDS, EPOCHS = 10, 1_613, 50, 5
_CPU = torch.device("cpu")


def paper_config(rounds: int) -> RunConfig:
    """The paper's sizes."""
    fixed = {"num-sites": SITES, "num-rounds": rounds, "local-steps": EPOCHS, "meta-steps": 0, "spare-rounds": 0}
    return RunConfig.from_flat({**DECODERS["paper-sized"], **fixed})


def seconds_of_rounds(rounds: int, *, private: bool, device: torch.device = _CPU, records: int = RECORDS) -> float:
    """Seconds of some rounds, the first left out, in the plain loop: of the processor, or of the wall with a GPU."""
    config, marks = paper_config(rounds + 1), list[float]()

    def note(round_index: int, state: ServerState) -> None:
        del round_index, state
        if device.type == "cpu":
            marks.append(time.process_time())
        else:
            torch.cuda.synchronize(device)
            marks.append(time.perf_counter())

    names = tuple(f"class-{index}" for index in range(CLASSES))
    with stepping_on(device), contextlib.nullcontext() if private else without_privacy(config):
        run_loop(config, [made_records(records, DIM)] * SITES, names, note)
    return marks[-1] - marks[0]


def stepping_on(device: torch.device) -> Any:
    """Clients' steps of the loop on a device, as a site's app makes them; the server stays on the processor."""

    def chosen(name: str) -> Method:
        method = get_method(name)
        place = cast(Place, SimpleNamespace(device=str(device)))
        return dataclasses.replace(method, client_step=partial(client_step, place, method))

    return mock.patch.object(loop, "get_method", chosen)


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
        normals = torch.from_numpy(source.gaussian(tuple(mean.shape), 1.0)).to(mean)
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


def ratio_to_plain(rounds: int, turns: int, device: torch.device, records: int) -> dict[str, Any]:
    """Private and plain rounds in turns: seconds a round, and the paired ratio."""
    private, plain = list[float](), list[float]()
    for _ in range(turns):
        for spent, with_privacy in ((private, True), (plain, False)):
            spent.append(seconds_of_rounds(rounds, private=with_privacy, device=device, records=records) / rounds)
    ratios = [one / other for one, other in zip(private, plain, strict=True)]
    return {
        "rounds_timed": rounds * turns,
        "seconds_per_round": round(statistics.median(private), 3),
        "seconds_per_round_without_privacy": round(statistics.median(plain), 3),
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "seconds_of_50_rounds": round(ROUNDS * statistics.median(private), 1),
    }


def run(rounds: int, turns: int, device: torch.device = _CPU, records: int = RECORDS) -> dict[str, Any]:
    """The ratio; on the processor also the profile and its picture."""
    torch.set_num_threads(1)
    result = {**conditions(), "device": str(device), "sites": SITES, "records": records}
    result |= {"local_steps": EPOCHS, "dim": DIM, **ratio_to_plain(rounds, turns, device, records)}
    if device.type != "cpu" or records != RECORDS:
        return result
    root = sample_stack(lambda: seconds_of_rounds(1, private=True))
    result["own_time"] = own_times(root)
    draw_flame(root, RESULTS / "flame.png", "Two paper-sized rounds of ten sites, with their statistics")
    return result


def main() -> None:
    """Measure, print, and write results/whole.json and results/flame.png, or whole_cuda.json, beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each kind in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--records", type=int, default=RECORDS, help="of a site; fewer to try it out")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    device = choose_device(asked.device)
    result = run(asked.rounds, asked.turns, device, asked.records)
    for name in ("seconds_per_round", "seconds_per_round_without_privacy", "ratio", "spread"):
        print(f"{name}: {result[name]}")
    write_result("whole" if device.type == "cpu" else "whole_cuda", result, asked.out)


if __name__ == "__main__":
    main()

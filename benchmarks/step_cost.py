"""What privacy costs in one client step: time and memory, beside the same step without it and beside Opacus.

Batches of 64 to 4,096, embeddings of width 384 to 1,536, 11 classes, the default decoder and a paper-sized one. One
step is the forward pass, every record's clipped gradient and their sum; drawing the noise is timed by itself, with the
step, and against the bare generator of secure numbers. Ways are run in turn, so that a change of the machine's load
meets all of them; medians of paired ratios are reported, with their quartiles. Time is processor time of one thread; on
a GPU it is time on the clock from an idle card to an idle card, and what of it the card itself was busy is beside it.

    python -m benchmarks.step_cost --seconds 6
    python -m benchmarks.step_cost --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import conditions, write_result
from benchmarks.step_ways import CLASSES, DECODERS, Way, build_ways
from common.devices import bytes_of, choose_device, computing_on, free_bytes
from common.privacy.noise import SecureNoise

BATCHES, DIMS = (64, 512, 4096), (384, 768, 1536)
Size = tuple[str, int, int]
GPU_SIZES: tuple[Size, ...] = (
    ("small", 768, 64), ("small", 768, 1613), ("small", 1536, 4096), ("paper-sized", 768, 1613),
    ("paper-sized", 1536, 4096),
)  # fmt: skip
TIME_GOAL, MEMORY_GOAL = 1.3, 1.2
# One copy of the gradient for each record is what Opacus' hooks and vmap make: above this they are left out. Of a GPU's
# free memory, a fifth: they hold several.
_LARGEST_COPIES = 2**29
_GPU_SHARE = 0.2
_OPACUS = ("opacus ghost", "opacus hooks", "vmap")
_CPU = torch.device("cpu")


def extra_memory(way: Way, device: torch.device = _CPU) -> int:
    """Most bytes of tensors held at once during one call, beyond what was held before."""
    from torch.profiler import ProfilerActivity, profile

    way()
    if device.type == "cuda":
        return int(bytes_of(device, way, 0.0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    # events in order of time: a running sum of allocations gives the peak
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda item: item.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def busy(way: Way) -> dict[str, float]:
    """Kernels of one call on a GPU, and milliseconds that the card spends in them."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        way()
        torch.cuda.synchronize()
    spent = [
        event.duration_ns() / 1e6
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
    ]
    return {"kernels": len(spent), "milliseconds_on_the_gpu": round(sum(spent), 3)}


def take_turns(
    ways: dict[str, Way], seconds: float, least: int = 4, most: int = 60, device: torch.device = _CPU
) -> dict[str, list[float]]:
    """Seconds of every way, called in turn until the time is up: the processor's, or on the clock with a GPU."""

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
        way()
    end = time.monotonic() + seconds
    for turn in range(most):
        for name, way in ways.items():
            start = now()
            way()
            times[name].append(now() - start)
        if turn + 1 >= least and time.monotonic() > end:
            break
    return times


def measure(batch: int, dim: int, decoder: str, seconds: float, device: torch.device = _CPU) -> dict[str, Any]:
    """Times, paired ratios to the plain step, and extra memory of every way at one size."""
    with computing_on(device):
        return _measured(batch, dim, decoder, seconds, device)


def _measured(batch: int, dim: int, decoder: str, seconds: float, device: torch.device) -> dict[str, Any]:
    built = build_ways(batch, dim, decoder)
    largest = _LARGEST_COPIES if device.type == "cpu" else _GPU_SHARE * free_bytes(device)
    left_out = [n for n in ("opacus hooks", "vmap") if built.gradient_copies_bytes > largest]
    ways = {name: way for name, way in built.ways.items() if name not in left_out}
    times = take_turns(ways, seconds, device=device)
    rows: dict[str, dict[str, Any]] = {}
    memory = {name: extra_memory(way, device) for name, way in ways.items()}
    for name, spent in times.items():
        ratios = [one / base for one, base in zip(spent, times["plain"], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "milliseconds": round(1e3 * statistics.median(spent), 3),
            "ratio_to_plain": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
            "peak_memory_mib": round(memory[name] / 2**20, 2),
            "memory_to_plain": round(memory[name] / memory["plain"], 3),
            **(busy(ways[name]) if device.type == "cuda" else {}),
        }
    larger = max(rows["private"]["milliseconds"], rows["noise alone"]["milliseconds"])
    best = min((name for name in _OPACUS if name in rows), key=lambda name: float(rows[name]["ratio_to_plain"]))
    return {
        "batch": batch,
        "dim": dim,
        "decoder": decoder,
        "turns": len(times["plain"]),
        "opacus_best": best,
        "faster_than_opacus_best": round(rows[best]["milliseconds"] / rows["private"]["milliseconds"], 2),
        "with_noise_to_the_larger_of_both": round(rows["private with noise"]["milliseconds"] / larger, 2),
        "left_out": dict.fromkeys(left_out, f"{built.gradient_copies_bytes / 2**30:.1f} GiB of gradients"),
        "ways": rows,
    }


def noise_speed(size: int = 1_000_000) -> dict[str, float]:
    """Drawing noise: millions of secure normals a second, beside the same numbers from NumPy's fastest generator."""
    import numpy as np

    source, fast = SecureNoise(), np.random.Generator(np.random.SFC64(0))
    spent = take_turns(
        {"secure": lambda: source.gaussian(size, 1.0), "numpy_sfc64": lambda: fast.standard_normal(size)}, 2.0
    )
    return {name: round(size / 1e6 / statistics.median(values), 1) for name, values in spent.items()}


def run(seconds: float, sizes: Iterable[Size], device: torch.device = _CPU) -> dict[str, Any]:
    """Every size, (decoder, dim, batch), one after the other."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for decoder, dim, batch in sizes:
        rows.append(measure(batch, dim, decoder, seconds, device))
        ours = rows[-1]["ways"]["private"]
        print(
            f"{decoder:11s} d {dim:4d} batch {batch:4d}: {ours['ratio_to_plain']:.2f} x time, "
            f"{ours['memory_to_plain']:.2f} x memory, {rows[-1]['faster_than_opacus_best']:.1f} x Opacus' best "
            f"({rows[-1]['opacus_best']}), with noise {rows[-1]['with_noise_to_the_larger_of_both']:.2f} x the larger",
            flush=True,
        )
    return {
        **conditions(),
        "device": str(device),
        "torch": torch.__version__,
        "threads": 1,
        "classes": CLASSES,
        "sizes": rows,
        "million_normals_a_second": noise_speed(),
    }


def main() -> None:
    """Measure, print, and write results/step_cost.json beside this script, or step_cost_cuda.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the turns at one size")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES), help="on the processor")
    parser.add_argument("--dims", type=int, nargs="*", default=list(DIMS), help="on the processor")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU, at its own five sizes")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    device = choose_device(asked.device)
    on_cpu = device.type == "cpu"
    sizes = itertools.product(DECODERS, asked.dims, asked.batches) if on_cpu else GPU_SIZES
    write_result("step_cost" if on_cpu else "step_cost_cuda", run(asked.seconds, sizes, device), asked.out)


if __name__ == "__main__":
    main()

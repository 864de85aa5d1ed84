"""Bytes of a run both ways, beside FedAvg of the paper's decoder: computed from the shapes, nothing is trained.

    python -m benchmarks.message_bytes

Values are float32 both ways, without headers; the statistics are among those that a site sends. Width and classes are
those of organ-iid, the rounds those of the table.
"""

from __future__ import annotations

from typing import Any

from benchmarks.records import write_result
from common.assurance.plan import run_bytes
from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import Problem, RunContext

DIM, CLASSES, SITES, ROUNDS = 512, 11, 10, 100
PAPER_DECODER = 357_632  # parameters of the DP-CVAE decoder with one-hot conditioning (d_x = 768, K = 11)
SIZES: dict[str, dict[str, int | float]] = {
    "fedhypevae": {},
    "fedhypevae_tied": {"latent-dim": 0, "code-dim": 0, "elbo-weight": 0.0},
}


def measured() -> list[dict[str, Any]]:
    """For each size of the generator: bytes up and down of one site, and their share of the paper's decoder."""
    rows = []
    for name, sizes in SIZES.items():
        config = RunConfig.from_flat({"num-sites": SITES, "num-rounds": ROUNDS, "spare-rounds": 0, **sizes})
        method = get_method(config.method)
        problem = Problem(DIM, tuple(str(label) for label in range(CLASSES)), SITES)
        row: dict[str, Any] = {"method": name, "rounds": ROUNDS}
        both = run_bytes(method, RunContext(config, problem, method.plan(config)))
        for way, count in zip(("bytes_up", "bytes_down"), both, strict=True):
            row |= {way: count, f"{way}_of_paper_decoder": round(count / (4 * PAPER_DECODER * ROUNDS), 5)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    print(write_result("message_bytes", {"paper_decoder_parameters": PAPER_DECODER, "sizes": measured()}))

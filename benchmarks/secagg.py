"""What secure aggregation costs: bytes and seconds of one round's sum of 10^5 coordinates, for 10 to 200 sites.

The real protocol in one process (`common.secagg.rounds`), with the default numbers of dropouts and colluders. All the
dropouts that are borne fall silent after they sealed their shares, which costs the server most. Seconds are the
processor time of one thread. The comparison is trust `local`: float32 and noise of the site's own. Messages are counted
as they travel under Flower, texts included.

    python -m benchmarks.secagg
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec

from common.config.privacy import PrivacyConfig
from common.privacy.mechanism import add_gaussian
from common.privacy.noise import SecureNoise
from common.secagg.assumptions import Assumptions
from common.secagg.messages import Session
from common.secagg.quantise import Quantisation, add_up, encode, make_quantisation
from common.secagg.rounds import Transcript, secure_sum

SIZE, CLIP_NORM, MULTIPLIER, UNITS = 100_000, 0.03, 45.0, 32_000.0
SITES = (10, 50, 100, 200)


def seconds_of(work: Callable[[], object], repeats: int = 5) -> float:
    """Median processor seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def run_once(arguments: Quantisation, assumed: Assumptions, missing: dict[str, set[int]]) -> Transcript:
    """One secure sum of random vectors, checked to the last bit (RuntimeError if it is not the sum)."""
    count = assumed.num_sites
    signers = [ec.generate_private_key(ec.SECP384R1()) for _ in range(count)]
    session = Session("benchmark", "round-1", secrets.token_hex(16), "0" * 64, assumed)
    rng = np.random.default_rng(count)
    values = [rng.integers(2**arguments.bits, size=arguments.size, dtype=np.uint64) for _ in range(count)]
    total, seen = secure_sum(session, signers, values, arguments.bits, missing)
    wanted = add_up([values[index] for index in sorted(seen.masked)], arguments.bits)
    if not np.array_equal(total, wanted):
        raise RuntimeError("the sum is not that of the inputs")
    return seen


def measure(count: int, size: int = SIZE) -> dict[str, object]:
    """Cost of one round with `count` sites, beside trust local."""
    assumed = PrivacyConfig().assumptions(count)
    arguments = make_quantisation({"x": (size,)}, CLIP_NORM, UNITS, MULTIPLIER, assumed)
    source, zeros = SecureNoise(), {"x": torch.zeros(size)}
    local = seconds_of(lambda: add_gaussian(zeros, MULTIPLIER * CLIP_NORM, source))
    encoding = seconds_of(lambda: encode(arguments, zeros, source))
    seen = run_once(arguments, assumed, {"masked": set(range(assumed.dropouts))})
    site = statistics.mean(seen.site_seconds[index] for index in seen.revealed)
    plain = 4 * size
    return {
        "sites": count,
        "dropouts": assumed.dropouts,
        "colluders": assumed.colluders,
        "honest_shares": assumed.honest_shares,
        "bits": arguments.bits,
        "bytes_up_site": seen.bytes_up,
        "bytes_up_over_local": round(seen.bytes_up / plain, 3),
        "bytes_down_site_beyond_local": seen.bytes_down,
        "site_seconds_beyond_local": round(site + encoding - local, 3),
        "server_seconds": round(seen.server_seconds, 3),
    }


def main() -> None:
    """Measure, print, and write results/secagg.json beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="*", default=list(SITES), help="numbers of sites")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for count in asked.sites:
        rows.append(measure(count))
        print(json.dumps(rows[-1]), flush=True)
    result = {"coordinates": SIZE, "threads": 1, "local_bytes_up_site": 4 * SIZE, "rounds": rows}
    target = Path(__file__).parent / "results" / "secagg.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".json.part")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(target)


if __name__ == "__main__":
    main()

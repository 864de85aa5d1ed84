"""What every method makes of a small run under test noise: for comparing two commits, and a commit with the record.

`python -m tests.digests BASE` runs the commit BASE and this tree on this machine, and names the methods whose published
tensors differ in any bit: a move, a split or a merge changes none. `python -m tests.digests --write` keeps this tree's
numbers in `digests.json`, which the suite compares within 1e-6 (`tests/common/test_digests.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

Numbers = dict[str, list[float] | str]
ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("digests.json")
# Only what makes a run small and repeatable: everything else is at its default, so that a changed default shows.
SETTINGS = {"num-sites": 3, "min-sites": 2, "noise": "test", "public-total": 40, "meta-steps": 5, "local-epochs": 2}
VARIANTS: Mapping[str, Mapping[str, str | int | float]] = {
    "": {},
    " secagg": {"trust": "secagg", "num-sites": 4},
    " joint": {"encoder-training": "joint"},
    " hidden": {"hidden-widths": "5", "trunk-width": 3},
}


def numbers(name: str) -> Numbers:
    """Part along the diagonal and norm of every tensor that a method publishes; `digest` is that of all their bytes.

    Args:
        name: a method, with one of `VARIANTS` behind it.
    """
    import torch

    from common import loop  # what this module imports is found wherever a commit keeps it
    from common.config.run import RunConfig

    variant = next(v for v in sorted(VARIANTS, key=len, reverse=True) if name.endswith(v))
    settings = {**SETTINGS, **VARIANTS[variant], "method": name.removesuffix(variant), "num-rounds": 2}
    config = RunConfig.from_flat(settings)
    draws = torch.Generator().manual_seed(7)
    sizes = (12, 9, 7, 12)[: config.federation.num_sites]
    sites = [loop.SiteData(torch.randn(n, 8, generator=draws), torch.arange(n) % 3) for n in sizes]
    tensors = dict(sorted(loop.run_loop(config, sites, ("a", "b", "c")).artifact.tensors.items()))
    found: dict[str, list[float] | str] = {}
    for key, value in tensors.items():
        # along the diagonal: moves no more than the tensor itself
        found[key] = [float(value.double().sum()) / value.numel() ** 0.5, float(value.double().norm())]
    found["digest"] = hashlib.sha256(b"".join(value.numpy().tobytes() for value in tensors.values())).hexdigest()
    return found


def names() -> list[str]:
    """Every method, and the variants of FedHypeVAE."""
    from common.methods import method_names

    return [*method_names(), *(f"fedhypevae{variant}" for variant in VARIANTS if variant)]


def measured(tree: Path) -> dict[str, Numbers]:
    """`numbers` of all methods by the code in a folder, in a process of its own."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--child"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Numbers] = json.loads(done.stdout)
    return found


def main() -> int:
    """Compare two commits, or write the record; exit code 1 where a method's tensors differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="a commit to compare this tree with, such as HEAD~1")
    parser.add_argument("--write", action="store_true", help="keep this tree's numbers as the record")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps({name: numbers(name) for name in names()}))
        return 0
    here = measured(ROOT)
    if chosen.write:
        RECORD.write_text(json.dumps({name: _without_digest(found) for name, found in here.items()}, indent=1) + "\n")
    if chosen.base is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", chosen.base], stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        there = measured(Path(folder))
    differing = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
    for name in sorted(here.keys() | there.keys()):
        print(f"{'differs' if name in differing else 'equal':8}{name}")
    return 1 if differing else 0


def _without_digest(found: Numbers) -> Numbers:
    return {name: values for name, values in found.items() if name != "digest"}


if __name__ == "__main__":
    sys.exit(main())

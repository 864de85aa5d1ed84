"""MH-pFedHN over sites with different encoders and widths of embeddings, which no averaging of models can serve.

    python -m benchmarks.mixed_widths

Twelve Dirichlet(0.3) sites of OrganAMNIST: three encoders times four architectures, each pair at one site. Embeddings
are SSCD (512), EfficientNet-Lite0 of the same images (1280, the offline encoder), and SSCD seen through a public random
projection (256). Each site's own model is compared with a linear head of its records alone, trained to a tolerance, and
with the same architecture trained alone as long as the site trains in all.

The images are encoded once, into `outputs/benchmarks/` (ignored by git). Scores are kept in
`benchmarks/results/mixed_widths.json`, and rendered to `mixed_widths.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.cells import personal_scores, train
from benchmarks.markdown import as_line, head_of
from benchmarks.pool import run_all
from benchmarks.protocol import PARTITION_SEED, SEEDS, BenchmarkSite, Federation, organ_federation
from benchmarks.reference import local_heads, split_of
from benchmarks.rows import ROWS
from benchmarks.sources import Pool, data_folder, load_organ, organ_draw
from benchmarks.table import RESULTS, load_records, write_text
from common.config.rivals import RivalsConfig
from common.errors import FedHypeVAEError
from common.evaluation.scores import SiteScores, score
from common.methods.base import RunContext, Tensors, seeded
from common.methods.constants import CENTRE
from common.methods.mh_pfedhn import personal as mh_pfedhn
from common.methods.mh_pfedhn.architectures import site_architecture
from common.records import SiteData

ENCODERS = {"sscd": 512, "efficientnet-lite0": 1280, "sscd-projected": 256}
METHODS = ("mh_pfedhn", "mh_pfedhn_gd")
NUM_SITES, ALPHA, ROWS_IN_ALL = 12, 0.3, 6_000
CACHE = Path("outputs") / "benchmarks" / "organ_efficientnet_lite0.npz"
_BLOCK = 256


def encoder_of(site: int) -> str:
    """The encoder of a site; architectures go round with period four, so that every pair turns up once in twelve."""
    return list(ENCODERS)[site % len(ENCODERS)]


def architecture_of(site: int) -> str:
    """The name of a site's architecture."""
    names = [name.strip() for name in RivalsConfig().architectures.split(",")]
    return names[site % len(names)]


def encoded_images(rows: NDArray[np.int64], folder: Path, cache: Path = CACHE) -> NDArray[np.float32]:
    """EfficientNet-Lite0 embeddings of some rows of the organ pool, unit length; encoded once and kept.

    Args:
        rows: (n,) rows of `load_organ`'s pool.
        folder: where the images lie.
        cache: the file of rows encoded so far.

    Returns:
        (n, 1280) float32.
    """
    known = np.zeros(0, dtype=np.int64), np.zeros((0, ENCODERS["efficientnet-lite0"]), dtype=np.float16)
    if cache.is_file():
        with np.load(cache) as arrays:
            known = arrays["rows"], arrays["embeddings"]
    missing = np.setdiff1d(rows, known[0])
    if missing.size:
        from embeddings.encoders.base import EncoderOptions
        from embeddings.encoders.efficientnet import EfficientNetLite0

        with np.load(folder / "organamnist.npz") as arrays:
            images = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
        images = images[organ_draw(len(images))[missing]]
        encoder = EfficientNetLite0.load(EncoderOptions())
        blocks = [encoder.embed(list(images[at : at + _BLOCK])) for at in range(0, len(images), _BLOCK)]
        made = np.concatenate(blocks).astype(np.float16)
        known = np.concatenate([known[0], missing]), np.concatenate([known[1], made])
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, rows=known[0], embeddings=known[1])
    order = np.argsort(known[0])
    found = known[1][order[np.searchsorted(known[0], rows, sorter=order)]].astype(np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), dtype=np.float32)


def mixed_federation(seed: int, folder: Path, cache: Path = CACHE) -> Federation:
    """Twelve Dirichlet sites whose embeddings come from three encoders.

    Args:
        seed: of the splits.
        folder: where the data lies.
        cache: as `encoded_images`.
    """
    pool = load_organ(folder)
    # the row number rides along as the group, so that each site's images can be found again
    small = Pool(
        pool.embeddings[:ROWS_IN_ALL], pool.labels[:ROWS_IN_ALL], pool.class_names, None, np.arange(ROWS_IN_ALL)
    )
    plain = organ_federation(small, seed, NUM_SITES, ALPHA)
    width = ENCODERS["sscd-projected"]
    projection = torch.randn(pool.embeddings.shape[1], width, generator=seeded("projection", PARTITION_SEED))

    def seen_by(encoder: str, data: SiteData) -> SiteData:
        embeddings: Tensor = data.embeddings
        if data.groups is None:
            raise ValueError("expected the row numbers of the pool as groups")
        if encoder == "efficientnet-lite0":
            embeddings = torch.from_numpy(encoded_images(data.groups.numpy(), folder, cache))
        elif encoder == "sscd-projected":
            embeddings = torch.nn.functional.normalize(embeddings @ projection, dim=1)
        return SiteData(embeddings, data.labels)

    sites = tuple(
        BenchmarkSite(site.name, *(seen_by(encoder_of(at), part) for part in (site.train, site.validation, site.test)))
        for at, site in enumerate(plain.sites)
    )
    return Federation("organ-mixed", seed, plain.class_names, sites)


def measure(seed: int, method: str) -> dict[str, Any]:
    """One record: at each site the own model of the method, the linear head alone, and the architecture alone."""
    torch.set_num_threads(1)
    federation = mixed_federation(seed, data_folder())
    row = next(row for row in ROWS if row.method == method)
    trained = train(federation, row)
    result = trained.result
    heads = local_heads(federation)
    sites = []
    for at, (site, head) in enumerate(zip(federation.sites, heads, strict=True)):
        test = split_of(site.test)
        shared = score(torch.softmax(personal_scores(result, at, site), 1), *test)
        kept = {"personal": shared, "local_linear": score(head, *test)}
        kept["local_same"] = score(torch.softmax(alone_scores(result.context, result.state.params, at, site), 1), *test)
        sites.append(
            {"encoder": encoder_of(at), "width": ENCODERS[encoder_of(at)], "architecture": architecture_of(at)}
            | {"train_rows": len(site.train.labels)}
            | {name: _numbers(one) for name, one in kept.items()}
        )
    return {"method": method, "seed": seed, "sites": sites}


def alone_scores(context: RunContext, params: Tensors, at: int, site: BenchmarkSite) -> Tensor:
    """Test scores of a site's architecture trained on its records alone, as many epochs as with the others."""
    architecture = site_architecture(context, at)
    epochs = context.plan.num_rounds * context.config.rivals.local_epochs + 10
    rivals = RivalsConfig.model_validate({**context.config.rivals.model_dump(), "local_epochs": epochs})
    longer = RunContext(context.config.model_copy(update={"rivals": rivals}), context.problem, context.plan)
    train_rows, test_rows = (
        mh_pfedhn.features_at(context, rows.embeddings, params[CENTRE], at) for rows in (site.train, site.test)
    )
    # torch's own start: zero biases, weights uniform within 1/sqrt(inputs)
    generator = seeded("alone", context.config.federation.seed, at)
    parts = []
    for shape in architecture.shapes:
        bound = shape[-1] ** -0.5 if len(shape) == 2 else 0.0
        parts.append(((2 * torch.rand(shape, generator=generator) - 1) * bound).flatten())
    order = seeded("alone order", context.config.federation.seed, at)
    fitted = mh_pfedhn.train_model(longer, architecture, torch.cat(parts), train_rows, site.train.labels, order)
    return architecture.logits(fitted, test_rows)


def render(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over sites and seeds by architecture, then by encoder."""
    lines = [
        f"Twelve Dirichlet({ALPHA:g}) sites with {ROWS_IN_ALL:,} rows of OrganAMNIST in all. ACC/BACC in %, means over",
        "the sites and seeds; in brackets the standard deviation over seeds of the BACC. *Alone, linear* is the site's",
        "own linear head, trained to a tolerance; *alone, same model* its own architecture, without the others.",
    ]
    for key in ("architecture", "encoder"):
        head = ["method", key, "personal", "alone, linear", "alone, same model", "gain in BACC over linear", "seeds"]
        lines += ["", *head_of(head)]
        for method in dict.fromkeys(record["method"] for record in records):
            mine = [record for record in records if record["method"] == method]
            for name in dict.fromkeys(site[key] for site in mine[0]["sites"]):
                cells, balanced = [method, name], {}
                for column in ("personal", "local_linear", "local_same"):
                    means = [_mean_at(record, key, name, column) for record in mine]
                    balanced[column] = [pair[1] for pair in means]
                    spread = statistics.stdev(balanced[column]) if len(means) > 1 else 0.0
                    accuracy = statistics.mean(pair[0] for pair in means)
                    cells.append(f"{accuracy:.1f}/{statistics.mean(balanced[column]):.1f} ({spread:.1f})")
                gain = statistics.mean(balanced["personal"]) - statistics.mean(balanced["local_linear"])
                lines.append(as_line([*cells, f"{gain:+.1f}", str(len(mine))]))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_widths", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS / "mixed_widths.json")
    parser.add_argument("--fresh", action="store_true", help="forget the records that are there")
    options = parser.parse_args(arguments)
    try:
        records = [] if options.fresh else load_records(options.out)
        done = {(one["seed"], one["method"]) for one in records}
        tasks = [(seed, name) for seed in options.seeds for name in options.methods if (seed, name) not in done]
        if tasks:
            mixed_federation(tasks[0][0], data_folder())  # encodes what is not there yet, once for all workers

        def keep(record: dict[str, Any]) -> str:
            records.append(record)
            records.sort(key=lambda one: (METHODS.index(one["method"]), one["seed"]))
            write_text(options.out, json.dumps(records, indent=1) + "\n")
            return f"{record['method']} {record['seed']}"

        run_all(measure, tasks, options.workers, keep)
        write_text(options.out.with_suffix(".md"), render(records))
    except FedHypeVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _numbers(scores: SiteScores) -> list[float]:
    return [scores.accuracy, scores.balanced_accuracy]


def _mean_at(record: dict[str, Any], key: str, name: str, column: str) -> tuple[float, float]:
    mine = [site[column] for site in record["sites"] if site[key] == name]
    return 100 * statistics.mean(one[0] for one in mine), 100 * statistics.mean(one[1] for one in mine)


if __name__ == "__main__":
    # one thread a worker: the products are small, and the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

"""What a run leaves behind: the synthetic set, the generator, and a summary, each written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from common.bundle_sampling import piece_rows
from common.class_filling import fill_classes
from common.classifier import Split
from common.clipping import NEIGHBOURING
from common.composition import epsilon_pld
from common.identity import EncoderIdentity
from common.methods import get_method
from common.methods.base import Artifact, Method, RunContext, seeded
from common.privacy_statement import SiteCharge, StatementFacts, build_statement, why_not_private
from common.secagg.statement import shared_noise_facts
from common.wire import dump_context
from server_app.checkpoint import Progress, write_atomically
from server_app.progress import epsilon_per_site, read_events

ACCOUNTANT = "privacy loss distributions (dp-accounting), within the run"


def wanted_labels(context: RunContext, artifact: Artifact) -> Tensor:
    """Labels of the synthetic set: uniform over the classes, or by the noised counts; (rows,) sorted by class."""
    synthesis, classes = context.config.synthesis, context.problem.num_classes
    shares = torch.full((classes,), 1.0 / classes)
    if synthesis.balance == "dp-counts" and "class_counts" in artifact.tensors:
        shares = artifact.tensors["class_counts"] / artifact.tensors["class_counts"].sum()
    edges = torch.round(torch.cumsum(shares.double(), 0) * synthesis.synthetic_rows).long()
    counts = torch.diff(edges, prepend=torch.zeros(1, dtype=torch.long))
    return torch.repeat_interleave(torch.arange(classes), counts)


def draw_published(context: RunContext, artifact: Artifact) -> Split | None:
    """The run's synthetic set, as its settings ask for it; None for a method that publishes no samples.

    Post-processing: the same artifact gives the same rows.
    """
    draw, seed = get_method(context.config.method).sample, context.config.federation.seed
    if draw is None:
        return None
    wanted = wanted_labels(context, artifact)
    drawn = draw(context, artifact, wanted, seed)
    if not context.config.synthesis.keep_balance:
        return drawn
    again = partial(draw, context, artifact)
    piece = piece_rows(context.problem.dim)
    return fill_classes(again, wanted, [drawn], piece, lambda number: seeded("more", seed, number).initial_seed())


def write_generator(path: Path, context: RunContext, artifact: Artifact, encoder: EncoderIdentity | None) -> None:
    """Save the published parameters as safetensors, with all that is needed to use them in the metadata.

    `encoder` is None where each site has its own.
    """
    metadata = {
        "kind": artifact.kind,
        "method": context.config.method,
        "context": dump_context(context),
        "settings": json.dumps(dict(artifact.settings)),
        # the settings alone do not tell: a method may have no privacy whatever they say
        "private": json.dumps(not why_not_private(context)),
        "encoder": json.dumps(None if encoder is None else encoder.to_json()),
    }
    write_atomically(
        path,
        save(
            {name: value.clone(memory_format=torch.contiguous_format) for name, value in artifact.tensors.items()},
            metadata,
        ),
    )


def write_synthetic(path: Path, context: RunContext, embeddings: Tensor, labels: Tensor) -> None:
    """Save a synthetic set as parquet: `embedding` (fixed-size list of float32) and `label`."""
    flat = pa.array(np.ascontiguousarray(embeddings.numpy(), dtype=np.float32).ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
    reasons = why_not_private(context)
    notes = {
        "synthetic": True,
        "class_names": list(context.problem.class_names),
        "private": not reasons,
        "not_private_because": reasons,
        "config": context.config.to_flat(),
    }
    schema = pa.schema(
        [pa.field("embedding", column.type), pa.field("label", pa.int64())],
        metadata={"fedhypevae.synthetic": json.dumps(notes, sort_keys=True)},
    )
    table = pa.Table.from_arrays([column, pa.array(labels.numpy())], schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue())


def build_summary(
    context: RunContext,
    method: Method,
    progress: Progress,
    *,
    rows: int,
    scores: Mapping[str, Any],
    data_is_public: bool,
    seconds: float,
) -> dict[str, Any]:
    """The summary of a completed run, JSON-ready. ε comes from the events in the sites' own ledgers."""
    privacy = context.config.privacy
    spent = epsilon_per_site(progress.charged, privacy.delta)
    reasons = why_not_private(context)
    return {
        "status": "completed",
        "method": method.name,
        "run": progress.run_name,
        "sites": len(progress.bytes_down),
        "rounds": context.plan.num_rounds,
        "privacy": {
            "epsilon_target": privacy.epsilon,
            "epsilon_planned": epsilon_pld(context.plan.all_events, privacy.delta) if not reasons else None,
            "delta": privacy.delta,
            "unit": privacy.unit,
            "neighbouring": NEIGHBOURING,
            "accountant": ACCOUNTANT,
            "clip_norm": privacy.clip_norm,
            "sampling_rate": privacy.sampling_rate,
            "noise_multiplier_training": context.plan.training_noise,
            "noise_multiplier_statistics": context.plan.statistics_noise,
            "noise": privacy.noise,
            "trust": privacy.trust,
            "secure_aggregation": shared_noise_facts(context),
            "encoder_training": privacy.encoder_training,
            "end_to_end": not reasons,
            "why_not_end_to_end": reasons,
            "epsilon_spent_per_site": spent,
            "data_is_public": data_is_public,
        },
        "synthetic_rows": rows,
        "scores": dict(scores),
        "seconds": seconds,
        "bytes_up_per_site": max(progress.bytes_up.values(), default=0),
        "bytes_down_per_site": max(progress.bytes_down.values(), default=0),
        "rounds_taken_part": [list(sites) for sites in progress.taken_part],
        "rounds_missing": [dict(sites) for sites in progress.missing],
        "history": [dict(entry) for entry in progress.history],
        "config": context.config.to_flat(),
    }


def build_privacy_statement(context: RunContext, progress: Progress, *, data_is_public: bool) -> dict[str, Any]:
    """The run's privacy statement, from what the sites' own ledgers said; valid by its schema."""
    rounds = [site for sites in progress.taken_part for site in sites]
    charges = {
        site: SiteCharge(read_events(text), rounds.count(site), progress.receipts.get(site, ""))
        for site, text in progress.charged.items()
    }
    return build_statement(context, StatementFacts(progress.run_name, charges, data_is_public))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Save JSON, readable, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=False) + "\n").encode())

"""What a run leaves behind: the synthetic set, the generator, and a summary, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.assurance.shared_noise import shared_noise_facts
from common.assurance.statement import SiteCharge, StatementFacts, build_statement, why_not_private
from common.durable import write_output
from common.methods.base import Method, RunContext
from common.privacy.clipping import NEIGHBOURING
from common.privacy.composition import epsilon_pld
from common.publishing.parquet import set_notes, write_rows
from server_app.checkpoint import Progress
from server_app.progress import epsilon_per_site, read_events

ACCOUNTANT = "privacy loss distributions (dp-accounting), within the run"


def write_synthetic(path: Path, context: RunContext, embeddings: Tensor, labels: Tensor) -> None:
    """Save a synthetic set as parquet: `embedding` (fixed-size list of float32) and `label` (findings: of int8)."""
    notes = set_notes(context, why_not_private(context))
    rows, names, task = [(embeddings, labels)], context.problem.class_names, context.problem.task
    write_rows(path, rows, dim=embeddings.shape[1], class_names=names, notes=notes, task=task)


def build_summary(
    context: RunContext,
    method: Method,
    progress: Progress,
    *,
    rows: int,
    scores: Mapping[str, Any],
    data_is_public: bool,
    seconds: float,
    refused: Iterable[Mapping[str, Any]] = (),
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
        "refused_replies": [dict(reply) for reply in refused],
        "left_out": dict(progress.left_out),
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
    write_output(path, (json.dumps(content, indent=2, sort_keys=False) + "\n").encode())

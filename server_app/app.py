"""The ServerApp: reads the configuration, meets the sites, runs the method, writes the results."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.assurance.statement import why_not_private
from common.config.presets import resolve_listed
from common.config.run import RunConfig
from common.errors import ConfigError, FedHypeVAEError
from common.methods import method_of
from common.methods.base import Method, Problem, RunContext
from common.methods.published import draw_published
from common.methods.shared_sums import check_shares_noise
from common.names import STATUS
from common.publishing.generator_file import write_generator
from common.texts import object_or_empty
from common.wire.allow_list import dump_context, load_context, run_identity
from server_app.checkpoint import Progress, check_own, load_checkpoint, save_checkpoint
from server_app.evaluation import evaluate
from server_app.meeting import Meeting, meet
from server_app.newcomers import Newcomers, with_known_indices
from server_app.progress import RoundPrinter, finite_or_none
from server_app.receipts import FILE as RECEIPTS
from server_app.receipts import Receipts
from server_app.refusals import Refusals
from server_app.results import build_privacy_statement, build_summary, write_json, write_synthetic
from server_app.strategy import FederatedStrategy
from server_app.tracking import RunWatch, check_tracking, now

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from the run's configuration.

    Writes to `output-dir`, which must be the run's own: checkpoint.safetensors after every round, then
    synthetic.parquet, generator.safetensors, privacy_statement.json and summary.json. A failure leaves status.json with
    one line for a person, and ends the run as failed.
    """
    folder = None
    try:
        config = resolve_listed(context.run_config)
        output = work_folder() / config.operation.output_dir
        check_own(output, resume=config.operation.resume)
        folder = output
        _run(grid, config, folder, f"run-{context.run_id}")
    except Exception as error:
        _report_failure(folder, error)
        raise SystemExit(error.exit_code if isinstance(error, FedHypeVAEError) else 1) from error


def work_folder() -> Path:
    """Folder that relative paths of the configuration start from: FEDHYPEVAE_HOME, or where the process runs."""
    return Path(os.environ.get("FEDHYPEVAE_HOME", "")).resolve()


def _run(grid: Grid, config: RunConfig, folder: Path, flower_run: str) -> None:
    printer, num_sites = RoundPrinter(), config.federation.num_sites
    write_json(folder / STATUS, {"status": "waiting", "method": config.method, "sites": num_sites, "updated": now()})
    check_tracking(config.operation.tracking)
    method = method_of(config)
    plan = method.plan(config)  # before the sites are asked: a budget that can't be met ends here
    before = load_checkpoint(folder) if config.operation.resume else None
    is_open = method.takes_newcomers(config.privacy.trust)
    known = {} if before is None else before[1].members
    # who left for good must not keep a run from going on; where the noise is shared out, all must be there
    least = config.operation.min_sites if known and is_open else None
    refusals = Refusals(printer.say, () if before is None else before[1].refused)
    meeting = with_known_indices(meet(grid, config, printer, refusals, least), known, is_open)
    task = config.federation.task
    dims, sets = meeting.site_dims, meeting.label_sets
    problem = Problem(meeting.dim, meeting.class_names, len(meeting.members), dims, task, sets)
    if before is not None:  # some may be missing now; each that is there is held against the width that it had
        earlier = load_context(before[1].context).problem
        names = earlier.class_names if task == "multilabel" else meeting.class_names
        problem = replace(earlier, class_names=names, task=task)
    run_context = RunContext(config, problem, plan)
    if config.privacy.trust == "secagg":
        check_shares_noise(method, run_context)
    for reason in why_not_private(run_context):
        printer.say(f"no end-to-end guarantee: {reason}")
    if before is None:
        members = {member.name: member.index for member in meeting.members.values()}
        run_name = config.operation.run_name or flower_run
        state, progress = method.init(run_context), Progress(run_name, dump_context(run_context), members=members)
        save_checkpoint(folder, state, progress)
    else:
        state, progress = before
        _check_same(progress.context, dump_context(run_context))
        printer.say(f"resuming {progress.run_name} after round {state.round}")
    facts: dict[str, Any] = {
        "run": progress.run_name,
        "method": config.method,
        "rounds": plan.num_rounds,
        "round": state.round,
        "sites": len(meeting.members),
        "delta": config.privacy.delta,
        "epsilon_target": finite_or_none(config.privacy.epsilon),
    }
    watch = RunWatch(folder, printer, config.operation.tracking, facts)
    simulated = all(fact.position >= 0 for fact in meeting.facts.values())
    receipts = Receipts(None if simulated else work_folder() / RECEIPTS)
    newcomers = Newcomers(config, meeting, progress.members, is_open, watch.say, refusals)
    strategy = FederatedStrategy(
        method, run_context, meeting.members, state, progress, folder, watch, refusals, newcomers.admit, receipts
    )
    strategy.run(grid)
    summary = _publish(grid, strategy, method, run_context, folder, meeting, refusals)
    statement = build_privacy_statement(run_context, strategy.progress, data_is_public=meeting.data_is_public)
    write_json(folder / "privacy_statement.json", statement)
    write_json(folder / "summary.json", summary)
    watch.close("completed")


def _publish(
    grid: Grid,
    strategy: FederatedStrategy,
    method: Method,
    context: RunContext,
    folder: Path,
    meeting: Meeting,
    refusals: Refusals,
) -> dict[str, Any]:
    """Fit and sample the artifact, write it, and score it where all data is public."""
    artifact = method.finish(context, strategy.state)
    write_generator(folder / "generator.safetensors", context, artifact, meeting.identity)
    synthetic = draw_published(context, artifact)
    rows = 0 if synthetic is None else synthetic[1].shape[0]
    if synthetic is not None:
        write_synthetic(folder / "synthetic.parquet", context, *synthetic)
    scores: Mapping[str, Any] = {}
    if meeting.data_is_public:
        scores = evaluate(grid, strategy, context, artifact, synthetic)
    return build_summary(
        context,
        method,
        strategy.progress,
        rows=rows,
        scores=scores,
        data_is_public=meeting.data_is_public,
        seconds=round(strategy.seconds(), 3),
        refused=refusals.found,
    )


def _check_same(before: str, now: str) -> None:
    """A resumed run must be the one that was declared to the sites' ledgers; folders and time-outs may differ."""
    if run_identity(before) != run_identity(now):
        raise ConfigError(
            "the checkpoint is of a run with other settings or sites: resume with the same, or start a new run with "
            "another output-dir"
        )


def _report_failure(folder: Path | None, error: Exception) -> None:
    """Print one line, and note it in the run's own folder; None where the run was refused before it had one."""
    known = isinstance(error, FedHypeVAEError)
    line = str(error) if known else f"the server app failed ({type(error).__name__}): see the log above"
    if not known:
        traceback.print_exc()
    print(f"error: {line}", flush=True)
    if folder is None:
        return
    code = error.exit_code if isinstance(error, FedHypeVAEError) else 1
    ended = {"status": "failed", "error": line, "exit_code": code, "updated": now()}
    write_json(folder / STATUS, {**object_or_empty(folder / STATUS), **ended})

"""One cell of the comparison: run a method on a federation, and score what it publishes and what its sites keep."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.protocol import BenchmarkSite, Federation, load_federations
from benchmarks.reference import (
    MethodScores,
    alone_heads,
    as_record,
    centralised_head,
    local_heads,
    score_heads_at_sites,
    score_method,
    split_of,
)
from benchmarks.rows import Row
from common.config.rivals import RivalsConfig
from common.config.run import Scalar
from common.errors import ConfigError
from common.evaluation.fidelity import fidelity
from common.evaluation.heads import LinearHead, fit_linear_head
from common.evaluation.nonlinear_heads import score_heads
from common.evaluation.scores import SiteScores, Split, mean_scores, mix_probabilities, score
from common.loop import LoopResult, run_loop
from common.methods import get_method
from common.methods.base import RunContext, ServerState, SiteState, seeded
from common.methods.constants import CENTRE
from common.methods.features import head_features
from common.methods.heads.linear import published_head
from common.methods.mh_pfedhn import personal as mh_pfedhn
from common.methods.mh_pfedhn import taught as mh_pfedhn_gd
from common.methods.mh_pfedhn.architectures import light_architecture, site_architecture
from common.methods.published import published_set
from common.privacy.composition import epsilon_pld

_SCORES = ("synthetic_only", "mixed", "own_lambda", "personalised")
_TEST_ROWS = 2000
_JUDGED_ROWS = 20_000  # of a synthetic set, for the heads that are not linear: more take minutes and change little
_TUNING_EPOCHS = 10


@dataclass(frozen=True)
class Trained:
    """A method run on a federation: its result, the head that it gives, and its synthetic set if it draws one.

    `fitted` is the head where it was fitted on the synthetic set, and None where the method publishes its own.
    """

    result: LoopResult
    head: LinearHead | None
    synthetic: Split | None
    fitted: LinearHead | None = None


@lru_cache(maxsize=2)
def federations_of(dataset: str, seed: int) -> tuple[Federation, ...]:
    """The federations of a data set, kept for the next method on the same one."""
    return load_federations(dataset, seed)


@lru_cache(maxsize=2)
def local_heads_of(dataset: str, seed: int) -> tuple[tuple[LinearHead, ...], ...]:
    """The sites' own heads, fitted once for all methods."""
    return tuple(local_heads(federation) for federation in federations_of(dataset, seed))


def run_cell(dataset: str, row: Row, seed: int) -> dict[str, Any]:
    """One record of `table.json`; of leave-one-site-out the folds together, one value a site left out."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    parts = [
        _run_fold(federation, own, row)
        for federation, own in zip(federations_of(dataset, seed), local_heads_of(dataset, seed), strict=True)
    ]
    folded = len(parts) > 1
    record: dict[str, Any] = {"dataset": dataset, "method": row.method, "trust": row.trust}
    record |= {"epsilon": parts[0]["epsilon"], "seed": seed}
    for name in _SCORES:
        scores = [part[name] for part in parts]
        if any(one is None for one in scores):
            record[name] = None
        else:
            record[name] = as_record([mean_scores(list(one)) for one in scores] if folded else scores[0])
    for name in ("heads", "fidelity"):
        record[name] = mean_of([part[name] for part in parts])
    for name in ("bytes_up", "bytes_down"):
        record[name] = round(sum(part[name] for part in parts) / len(parts))
    record["released_parameters"] = parts[0]["released_parameters"]
    return {**record, "seconds": round(time.perf_counter() - started, 2)}


def train(federation: Federation, row: Row, changes: dict[str, Scalar] | None = None) -> Trained:
    """Run a row's method; under secagg with the discrete shares of noise of the real protocol, without its masks.

    Args:
        federation: the sites.
        row: method and settings.
        changes: settings to change further.
    """
    if row.registered is None:
        raise ConfigError(f"{row.method} is a reference row, fitted at once: expected a row with a registered method")
    config = row.config(federation, changes)
    sites = [site.train for site in federation.sites]
    if row.trust == "none":
        sites = [replace(site, groups=None) for site in sites]
    result = run_loop(config, sites, federation.class_names)
    head, synthetic, fitted = published_head(result.artifact), None, None
    due = published_set(result.context, result.artifact)
    if due is not None:
        synthetic = due.all(threads=1)
        if head is None:
            head = fitted = fit_linear_head(*synthetic, federation.num_classes)
    return Trained(result, head, synthetic, fitted)


def score_trained(
    federation: Federation, own: Sequence[LinearHead], row: Row, trained: Trained
) -> dict[str, Sequence[SiteScores] | None]:
    """All four scores at every site; None where the method has no such thing."""
    scores: dict[str, Sequence[SiteScores] | None] = dict.fromkeys(_SCORES)
    if trained.head is not None:
        table = score_method(federation, trained.head.scaled(row.head_scale), own)
        scores.update(_columns(table))
    if row.registered == "fedlambda":
        result = trained.result
        scores["personalised"] = [
            score(site_probabilities(result.context, result.state, kept, rows), rows, labels)
            for kept, (rows, labels) in zip(result.sites, _tests(federation), strict=True)
        ]
    elif row.registered is not None and row.registered.startswith("mh_pfedhn"):
        scores["personalised"] = [
            score(torch.softmax(personal_scores(trained.result, index, site), 1), *split_of(site.test))
            for index, site in enumerate(federation.sites)
        ]
    return scores


def personal_scores(result: LoopResult, index: int, site: BenchmarkSite) -> Tensor:
    """A site's own model of MH-pFedHN on its test rows, (n, K), after some further epochs at the site."""
    context, params = result.context, result.state.params
    architecture = site_architecture(context, index)
    longer = RivalsConfig.model_validate({**context.config.rivals.model_dump(), "local_epochs": _TUNING_EPOCHS})
    tuning = RunContext(context.config.model_copy(update={"rivals": longer}), context.problem, context.plan)
    train_rows, test_rows = (
        mh_pfedhn.features_at(context, rows.embeddings, params[CENTRE], index) for rows in (site.train, site.test)
    )
    theta, teacher = mh_pfedhn.site_model(context, params, index), None
    if f"embedding.{mh_pfedhn_gd.light_name(architecture.dim)}" in params:
        light = mh_pfedhn_gd.light_model(context, params, architecture.dim)
        teacher = light_architecture(context, architecture.dim).logits(light, train_rows)
    order = seeded("tuning", context.config.federation.seed, index)
    tuned = mh_pfedhn.train_model(tuning, architecture, theta, train_rows, site.train.labels, order, teacher)
    return architecture.logits(tuned, test_rows)


def cost(result: LoopResult) -> dict[str, int]:
    """Mean bytes that a site sends and receives in the whole run, and the size of what is published.

    The bytes are those of the values on the wire, as `run_loop` counted them, without headers.
    """
    return {
        "bytes_up": round(result.bytes_up),
        "bytes_down": round(result.bytes_down),
        "released_parameters": sum(value.numel() for value in result.artifact.tensors.values()),
    }


def _run_fold(federation: Federation, own: Sequence[LinearHead], row: Row) -> dict[str, Any]:
    nothing: dict[str, Any] = {"heads": None, "fidelity": None, "epsilon": None, "bytes_up": 0, "bytes_down": 0}
    if row.registered is None:
        is_local = row.method == "local_only"
        heads = list(alone_heads(federation, own)) if is_local else [centralised_head(federation)] * len(own)
        alone = score_heads_at_sites(federation, heads)
        scores: dict[str, Any] = dict.fromkeys(_SCORES)
        if is_local:
            scores["personalised"] = alone
        else:
            scores = _columns(score_method(federation, heads[0], own))
        return {**nothing, **scores, "released_parameters": 0}
    trained = train(federation, row)
    config = row.config(federation)
    method = get_method(config.method)
    record: dict[str, Any] = {**nothing, **score_trained(federation, own, row, trained), **cost(trained.result)}
    if method.private:
        # under secagg of the sum, against a server that keeps to the protocol and the colluders
        record["epsilon"] = epsilon_pld(method.plan(config).all_events, config.privacy.delta)
    if trained.synthetic is not None:
        record |= judge(federation, trained.synthetic, trained.fitted)
    return record


def _columns(scores: MethodScores) -> dict[str, Sequence[SiteScores]]:
    return {name: getattr(scores, name) for name in _SCORES}


def mean_of(parts: Sequence[Any]) -> Any:
    """Means over folds of numbers in equal nested mappings; None where a fold has None."""
    if any(part is None for part in parts):
        return None
    if isinstance(parts[0], Mapping):
        return {name: mean_of([part[name] for part in parts]) for name in parts[0]}
    return sum(parts) / len(parts)


def judge(federation: Federation, synthetic: Split, fitted: LinearHead | None) -> dict[str, Any]:
    """Other heads on the synthetic set, and how near it is to real test rows; all sites' rows together."""
    tests = _tests(federation)
    if federation.held_out is not None or federation.dataset == "organ-small":
        tests = tests[:1]  # one set that all sites share
    rows, labels = torch.cat([one for one, _ in tests]), torch.cat([one for _, one in tests])
    drawn = torch.randperm(len(labels), generator=seeded("test rows", federation.seed))[:_TEST_ROWS]
    real, random = (rows[drawn], labels[drawn]), seeded("judge", federation.seed)
    linear = fit_linear_head(*synthetic, federation.num_classes) if fitted is None else fitted
    few = synthetic[0][:_JUDGED_ROWS], synthetic[1][:_JUDGED_ROWS]  # classes in turn, so that all have their share
    heads = score_heads(few, real, federation.num_classes, random, fitted=linear)
    near = fidelity(real[0], synthetic[0], random)
    manifold = None if near.manifold is None else asdict(near.manifold)
    names = ("precision", "recall", "density", "coverage")
    measured = {name: None if manifold is None else manifold[name] for name in names}
    return {
        "heads": {name: asdict(one) for name, one in heads.items()},
        "fidelity": {"mmd2": near.mmd2, **measured, "two_sample": near.two_sample},
    }


def _tests(federation: Federation) -> list[Split]:
    return [split_of(site.test) for site in federation.sites]


def site_probabilities(
    context: RunContext, state: ServerState, site: SiteState, embeddings: Tensor, mixing: float | None = None
) -> Tensor:
    """What a site predicts for embeddings (n, d_x): class probabilities (n, K).

    Args:
        context: the run.
        state: the server's last state.
        site: the site's private state, with its own head.
        embeddings: (n, d_x).
        mixing: λ in [0, 1]; None takes the one that the run chose.
    """
    params = state.params
    features = head_features(context, embeddings, params[CENTRE])
    chosen = float(state.memory["mixing"]) if mixing is None else mixing
    own = LinearHead(site.tensors["weight"], site.tensors["bias"]).probabilities(features)
    return mix_probabilities(own, LinearHead(params["weight"], params["bias"]).probabilities(features), chosen)

"""What a site answers without charge: only where its policy declares the data public and lets metrics leave."""

from __future__ import annotations

import hashlib
import json

from torch import Tensor

from client_app.place import Place
from client_app.records import check_matches, load_records, split_data
from client_app.release.log import ReleaseLog
from client_app.task import Work, request_of
from common.errors import PolicyRefusal
from common.evaluation.heads import LinearHead, fit_linear_head, probabilities_of
from common.evaluation.scores import score, score_site
from common.evaluation.splits import SPLIT_NAMES
from common.methods import get_method
from common.methods.base import Problem
from common.wire.allow_list import SCORE_NAMES
from common.wire.received import check_shapes
from embeddings.store.sets import EmbeddingSet

_HEADS = ("synthetic", "statistics")


def answer_evaluate(place: Place, work: Work) -> dict[str, float]:
    """Scores on the site's own test split: only where the policy declares the data public and lets metrics leave."""
    _check_public(place, work)
    _check_sent(work)
    records = load_records(place.records, place.cache_dir)
    check_matches(records.metadata, work.context, work.index)
    train, validation, test = (_scored_split(records, name, work.context.problem) for name in SPLIT_NAMES)
    findings = work.context.problem.findings
    heads = {
        name: LinearHead(work.tensors[f"{name}.weight"], work.tensors[f"{name}.bias"], findings=findings)
        for name in _HEADS
        if f"{name}.weight" in work.tensors
    }
    local = fit_linear_head(*train, num_classes=work.context.problem.num_classes)
    found = {"local_only": score(local, *test)}
    if "synthetic" in heads:
        mixing = float(work.words["mixing"])
        found = score_site(train, validation, test, heads["synthetic"], mixing=mixing, local_head=local)
    method = get_method(work.context.config.method)
    if method.personal_scores is not None:
        personal = method.personal_scores(work.context, work.tensors, test[0], work.index)
        found["personal"] = score(probabilities_of(personal, findings=findings), *test)
    if "statistics" in heads:
        found["statistics_only"] = score(heads["statistics"], *test)
    scores: dict[str, float] = {}
    for name in (name for name in SCORE_NAMES if name in found):
        value = found[name]
        scores[f"{name}.accuracy"] = value.accuracy
        scores[f"{name}.balanced_accuracy"] = value.balanced_accuracy
    _log_public(place, work, "evaluate", json.dumps(scores, sort_keys=True).encode())
    return scores


def _scored_split(records: EmbeddingSet, name: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """One split as heads see it: of a site that labels some of the run's findings, the others are unknown."""
    data = split_data(records, name, "record", problem)
    return data.embeddings, data.labels


def _check_sent(work: Work) -> None:
    """Refuse other tensors than whole heads, and the site's own model where the method makes one (ConfigError)."""
    context, method = work.context, get_method(work.context.config.method)
    dim, num_classes = context.problem.dim, context.problem.num_classes
    shapes = dict(method.received_by(context, work.index)) if method.personal_scores is not None else {}
    for name in _HEADS:
        if {f"{name}.weight", f"{name}.bias"} & set(work.tensors):
            shapes |= {f"{name}.weight": (num_classes, dim), f"{name}.bias": (num_classes,)}
    check_shapes(work.tensors, shapes)


def _check_public(place: Place, work: Work) -> None:
    place.policy.check(request_of(work.context, wants_metrics=True), recompute_epsilon=False)
    if not (place.policy.data_is_public and place.policy.metrics_may_leave):
        raise PolicyRefusal("metrics_may_leave", "scores may not leave this site; nothing was charged")


def _log_public(place: Place, work: Work, what: str, payload: bytes) -> None:
    """Note in the site's log that something left without charge: only where its data is public."""
    digest = hashlib.sha256(payload).hexdigest()
    ReleaseLog(place.folder / "releases.jsonl").append(work.run_id, what, (), digest, len(payload))

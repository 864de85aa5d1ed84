"""Whether a site answers tells nothing about its records: two attacks that once read it, through the real handlers.

Both zero the features that a gradient's right side is made of, so that clipping sees nothing of its left side, which is
then summed over the records: the sum overflows float32 exactly when a sum over records passes a threshold. What falls
outside the public bounds is refused alike in both worlds, uncharged; what lies within them is answered in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from common.bounds import LARGEST_NORM
from common.config.run import RunConfig
from common.evaluation.splits import split_by_unit
from common.methods import get_method
from common.methods.base import PrivacyPlan, Problem, RunContext
from common.wire.allow_list import dump_context
from embeddings.store.sets import EmbeddingSet
from tests.harness import CLASSES, DIM, Federation, HarnessSite, deliver, make_set, words_of

FLOAT32_MAX = float(np.finfo(np.float32).max)
DELTA = 1e-5
POLICY = {"lifetime_epsilon": 3.0, "run_epsilon": 3.0}


def ask(site: HarnessSite, context: RunContext, tensors: Mapping[str, Tensor], index: int) -> Message:
    """A round, asked by a server that made everything up itself."""
    return send(site, dump_context(context), tensors, index)


def send(site: HarnessSite, context: str, tensors: Mapping[str, Tensor], index: int) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # what Flower's own starter sets
    words = {"context": context, "run": "evil", "index": 0, "round": index}
    content = RecordDict({"words": ConfigRecord(words), "tensors": ArrayRecord(dict(tensors))})
    return deliver(site, Message(content, dst_node_id=site.node, message_type="train"))


def context_of(noise: float, rounds: int, **settings: str | int | float | bool) -> RunContext:
    flat: dict[str, str | int | float | bool] = {
        "epsilon": 1.2, "delta": DELTA, "num-rounds": rounds, "spare-rounds": 0, "elbo-weight": 0.0,
        "num-sites": 1, "min-sites": 1, "logit-adjustment": 0.0, "statistics-share": 0.0, "public-total": 60,
    }  # fmt: skip
    config = RunConfig.from_flat(flat | {name.replace("_", "-"): value for name, value in settings.items()})
    plan = PrivacyPlan(None, noise, 1.0, 1, rounds, DELTA, 0)
    return RunContext(config, Problem(DIM, CLASSES, 1), plan)


def worlds(folder: Path) -> tuple[dict[str, HarnessSite], EmbeddingSet, int]:
    """Two sites that differ by one training record, and that record's row."""
    base = make_set(60, seed=3)
    target = int(np.flatnonzero(split_by_unit(base.embeddings, None) == "train")[7])
    others = np.arange(len(base.labels)) != target
    without = replace(base, embeddings=base.embeddings[others], labels=base.labels[others])
    federation = Federation.create(folder, 2, sets={0: base, 1: without}, **POLICY, min_noise_multiplier=0.5)
    return dict(zip(("with", "without"), federation.sites, strict=True)), base, target


def overflowing(base: EmbeddingSet, target: int, context: RunContext, column: float | None) -> dict[str, Tensor]:
    """Φ whose trunk is zero and one of whose class columns makes the target decide about an overflow."""
    rows = base.embeddings / np.linalg.norm(base.embeddings, axis=1, keepdims=True)
    labels, train = base.labels, split_by_unit(base.embeddings, None) == "train"

    def share(j: int, k: int) -> tuple[float, float]:
        wrong = train & (((labels != k) & (rows[:, j] > 0)) | ((labels == k) & (rows[:, j] < 0)))
        others = float(np.abs(rows[wrong & (np.arange(len(labels)) != target), j]).sum())
        return others, float(abs(rows[target, j])) if wrong[target] else 0.0

    places = [(j, k) for j in range(DIM) for k in range(3)]
    j, k = max(places, key=lambda place: share(*place)[1] / (share(*place)[0] + 1e-9))
    others, own = share(j, k)
    phi = {name: torch.zeros_like(value) for name, value in get_method("fedhypevae").init(context).params.items()}
    phi["decoder.0.class_weight"][j, k] = FLOAT32_MAX / (others + own / 2) if column is None else column
    return phi


def codes_and_charges(sites: Mapping[str, HarnessSite], replies: Mapping[str, Message]) -> list[tuple[object, ...]]:
    return [
        (
            sorted(set(words_of(replies[name])) - {"reference"}),
            words_of(replies[name]).get("error", ""),
            sorted(
                (n, a.shape, len(a.data)) for r in replies[name].content.array_records.values() for n, a in r.items()
            ),
            [event.count for run in site.runs().values() for event in run.charged],
        )
        for name, site in sites.items()
    ]


@pytest.mark.parametrize("column", [None, LARGEST_NORM * 0.99, LARGEST_NORM * 1e-3, 1.0])
def test_answer_does_not_tell_whether_a_record_is_there(tmp_path: Path, column: float | None) -> None:
    sites, base, target = worlds(tmp_path)
    context = context_of(4.0, 1, code_dim=2, trunk_width=4, latent_dim=0, feature_norm=2.0, clip_norm=10.0)
    phi = overflowing(base, target, context, column)
    one, other = codes_and_charges(sites, {name: ask(site, context, phi, 0) for name, site in sites.items()})
    assert one == other
    assert one[1] == ("config" if column is None else "")
    assert one[3] == ([] if column is None else [1])


@pytest.mark.parametrize("within", [False, True])
def test_answers_do_not_count_records(tmp_path: Path, within: bool) -> None:
    """The count of training records outside a class, by bisection: every question gets the same answer."""
    data = make_set(400, seed=8)
    site = Federation.create(tmp_path, 1, sets={0: data}, **POLICY, min_noise_multiplier=0.5).sites[0]
    rounds = 6
    context = context_of(13.0, rounds, code_radius=1e-3)
    truth = int(((split_by_unit(data.embeddings, None) == "train") & (data.labels != 0)).sum())
    clipped = 0.03 / math.sqrt(2 * (0.49 + 0.117**2))
    answers = []
    for index, count in enumerate(np.linspace(truth - 60, truth + 60, rounds)):
        phi = dict(get_method("fedhypevae").init(context).params)
        if within:
            phi["constant.centre"] = torch.full((DIM,), -1.9 / math.sqrt(DIM))
            column = LARGEST_NORM * 0.99 * count / (truth + 60)
        else:
            phi["constant.centre"] = torch.full((DIM,), -1e6)
            column = min(FLOAT32_MAX / (count * 0.7 / math.sqrt(DIM) * clipped), FLOAT32_MAX)
        columns = torch.zeros(DIM, 3)
        columns[0, 0] = column
        phi["decoder.0.class_weight"] = columns
        answers.append(words_of(ask(site, context, phi, index)).get("error", ""))
    assert set(answers) == {"" if within else "config"}
    assert sum(event.count for run in site.runs().values() for event in run.charged) == (rounds if within else 0)


def test_the_tiny_radius_that_hid_features_from_clipping_is_no_setting(tmp_path: Path) -> None:
    site = Federation.create(tmp_path, 1, **POLICY).sites[0]
    context = context_of(13.0, 1)
    phi = get_method("fedhypevae").init(context).params
    words = dump_context(context).replace('"code-radius": 0.1', '"code-radius": 1e-42')
    assert "1e-42" in words
    assert words_of(send(site, words, phi, 0))["error"] == "config"
    assert site.entries() == 1

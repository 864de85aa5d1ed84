"""What a server may ask of a site with findings: refused by public rules, or answered alike for all records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client_app.release.last_resort import LOGGED
from tests.harness import CLASSES, Federation, changed, deliver, make_set, words_of

OWN = ("liver", "lung")
KINDS = ("query.consent", "query.statistics", "train")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Message]:
    """Messages of an honest server to a site that labels two of the run's three findings."""
    sets = {0: make_set(60, task="multilabel", classes=OWN), 1: make_set(60, task="multilabel")}
    federation = Federation.create(tmp_path_factory.mktemp("honest"), 2, sets=sets)
    federation.run(task="multilabel")
    return {kind: federation.asked(kind, "site-1") for kind in KINDS}


def padded(count: int) -> dict[str, Any]:
    return {"class_names": [*CLASSES, *(f"finding {number}" for number in range(count - len(CLASSES)))]}


CONTEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "findings of other names": ("data", {"class_names": ["heart", "lung", "spleen"]}),
    "one finding less": ("data", {"class_names": ["liver"], "label_sets": []}),
    "another task": ("config", {"task": "ordinal", "label_sets": []}),
    "more findings than any run has": ("config", padded(513)),
    "a million findings": ("config", padded(10**6)),
}


@pytest.mark.parametrize("case", CONTEXT)
@pytest.mark.parametrize("kind", KINDS)
def test_a_context_of_other_findings_is_refused(
    tmp_path: Path, asked: dict[str, Message], kind: str, case: str
) -> None:
    code, problem = CONTEXT[case]
    assert_refused(tmp_path, changed(asked[kind], {"problem": problem}), code)


@pytest.mark.parametrize("kind", ["query.consent", "query.statistics"])
@pytest.mark.parametrize("sets", [[], [[0, 1, 2]], [[0], [1]]])
def test_statistics_that_do_not_count_what_the_site_labels_are_refused(
    tmp_path: Path, asked: dict[str, Message], kind: str, sets: list[list[int]]
) -> None:
    """They would be noise alone, and charged all the same."""
    assert_refused(tmp_path, changed(asked[kind], {"problem": {"label_sets": sets}}), "data")


def test_as_many_findings_as_a_run_may_have_are_answered(tmp_path: Path, asked: dict[str, Message]) -> None:
    (site,) = Federation.create(tmp_path, 1, sets={0: make_set(30, task="multilabel", classes=OWN)}).sites
    assert "error" not in words_of(deliver(site, changed(asked["query.statistics"], {"problem": padded(512)})))
    assert LOGGED not in site.log()


def assert_refused(folder: Path, message: Message, code: str) -> None:
    sets = {number: make_set(size, seed=size, task="multilabel", classes=OWN) for number, size in enumerate((60, 1))}
    for site in Federation.create(folder, 2, sets=sets).sites:
        before = site.entries()
        assert words_of(deliver(site, message))["error"] == code
        assert (site.entries(), site.runs(), site.releases()) == (before, {}, ())


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_replies_are_alike_whatever_is_known_and_present(tmp_path: Path, unit: str) -> None:
    """A finding without a positive, without a known record, in all records; and a site of one record."""
    base = make_set(60, task="multilabel", patients=True)
    policy: dict[str, Any] = {"unit": unit, "max_records_per_patient": 3} if unit == "patient" else {}
    labels = {"as they are": base.labels, "no positive": np.minimum(base.labels, 0)}
    labels |= {name: np.full_like(base.labels, value) for name, value in (("absent", 0), ("unknown", -1), ("all", 1))}
    nobody = base.labels.copy()
    nobody[:, 1] = -1
    labels["one unknown to all"] = nobody
    sets = {number: replace(base, labels=one) for number, one in enumerate(labels.values())}
    sets[len(sets)] = make_set(1, task="multilabel", patients=True)
    federation = Federation.create(tmp_path, len(sets), sets=sets, **policy)
    federation.run(task="multilabel", **policy)
    for kind in KINDS:
        asked = federation.asked(kind, "site-1")
        fresh = Federation.create(tmp_path / kind, len(sets), sets=sets, **policy)
        replies = [deliver(site, asked) for site in fresh.sites]
        assert len({shape_of(reply) for reply in replies}) == 1
        assert "error" not in words_of(replies[0])
        assert not any(LOGGED in site.log() for site in (*fresh.sites, *federation.sites))


def shape_of(reply: Message) -> tuple[Any, ...]:
    """Names of words and tensors, and shapes."""
    arrays = reply.content.array_records
    tensors = arrays["tensors"].to_torch_state_dict() if "tensors" in arrays else {}
    return tuple(sorted(words_of(reply))), tuple((name, tuple(value.shape)) for name, value in sorted(tensors.items()))

"""The last gate, and what becomes of an error: a code and a reference, whatever its text held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from client_app.place import Place
from client_app.release.egress import check_reply
from common.errors import DataError, WireError
from tests.harness import Exchanged, Federation, deliver, words_of

SECRET = "patient 4711, label 2, row 17"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    federation = Federation.create(tmp_path_factory.mktemp("ran"), 1)
    federation.run(num_rounds=1)
    return federation


class PanicException(BaseException):
    """As libraries in Rust raise them: no Exception."""


@pytest.mark.parametrize("error", [ValueError(SECRET), DataError(SECRET), PanicException(SECRET), MemoryError(SECRET)])
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("query.hello", "client_app.app.read_facts"),
        ("query.statistics", "client_app.task.read_facts"),
        ("train", "client_app.release.granted.message_ledger"),
    ],
)
def test_error_reply_holds_code_and_reference_only(
    tmp_path: Path, ran: Federation, error: BaseException, kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    site = Federation.create(tmp_path, 1).sites[0]
    reply = deliver(site, ran.asked(kind, "site-1"))
    words = words_of(reply)
    assert set(words) == {"error", "reference"}
    assert words["error"] in {"failure", "data"}
    assert not reply.has_error()
    assert SECRET not in str(reply.content)
    assert SECRET in site.log()
    assert words["reference"] in site.log()


@pytest.mark.parametrize(
    "failure",
    [OSError(28, f"No space left on device, {SECRET}"), UnicodeEncodeError("ascii", SECRET, 0, 1, "not in range")],
    ids=["full disk", "console"],
)
def test_error_reply_survives_a_log_that_fails(
    tmp_path: Path, ran: Federation, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """The log's own failure may not become an exception: Flower would send its text."""

    def fail(*_: object) -> None:
        raise failure

    site = Federation.create(tmp_path, 1).sites[0]
    monkeypatch.setattr("client_app.app._log", fail)
    monkeypatch.setattr("client_app.release.granted.message_ledger", fail)
    reply = deliver(site, ran.asked("train", "site-1"))
    assert set(words_of(reply)) == {"error", "reference"}
    assert SECRET not in str(reply.content)


def spoiled_replies() -> dict[str, tuple[str, RecordDict]]:
    tensors = ArrayRecord({"gradient": torch.zeros(2)})
    whole = ArrayRecord({"gradient": torch.zeros(2, dtype=torch.int64)})
    masked = torch.zeros(2, dtype=torch.uint8)
    receipt = {"receipt": "1:" + "0" * 64, "charged": "[]"}
    return {
        "a loss among the words": ("train", RecordDict({"words": ConfigRecord({**receipt, "loss": 0.25})})),
        "a loss in place of a word": ("train", RecordDict({"words": ConfigRecord({"receipt": 0.25, "charged": "[]"})})),
        "counts in place of a word": ("train", RecordDict({"words": ConfigRecord({"charged": [3, 4]})})),
        "a second record of words": ("train", RecordDict({"more": ConfigRecord({"charged": "[]"})})),
        "a second record of tensors": ("train", RecordDict({"state": tensors})),
        "metrics of training": ("train", RecordDict({"scores": MetricRecord({"mixed.accuracy": 0.5})})),
        "tensors in a hello": ("hello", RecordDict({"tensors": tensors})),
        "a count in a hello": ("hello", RecordDict({"words": ConfigRecord({"num_examples": 60})})),
        "tensors beside scores": ("evaluate", RecordDict({"tensors": tensors})),
        "a score by another name": ("evaluate", RecordDict({"scores": MetricRecord({"loss": 0.5})})),
        "a score that is not finite": ("evaluate", RecordDict({"scores": MetricRecord({"mixed.accuracy": np.nan})})),
        "bytes in a tensor": ("train", RecordDict({"tensors": ArrayRecord({"gradient": masked})})),
        "something beside a masked vector": (
            "secagg_masked",
            RecordDict({"tensors": ArrayRecord({"masked": masked, "gradient": masked})}),
        ),
        "no masked vector": ("secagg_masked", RecordDict({"tensors": ArrayRecord({"gradient": masked})})),
        "whole numbers in a tensor": ("train", RecordDict({"tensors": whole})),
    }


@pytest.mark.parametrize("case", spoiled_replies())
def test_gate_refuses(case: str) -> None:
    kind, content = spoiled_replies()[case]
    with pytest.raises(WireError, match="nothing"):
        check_reply(kind, content)  # type: ignore[arg-type]


def test_gate_passes_honest_replies(ran: Federation) -> None:
    kinds: dict[str, Any] = {
        "query.hello": "hello",
        "query.consent": "consent",
        "query.statistics": "statistics",
        "train": "train",
    }
    for sent in ran.sent():
        check_reply(kinds[sent.kind], sent.message.content)


def test_gate_stops_a_handler_that_sends_more(ran: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that adds a loss to its words is stopped at the site: nothing but an error leaves."""
    from client_app import app
    from client_app.answers import training as work

    def leaky(place: Place, task: work.Work) -> work.Answer:
        answer = work.answer_train(place, task)
        return work.Answer(answer.tensors, {**answer.words, "loss": "0.123456"})

    monkeypatch.setattr(app, "answer_train", leaky)
    reply = deliver(Federation.create(tmp_path, 1).sites[0], ran.asked("train", "site-1"))
    assert words_of(reply)["error"] == "wire"
    assert not reply.content.array_records


def test_hello_reads_no_record(tmp_path: Path, ran: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a site says hello must not depend on a row: it says what its file says of itself."""

    def opened(*_: object) -> None:
        raise RuntimeError("a record was read")

    for name in ("read_store", "read_usable", "_chunk"):
        monkeypatch.setattr(f"embeddings.store.file.{name}", opened)
    site = Federation.create(tmp_path, 1).sites[0]
    assert "identity" in words_of(deliver(site, ran.asked("query.hello", "site-1")))


def test_hello_refuses_records_without_patients_where_patients_are_the_unit(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1, unit="patient", max_records_per_patient=2)
    with pytest.raises(SystemExit):
        federation.run(unit="patient", max_records_per_patient=2)
    assert "no patient column" in federation.sites[0].log()
    assert federation.sites[0].entries() == 1


def _tensors_sent(sent: list[Exchanged]) -> int:
    return sum(len(record) for seen in sent for record in seen.message.content.array_records.values())


def test_message_without_its_parts_is_an_error_not_a_crash(ran: Federation, tmp_path: Path) -> None:
    site = Federation.create(tmp_path, 1).sites[0]
    for content in (RecordDict(), RecordDict({"words": ConfigRecord({"context": "{", "run": "x", "index": 0})})):
        message = Message(content, dst_node_id=site.node, message_type="train")
        assert set(words_of(deliver(site, message))) == {"error", "reference"}
    assert site.entries() == 1

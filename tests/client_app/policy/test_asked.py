"""A server's message is checked by public rules before anything is charged and before a record is read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from client_app.policy.asked import read_work
from common.bounds import LARGEST_NORM
from common.errors import ConfigError
from tests.harness import Federation, changed, deliver, make_set, words_of


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Message]:
    """Messages of an honest server, whole parameters in each."""
    federation = Federation.create(tmp_path_factory.mktemp("honest"), 1)
    federation.run()
    return {kind: federation.asked(kind, "site-1") for kind in ("query.hello", "query.statistics", "train")}


def with_tensors(message: Message, change: Callable[[dict[str, Tensor]], Mapping[str, Any]]) -> Message:
    """A copy with other parameters."""
    copy = changed(message)
    tensors = change(copy.content.array_records["tensors"].to_torch_state_dict())
    copy.content["tensors"] = ArrayRecord(dict(tensors))
    return copy


def assert_refused(folder: Path, message: Message, code: str = "config") -> None:
    """Refused alike by two sites with other records, and by neither charged, nor one of its records read."""
    sets = {0: make_set(60), 1: make_set(1, seed=9)}
    for site in Federation.create(folder, 2, sets=sets).sites:
        before = site.entries()
        reply = deliver(site, message)
        assert words_of(reply)["error"] == code
        assert (site.entries(), site.runs(), site.releases()) == (before, {}, ())


def scaled(name: str, factor: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: torch.ones_like(tensors[name]) * factor}


def in_one_place(name: str, value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


OUTPUT = "decoder.0.class_weight"
PARAMETERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "one is missing": lambda tensors: {name: tensors[name] for name in sorted(tensors)[1:]},
    "one is not the method's": lambda tensors: tensors | {"extra": torch.zeros(1)},
    "a constant is not the method's": lambda tensors: tensors | {"constant.extra": torch.zeros(1)},
    "another shape": lambda tensors: tensors | {OUTPUT: torch.zeros(3, 12)},
    "a row too many": lambda tensors: tensors | {OUTPUT: torch.zeros(13, 3)},
    "bytes": lambda tensors: tensors | {OUTPUT: torch.zeros(12, 3, dtype=torch.uint8)},
    "not a number": in_one_place(OUTPUT, float("nan")),
    "infinite": in_one_place("class_bias.weight", float("inf")),
    "the largest float32": in_one_place(OUTPUT, 3.4e38),
    "a large column": scaled(OUTPUT, LARGEST_NORM / 5.9),
    "a far centre": in_one_place("constant.centre", 2.1),
    "a centre at 1e6": scaled("constant.centre", -1e6),
    "a total below zero": scaled("constant.total", -1.0),
    "a total without end": scaled("constant.total", 1e13),
    "huge class offsets": scaled("constant.class_offsets", -40.0),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_beyond_the_public_bounds_are_refused(tmp_path: Path, asked: dict[str, Message], case: str) -> None:
    assert_refused(tmp_path, with_tensors(asked["train"], PARAMETERS[case]))


@pytest.mark.parametrize(
    "change",
    [
        scaled(OUTPUT, LARGEST_NORM / 6.1),
        scaled("constant.centre", 0.5),
        scaled("constant.class_offsets", 0.0),
        scaled("constant.total", 1.0),
    ],
)
def test_parameters_within_the_bounds_are_answered(
    tmp_path: Path, asked: dict[str, Message], change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """The control: refusals are of the bounds, and not of any other parameters than the honest ones."""
    (site,) = Federation.create(tmp_path, 1).sites
    assert set(words_of(deliver(site, with_tensors(asked["train"], change)))) >= {"receipt", "charged"}


def bomb(shape: tuple[int, ...], kind: str = "<f4") -> Array:
    """An array whose header claims more than there is."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return Array("float32", shape, "numpy.ndarray", stream.getvalue() + b"0" * 16)


@pytest.mark.parametrize(
    "array",
    [
        bomb((10**11,)),
        bomb((10**6, 10**6, 10**6)),
        bomb((-4,)),
        bomb((2,), "<f8"),
        bomb((4,), "|O"),
        Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY"),
        Array("float32", (2,), "numpy.ndarray", b""),
        Array("float32", (2,), "torch.tensor", b"0" * 100),
    ],
)
def test_arrays_that_are_none_are_refused(tmp_path: Path, asked: dict[str, Message], array: Array) -> None:
    message = changed(asked["train"])
    record = message.content.array_records["tensors"]
    record[OUTPUT] = array
    assert_refused(tmp_path, message)


WORDS: dict[str, dict[str, Any]] = {
    "an unknown word": {"exfiltrate": 1},
    "an index beyond all newcomers": {"index": 100_000},
    "a negative index": {"index": -1},
    "an index that is a text": {"index": "0"},
    "an index that is a fraction": {"index": 0.5},
    "a round that is a text": {"round": "0"},
    "an empty name": {"run": ""},
    "a long name": {"run": "x" * 201},
    "a name with a line's end": {"run": "a\nb"},
    "a name that is a number": {"run": 3},
    "a list": {"run": ["a"]},
    "a word of another kind of message": {"survivors": "{}"},
    "a context that is a number": {"context": 1},
    "no context": {"context": ""},
    "a context without end": {"context": " " * 4_000_001},
    "a nested context": {"context": "[" * 100_000},
    "a context with huge digits": {"context": '{"config": {}, "problem": ' + "9" * 5000 + ', "plan": {}}'},
    "a list of contexts": {"context": "[]"},
}


@pytest.mark.parametrize("case", WORDS)
def test_words_out_of_range_are_refused(tmp_path: Path, asked: dict[str, Message], case: str) -> None:
    message = changed(asked["train"])
    for name, value in WORDS[case].items():
        message.content.config_records["words"][name] = value
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    "shared",
    [
        {"config": {"trust": "secagg", "num-sites": 4}, "problem": {"num_sites": 4}},
        {"config": {"method": "mh_pfedhn", "num-sites": 4}, "problem": {"num_sites": 4}},
    ],
)
def test_index_of_a_newcomer_is_refused_where_none_is_taken(asked: dict[str, Message], shared: dict[str, Any]) -> None:
    assert read_work("train", changed(asked["train"], index=4)).index == 4
    assert read_work("train", changed(asked["train"], shared, index=3)).index == 3
    with pytest.raises(ConfigError, match="room for 4"):
        read_work("train", changed(asked["train"], shared, index=4))


@pytest.mark.parametrize("kind", ["query.statistics", "train"])
@pytest.mark.parametrize("record", [{"more": ConfigRecord({"a": 1})}, {"score": MetricRecord({"a": 1.0})}])
def test_records_that_no_message_has_are_refused(
    tmp_path: Path, asked: dict[str, Message], kind: str, record: dict[str, Any]
) -> None:
    message = changed(asked[kind])
    for name, value in record.items():
        message.content[name] = value
    assert_refused(tmp_path, message)


def test_statistics_come_with_no_tensors(tmp_path: Path, asked: dict[str, Message]) -> None:
    message = changed(asked["query.statistics"])
    message.content["tensors"] = ArrayRecord({"constant.centre": torch.zeros(12)})
    assert_refused(tmp_path, message)


MANY: dict[str, dict[str, Any]] = {"config": {"task": "multilabel"}}
CONTEXT: dict[str, dict[str, dict[str, Any]]] = {
    "no width": {"problem": {"dim": 0}},
    "a width without end": {"problem": {"dim": 10**6}},
    "a width that is a fraction": {"problem": {"dim": 12.0}},
    "no class": {"problem": {"class_names": []}},
    "a class twice": {"problem": {"class_names": ["a", "a", "b"]}},
    "a class without a name": {"problem": {"class_names": ["", "a", "b"]}},
    "a long name": {"problem": {"class_names": ["a" * 201, "b", "c"]}},
    "a million classes": {"problem": {"class_names": [str(number) for number in range(5000)]}},
    "no site": {"problem": {"num_sites": 0}},
    "sites without end": {"problem": {"num_sites": 10**9}},
    "widths of other sites": {"problem": {"site_dims": [12, 12]}},
    "a task of no name": {"problem": {"task": "regression"}, "config": {"task": "regression"}},
    "one grade": {"problem": {"task": "ordinal", "class_names": ["a"]}, "config": {"task": "ordinal"}},
    "sets of findings for classes": {"problem": {"label_sets": [[0]]}},
    "a set of findings that are none": {"problem": {"label_sets": [[7]], "task": "multilabel"}, **MANY},
    "an empty set of findings": {"problem": {"label_sets": [[]], "task": "multilabel"}, **MANY},
    "a set of findings twice": {"problem": {"label_sets": [[0], [0]], "task": "multilabel"}, **MANY},
    "a set of findings out of order": {"problem": {"label_sets": [[1, 0]], "task": "multilabel"}, **MANY},
    "an unknown field": {"problem": {"records": 60}},
    "a field that the plan has not": {"plan": {"free": 1}},
    "noise beyond what a ledger holds": {"plan": {"training_noise": 1e10}},
    "steps that are a text": {"plan": {"steps_per_round": "1"}},
    "a setting that is a list": {"config": {"clip-norm": [0.03]}},
    "a setting that is an object": {"config": {"clip-norm": {}}},
    "a tiny radius of the code": {"config": {"code-radius": 1e-42}},
    "a network of 200 GB": {"config": {"hidden-widths": "8192,8192,8192", "encoder-width": 4096}},
    "a huge embedding of the classes": {"config": {"chunk-size": 10**9}},
}


def test_a_context_of_two_tasks_is_refused(tmp_path: Path, asked: dict[str, Message]) -> None:
    assert_refused(tmp_path, changed(asked["train"], {"problem": {"task": "multilabel"}}))


@pytest.mark.parametrize("case", CONTEXT)
@pytest.mark.parametrize("kind", ["query.statistics", "train"])
def test_context_out_of_range_is_refused(tmp_path: Path, asked: dict[str, Message], case: str, kind: str) -> None:
    assert_refused(tmp_path, changed(asked[kind], CONTEXT[case]))


def test_hello_with_other_words_is_refused(tmp_path: Path, asked: dict[str, Message]) -> None:
    assert_refused(tmp_path, changed(asked["query.hello"], clip_norm=0.03))
    assert_refused(tmp_path / "again", changed(asked["query.hello"], seed=-1))


def test_empty_message_is_refused(tmp_path: Path) -> None:
    for content in (RecordDict(), RecordDict({"words": ConfigRecord({"context": json.dumps({}), "run": "x"})})):
        assert_refused(tmp_path / str(len(content)), Message(content, dst_node_id=101, message_type="train"))


def test_heads_that_are_none_are_refused(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1, data_is_public=True, metrics_may_leave=True)
    federation.run(num_rounds=1)
    site, message = federation.sites[0], federation.asked("evaluate", "site-1")
    sent = len(site.releases())
    for change in (
        lambda tensors: {name: value for name, value in tensors.items() if name != "synthetic.bias"},
        lambda tensors: tensors | {"synthetic.weight": torch.zeros(3, 13)},
        lambda tensors: tensors | {"other.weight": torch.zeros(3, 12)},
    ):
        assert words_of(deliver(site, with_tensors(message, change)))["error"] == "config"
    assert len(site.releases()) == sent

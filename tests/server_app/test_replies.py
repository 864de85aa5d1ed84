"""The public limits of what a site may say, one by one; the lies of a whole run are in test_hostile_site.py."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from common.config.run import RunConfig
from common.errors import WireError
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.privacy.events import PrivacyEvent
from common.secagg.assumptions import Assumptions, charged_events
from common.wire.allow_list import Kind, encode_events
from common.wire.reply_fields import REPLIES, REPLY_FIELDS, ErrorFields
from server_app.arrays import read_tensors
from server_app.charges import NO_CHARGES, Charges
from server_app.replies import Expected, known_codes, read_charged, read_reply

SECAGG = {"trust": "secagg", "num-sites": 6, "dropouts": 1, "colluders": 1}


def context_of(**changes: str | int | float | bool) -> RunContext:
    config = RunConfig.from_flat({"num-rounds": 3, "spare-rounds": 1, "sampling-rate": 0.5, **changes})
    return RunContext(config, Problem(8, ("a", "b"), 6), get_method(config.method).plan(config))


def charges_of(context: RunContext) -> Charges:
    return Charges.of(get_method(context.config.method), context)


def told(*events: PrivacyEvent) -> str:
    return encode_events([event.to_json() for event in events])


def test_every_kind_of_reply_has_a_model_of_exactly_the_allowed_fields() -> None:
    charge = {"receipt", "seal", "charged"}
    allowed: dict[str, set[str]] = {
        "hello": {"site", "position", "identity", "canary", "public", "task"},
        "consent": set(),
        "statistics": charge,
        "train": charge,
        "evaluate": set(),
        "secagg_keys": {"card"},
        "secagg_shares": {"boxes", "commitments", "refused"},
        "secagg_check": {"refused"},
        "secagg_masked": {"signature", *charge},
        "secagg_unmask": {"shares", *charge},
    }
    assert {kind: set(fields) for kind, fields in REPLY_FIELDS.items()} == allowed
    assert set(allowed) == set(get_args(Kind))
    for model in REPLIES.values():
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["strict"]
    assert set(ErrorFields.model_fields) == {"error", "reference"}


def test_codes_are_those_of_the_projects_errors() -> None:
    assert {"failure", "config", "data", "policy", "budget", "ledger", "wire", "protocol"} <= known_codes()


def test_charges_of_a_whole_run_are_read_each_mechanism_once() -> None:
    context = context_of()
    plan = context.plan
    charged = (*plan.statistics_events, *plan.round_events, *plan.round_events, *plan.round_events)
    found = read_charged(told(*charged), charges_of(context))
    assert {event.label: event.count for event in found} == {"statistics": 1, "training": 3}
    assert {(event.noise_multiplier, event.sampling_rate) for event in found} == {
        (event.noise_multiplier, event.sampling_rate) for event in charged
    }


def test_charges_of_a_run_without_protection_are_none() -> None:
    charges = charges_of(context_of(epsilon=float("inf")))
    assert charges == NO_CHARGES
    assert read_charged("[]", charges) == ()
    with pytest.raises(WireError, match="does not have"):
        read_charged(told(*context_of().plan.statistics_events), charges)


@pytest.mark.parametrize("feared", [2, 3])
def test_site_that_fears_more_colluders_may_be_charged_more(feared: int) -> None:
    context = context_of(**SECAGG)
    worse = charged_events(context.plan.all_events, Assumptions(6, 1, 1), feared)
    assert worse[0].noise_multiplier < context.plan.all_events[0].noise_multiplier
    assert len(read_charged(told(*worse), charges_of(context))) == 2
    with pytest.raises(WireError, match="does not have"):
        read_charged(told(*worse), charges_of(context_of()))  # under local nobody is charged for colluders


def impossible() -> dict[str, str]:
    plan = context_of().plan
    (training,) = plan.round_events
    fields = json.loads(training.to_json())
    text = training.to_json()
    return {
        "no JSON": "[",
        "an object": "{}",
        "a number": "[1]",
        "a negative number of times": json.dumps([[text, -1]]),
        "true times": json.dumps([[text, True]]),
        "2.0 times": json.dumps([[text, 2.0]]),
        "infinite times": f"[[{json.dumps(text)}, Infinity]]",
        "an event of numbers": "[[3, 1]]",
        "an event that is none": '[["x", 1]]',
        "an event of other form": json.dumps([[json.dumps(fields), 1]]),
        "a deep event": json.dumps([["[" * 990, 1]]),
        "less noise": json.dumps([[PrivacyEvent(**{**fields, "noise_multiplier": 0.1}).to_json(), 1]]),
        "another rate": json.dumps([[PrivacyEvent(**{**fields, "sampling_rate": 0.4}).to_json(), 1]]),
        "another label": json.dumps([[PrivacyEvent(**{**fields, "label": "more"}).to_json(), 1]]),
        "more rounds than can be": json.dumps([[text, 10_000]]),
        "more in one event": json.dumps([[PrivacyEvent(**{**fields, "count": 10_000}).to_json(), 1]]),
        "more in many events": json.dumps([[text, 100]] * 3),
        "more runs of events than can be": json.dumps([[text, 1]] * 3000),
        "nothing": "[]",
    }


@pytest.mark.parametrize("case", impossible())
def test_charges_that_make_no_sense_are_refused_and_not_quoted(case: str) -> None:
    text = impossible()[case]
    with pytest.raises(WireError, match="charged") as refused:
        read_charged(text, charges_of(context_of()))
    assert len(str(refused.value)) < 100


def test_headers_that_numpy_writes_are_read_whatever_their_padding() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    array = Array(values)
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    for padding in (b"\n", b" " * 50 + b"\n"):
        head = b"\x93NUMPY\x01\x00" + len(text + padding).to_bytes(2, "little") + text + padding
        made = Array(array.dtype, array.shape, array.stype, head + values.numpy().tobytes())
        assert torch.equal(read_tensors("train", ArrayRecord({"x": made}), {"x": (2, 3)})["x"], values)
    assert torch.equal(read_tensors("train", ArrayRecord({"x": array}), {"x": (2, 3)})["x"], values)
    scalar = Array(torch.tensor(4.0))
    assert read_tensors("train", ArrayRecord({"x": scalar}), {"x": ()})["x"].item() == 4.0


@pytest.mark.parametrize("kind", ["secagg_shares", "secagg_check", "secagg_unmask"])
def test_table_that_is_longer_than_its_sites_need_is_refused(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    asked = Message(RecordDict({}), dst_node_id=7, message_type=f"query.{kind}", ttl=60.0)
    asked.metadata.__dict__["_message_id"] = "1"
    words = dict.fromkeys(REPLY_FIELDS[kind], "")
    words |= {"charged": "[]"} if "charged" in words else {}
    table = sorted(set(words) & {"boxes", "refused", "shares"})[0]
    for length, fits in ((2999, True), (3001, False)):
        reply = Message(RecordDict({"words": ConfigRecord({**words, table: "x" * length})}), reply_to=asked)
        expected = Expected(kind, {}, sites=3)
        if fits:
            assert len(read_reply(reply, expected).words[table]) == length
        else:
            with pytest.raises(WireError, match="longer than its sites need"):
                read_reply(reply, expected)

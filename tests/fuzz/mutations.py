"""Replies that no honest site sends: changed in their words, tensors, records or bytes, by rules of their structure.

Every change comes from one random generator: the same seed gives the same replies.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto

TEXTS: tuple[str, ...] = (
    "",
    "x",
    "x" * 100_000,
    "\x1b[2J\x07",
    "\u202eevil",
    "[" * 50_000,
    '{"a":' * 20_000,
    "[red]site[/red]",
    "null",
    "[]",
    "{}",
    "NaN",
    "-1",
    "9" * 5000,
    "../../etc/passwd",
    "00" * 300,
)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2**31, -(2**31), 2**62, -(2**63), 10**30, True, False, None, "", "1", [], {}),
    *(0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), 1e30, -1e9),
)
SCALARS: tuple[Any, ...] = (
    *(0, -1, 2**62, -(2**63), 1e308, float("nan"), float("inf"), True, False, b"", b"\x00\xff" * 100),
    *(["x"] * 10_000, [1] * 10_000, [0.5], [True], [b"x"], []),
)
VALUES: tuple[float, ...] = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, -1e9, 1e9, 1e-45, 0.0, 1e4)


@dataclass(frozen=True)
class Mutation:
    """A changed reply: what was done to it, and whether it breaks a rule for certain."""

    what: str
    message: Message
    certain: bool = False


def mutate(
    rng: random.Random, asked: Message, honest: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> Mutation:
    """A reply to a message that is changed in one to three ways.

    Args:
        rng: where all choices come from.
        asked: what the server sent.
        honest: records of an honest reply.
        others: records of earlier replies, of any site and kind.
    """
    # how often it tries depends on noise and salt in the reply: what is drawn for the next one must not
    own = random.Random(rng.getrandbits(64))
    while True:
        try:
            made = _mutate(own, asked, honest, others)
            wire = message_to_proto(made.message).SerializeToString()
            message_from_proto(MessageProto.FromString(wire))
            return made
        except Exception:  # Flower itself can't carry it: it would never reach the server app
            continue


def _mutate(
    rng: random.Random, asked: Message, honest: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> Mutation:
    way = rng.random()
    if way < 0.03:
        code = rng.choice([0, 1, 2, 3, 5, 8, 99, -1, 2**31, 2**62])
        return Mutation(f"Flower's error {code}", Message(Error(code, rng.choice(TEXTS)), reply_to=asked))
    if way < 0.08:
        return Mutation("another reply again", Message(RecordDict(dict(rng.choice(others))), reply_to=asked))
    if way < 0.13:
        words = {"error": rng.choice(["data", "all is well", "policy:x y", "stale", *TEXTS])}
        words |= {"reference": rng.choice(["0123abcd", *TEXTS])} if rng.random() < 0.8 else {"more": "x"}
        return Mutation(f"error {words!r:.80}", Message(RecordDict({"words": ConfigRecord(words)}), reply_to=asked))
    if way < 0.23:
        return _flipped(rng, asked, honest)
    content, done, certain = dict(honest), [], False
    for _ in range(rng.choice([1, 1, 2, 3])):
        change = rng.choice([_words, _words, _words, _tensors, _tensors, _records])
        what, sure = change(rng, content)
        done.append(what)
        certain = certain or sure
    certain = certain and len(done) == 1  # a second change may take back the first
    return Mutation("; ".join(done), Message(RecordDict(content), reply_to=asked), certain)


def _flipped(rng: random.Random, asked: Message, honest: Mapping[str, Any]) -> Mutation:
    """Bits of the serialised reply turned round, or its end cut off."""
    proto = message_to_proto(Message(RecordDict(dict(honest)), reply_to=asked))
    content = bytearray(proto.content.SerializeToString())
    if rng.random() < 0.2:
        content = content[: rng.randrange(len(content))]
    for _ in range(rng.choice([1, 2, 8])):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    proto.content.ParseFromString(bytes(content))
    return Mutation("flipped bits", Message(message_from_proto(proto).content, reply_to=asked))


def _records(rng: random.Random, content: dict[str, Any]) -> tuple[str, bool]:
    """A record too many, of too few, or under another name."""
    name = rng.choice(["more", "words2", "\x1b", "tensors", "words", "scores"])
    made = rng.choice(
        [ConfigRecord({"x": 1}), MetricRecord({"x": 1.0}), ArrayRecord({"x": Array(np.zeros(3))}), MetricRecord({})]
    )
    if rng.random() < 0.5 and content:
        gone = rng.choice(sorted(content))
        content.pop(gone)
        return f"no record {gone}", False
    new = name not in content
    content[name] = made
    return f"record {name!r}", new and name in {"more", "words2", "\x1b"}


def _words(rng: random.Random, content: dict[str, Any]) -> tuple[str, bool]:
    record = content.get("words")
    if not isinstance(record, ConfigRecord):
        scores = content.get("scores")
        return _scores(rng, content, scores) if isinstance(scores, MetricRecord) else _records(rng, content)
    words = dict(record)
    name = rng.choice([*sorted(words), "loss", "\x1b[2J", "x" * 5000])
    before = words.get(name)
    ways: list[Callable[[], Any]] = [lambda: rng.choice(SCALARS), lambda: rng.choice(TEXTS)]
    if isinstance(before, str) and before[:1] in ("[", "{"):
        ways += [lambda: _changed_json(rng, before)] * 6
    if isinstance(before, str) and before:
        ways += [lambda: _changed_text(rng, before)]
    if name in words and rng.random() < 0.1:
        words.pop(name)
        content["words"] = ConfigRecord(words)
        return f"no word {name}", True
    words[name] = rng.choice(ways)()
    content["words"] = ConfigRecord(words)
    return f"word {name!r:.40} = {words[name]!r:.80}", name not in record


def _scores(rng: random.Random, content: dict[str, Any], record: MetricRecord) -> tuple[str, bool]:
    scores = dict(record)
    name = rng.choice([*sorted(scores), "loss.accuracy", "\x1b"])
    value: Any = rng.choice([float("nan"), float("inf"), -1.0, 2, 10**18, 1e308, [0.5], [1, 2], 0.25])
    if rng.random() < 0.2 and name in scores:
        scores.pop(name)
    else:
        scores[name] = value
    content["scores"] = MetricRecord(scores)
    return f"score {name!r} = {value!r}", name not in record or value != 0.25


def _changed_text(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    return rng.choice([text[:at], text * 3, text[:at] + rng.choice("\x00{[\u00e9x0") + text[at + 1 :], text[::-1]])


def _changed_json(rng: random.Random, text: str) -> str:
    """JSON that is changed at one place, at any depth; texts that are JSON themselves are opened."""
    try:
        return json.dumps(_changed(rng, json.loads(text)))[:2_000_000]
    except (ValueError, RecursionError):
        return _changed_text(rng, text)


def _changed(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.25 or not isinstance(value, list | dict | str) or not value:
        return _other_value(rng, value)
    if isinstance(value, str):
        return _changed_json(rng, value) if value[:1] in ("[", "{") else _other_value(rng, value)
    if isinstance(value, list):
        changed = list(value)
        at = rng.randrange(len(changed))
        return rng.choice(
            [(changed * 2000)[:2000], changed[:at], [*changed[:at], _changed(rng, changed[at]), *changed[at + 1 :]]]
        )
    fields = dict(value)
    name = rng.choice(sorted(fields))
    fields[name] = _changed(rng, fields[name])
    if rng.random() < 0.2:
        fields[rng.choice(["more", "\x1b", "__class__"])] = 1
    if rng.random() < 0.1:
        fields.pop(name)
    return fields


def _other_value(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.1:
        for _ in range(rng.choice([5, 300])):
            value = [value]
        return value
    return rng.choice([*NUMBERS, *TEXTS[:6]])


def _tensors(rng: random.Random, content: dict[str, Any]) -> tuple[str, bool]:
    record = content.get("tensors")
    if not isinstance(record, ArrayRecord) or not record:
        return _words(rng, content) if "words" in content else _records(rng, content)
    arrays = dict(record)
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    what, changed, certain = rng.choice([_values, _values, _field, _bytes])(rng, array)
    if rng.random() < 0.1:
        arrays[rng.choice(["surprise", "\x1b", name + "x"])] = arrays.pop(name)
        certain = True
    else:
        arrays[name] = changed
    content["tensors"] = ArrayRecord(arrays)
    return f"tensor {name}: {what}", certain


def _values(rng: random.Random, array: Array) -> tuple[str, Array, bool]:
    """Other numbers in the right form: not finite, huge, or a few of them."""
    values = np.array(array.numpy())
    if values.dtype == np.uint8:
        flat = values.reshape(-1)
        for _ in range(rng.choice([1, 4, 64])):
            flat[rng.randrange(flat.size)] = rng.choice([0, 1, 127, 128, 255])
        # the scales come first, four bytes each: a float that is none, infinite, huge, or tiny
        if rng.random() < 0.5 and flat.size >= 4:
            scale = np.array([rng.choice(VALUES)], dtype="<f4").view(np.uint8)
            flat[:4] = scale
        return "other bytes", Array(values), False
    value = rng.choice(VALUES)
    if rng.random() < 0.5:
        values.fill(value)
    else:
        values.reshape(-1)[rng.randrange(values.size)] = value
    return f"value {value}", Array(values), not np.isfinite(value)


def _field(rng: random.Random, array: Array) -> tuple[str, Array, bool]:
    """A type, shape or format that is not that of the bytes."""
    dtype, shape, stype = array.dtype, array.shape, array.stype
    which = rng.choice(["dtype", "shape", "stype"])
    if which == "dtype":
        dtype = rng.choice(["float64", "object", "int8", "\x1b", "", "float16", "x" * 1000])
    elif which == "shape":
        size = int(np.prod(shape))
        shape = rng.choice(
            [(), (-1,), (2**31 - 1,), (2**31 - 1,) * 4, (0,), (size + 1,), (1, *shape), (*shape, 1), (1,) * 100]
        )
    else:
        stype = rng.choice(["pickle", "", "numpy", "\x1b"])
    return f"{which} {rng.random():.3f}", Array(dtype, shape, stype, array.data), True


def _bytes(rng: random.Random, array: Array) -> tuple[str, Array, bool]:
    """Bytes that are cut, lengthened, flipped, or headed by a lie."""
    data = bytearray(array.data)
    way = rng.choice(["cut", "longer", "flip", "header", "pickle"])
    if way == "cut":
        data = data[: rng.randrange(len(data))]
    elif way == "longer":
        data += bytes(rng.choice([1, 1000, 1_000_000]))
    elif way == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "header":
        shape = rng.choice(["(4294967296,)", "(-1,)", "(1e9,)", "(" * 300 + ")" * 300, "'x'"])
        text = (
            f"{{'descr': '{rng.choice(['|u1', '<f4', '|O', '<U9999'])}', 'fortran_order': False, 'shape': {shape}, }}\n"
        )
        data = bytearray(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
    else:
        data = bytearray(b"\x80\x04\x95" + bytes(50))
    return f"bytes {way}", Array(array.dtype, array.shape, array.stype, bytes(data)), way != "flip"

"""A server's message as a task: read within public limits, before a record is read or anything is charged.

Which words and records there are, their types, lengths and ranges. What falls outside is refused as `config`, the same
at every site; whether the policy allows the task, and whether its parameters are the method's, is checked after.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from client_app.task import Work
from common.errors import ConfigError
from common.methods import get_method
from common.methods.base import RunContext
from common.wire.allow_list import REQUEST_FIELDS, Kind, load_context

_LONGEST = 50_000_000  # characters: sealed shares for thousands of sites
_MOST_TENSORS = 10_000
_MOST_SITES = 100_000  # as `num-sites` may be; with those that come later
_NPY = b"\x93NUMPY\x01\x00"
_FLOAT32 = np.dtype("<f4")
_WITH_TENSORS = frozenset({"train", "secagg_masked", "evaluate"})


def _text(longest: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and len(value) <= longest


def _number(least: float, most: float) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _scalar(value: object) -> bool:
    return isinstance(value, (str, int, float)) and not (isinstance(value, str) and len(value) > _LONGEST)


_ALLOWED: Mapping[str, Callable[[object], bool]] = {
    "run": lambda value: isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable(),
    "index": _whole,
    "round": _whole,
    "mixing": _number(0.0, 1.0),
    "what": _text(40),
    "attempt": _text(64),
    "receipt": _text(200),
    "seal": _text(200),
}
"""By name; other words are texts of any content, or checked as settings of a run."""


def read_words(kind: Kind, message: Message) -> dict[str, str | int | float]:
    """The words of a message.

    Args:
        kind: of the message.
        message: from the server.

    Raises:
        ConfigError: records or words that such a message does not have, or one of another type or out of range.
    """
    content = message.content
    others = set(content.config_records) - {"words"} | set(content.array_records) - {"tensors"}
    if others or set(content.metric_records) or "words" not in content.config_records:
        raise ConfigError(f"message {kind}: expected the records words and tensors alone; nothing was charged")
    words = dict(content.config_records["words"])
    needed, optional = REQUEST_FIELDS[kind]
    wrong = sorted((needed - set(words)) | (set(words) - needed - optional))
    if wrong:
        raise ConfigError(f"message {kind}: word {wrong[0]!r:.100} is missing or not one of its words")
    for name, value in words.items():
        if not _ALLOWED.get(name, _scalar)(value):
            raise ConfigError(f"message {kind}: word {name!r} can't be {value!r:.100}; nothing was charged")
    return words


def read_work(kind: Kind, message: Message) -> Work:
    """The task of a message within a run.

    Raises:
        ConfigError: as `read_words`; a context, index or tensor that no honest server sends.
    """
    words = read_words(kind, message)
    context = load_context(str(words["context"]))
    index, places = int(words["index"]), _places(context)
    if not 0 <= index < places:
        raise ConfigError(f"the run has room for {places} sites, found index {index}; nothing was charged")
    record = message.content.array_records.get("tensors", ArrayRecord())
    if len(record) > (_MOST_TENSORS if kind in _WITH_TENSORS else 0):
        raise ConfigError(f"message {kind}: {len(record)} tensors are more than it may have; nothing was charged")
    tensors = {name: _tensor(name, array.stype, array.data) for name, array in record.items()}
    return Work(context, str(words["run"]), index, int(words.get("round", -1)), tensors, words)


def _places(context: RunContext) -> int:
    """How many indices the run has: those of its sites, and of the newcomers that it may take in."""
    method, trust = get_method(context.config.method), context.config.privacy.trust
    is_open = method.takes_newcomers(trust) and not context.problem.site_dims
    return _MOST_SITES if is_open else context.problem.num_sites


def _tensor(name: str, kind: str, content: bytes) -> Tensor:
    """An array of a message; no more memory is taken than its bytes, whatever shape its header claims."""
    stream = io.BytesIO(content)
    stream.seek(len(_NPY))
    try:
        if kind != "numpy.ndarray" or content[:8] != _NPY:
            raise ValueError
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError:
        raise ConfigError(f"tensor {name!r:.100} is no array in numpy's format; nothing was charged") from None
    start = stream.tell()
    if dtype != _FLOAT32 or min(shape, default=0) < 0:
        raise ConfigError(f"tensor {name!r:.100} must be float32; nothing was charged")
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ConfigError(f"tensor {name!r:.100} has not as many bytes as its shape says; nothing was charged")
    values = np.frombuffer(content, dtype=dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
    return torch.from_numpy(values.copy())

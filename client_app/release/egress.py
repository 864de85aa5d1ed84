"""The last gate: whatever a handler wants to send is held against the allow-list, record by record.

Tensors were already checked against the run's own names and shapes when the release was made (`release.payload_of`).
Here nothing is known of the run: only which kinds of record, words, scores and types a reply of its kind may hold.
"""

from __future__ import annotations

import math

from flwr.app import RecordDict

from common.errors import WireError
from common.wire.allow_list import MASKED, Kind, check_scores, dtype_of
from common.wire.reply_fields import check_fields

# Kinds of message whose reply holds tensors.
_WITH_TENSORS = frozenset({"statistics", "train", "secagg_masked"})


def check_reply(kind: Kind, content: RecordDict) -> None:
    """Refuse a reply that holds anything but what its kind allows.

    Args:
        kind: of the message that is answered.
        content: what the handler wants to send.

    Raises:
        WireError: names the first record, word or score that is not on the list; never a value.
    """
    allowed = {"words": "config"}
    if kind in _WITH_TENSORS:
        allowed["tensors"] = "array"
    if kind == "evaluate":
        allowed = {"scores": "metric"}
    found = dict.fromkeys(content.config_records, "config")
    found |= dict.fromkeys(content.array_records, "array")
    found |= dict.fromkeys(content.metric_records, "metric")
    for name, sort in found.items():
        if allowed.get(name) != sort:
            raise WireError(f"message {kind}: {sort} record {name!r} is not on the allow-list; nothing is sent")
    if "words" in found:
        check_fields(kind, dict(content.config_records["words"]))
    scores = dict(content.metric_records["scores"]) if "scores" in found else {}
    check_scores(scores)
    tensors = content.array_records["tensors"] if "tensors" in found else {}
    if kind == "secagg_masked" and set(tensors) - {MASKED}:
        raise WireError(f"message {kind}: {MASKED!r} must be the only tensor; nothing is sent")
    wanted = str(dtype_of(kind)).removeprefix("torch.")
    for name, array in tensors.items():
        if array.dtype != wanted:
            raise WireError(f"message {kind}: tensor {name!r} must be {wanted}, found {array.dtype}; nothing is sent")
    if any(not isinstance(value, float) or not math.isfinite(value) for value in scores.values()):
        raise WireError(f"message {kind}: a score must be a finite number; nothing is sent")

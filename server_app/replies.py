"""What a site may say: every word, number and tensor of a reply is held against public limits before it is used.

Nothing that a site sends is trusted: not its length, not its depth, not its types. What breaks a rule is refused whole,
and the error names the rule, never the content: it is printed to a coordinator's terminal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from flwr.app import ArrayRecord, Message
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from common import errors
from common.errors import DataError, FedHypeVAEError, WireError
from common.privacy.events import PrivacyEvent
from common.wire.agreement import decode
from common.wire.allow_list import SCORE_PARTS, Kind, SiteFacts, check_scores
from common.wire.identity import EncoderIdentity
from common.wire.reply_fields import REPLY_FIELDS, IdentityFields, broken_rule, check_fields, check_refusal
from server_app.arrays import read_tensors
from server_app.charges import NO_CHARGES, Charges

Shapes = Mapping[str, tuple[int, ...]]

_EVENT = 1_000
_RUNS_OF_EVENTS = 2_000
_SITE_ENTRY = 1_000  # characters of one site's entry in a table of secure aggregation
_TABLES = ("boxes", "commitments", "refused", "shares")

_ADVICE = {
    "policy:run_name": ": it knows a run of this name with other settings; give this one another run-name",
    "ledger": ": its privacy ledger can't be used, or is older than what it released: its own log says what to do",
    "receipt": ": the receipt kept of it here is not one that it gave: ask its people, its own log says what to do",
}
_APP_REFUSED = "AppRefused"  # the error that a site's launcher reports before any of the app's code runs
# Codes of our own, in place of a reply: Flower knows the node no more, or can't decode what it sent.
LEFT, UNREADABLE = 1001, 1002
_ERROR_CODES = {
    2: "its app failed",
    3: "answered too late",
    5: "unreachable",
    8: "its app was killed",
    LEFT: "left the federation",
}
_POLICY_RULE = re.compile(r"[a-z][a-z0-9_]{0,60}")


class Declined(WireError):
    """A site did not answer, or said by the rules that it can't or won't."""


class Refused(Declined):
    """A site refuses the task itself: its policy, ledger or file speaks against it."""


_EventRun = tuple[Annotated[str, Field(max_length=_EVENT)], Annotated[int, Field(ge=1, le=1_000_000)]]
_RUNS: TypeAdapter[list[_EventRun]] = TypeAdapter(
    Annotated[list[_EventRun], Field(max_length=_RUNS_OF_EVENTS)], config=ConfigDict(strict=True)
)
_SCORE: TypeAdapter[float] = TypeAdapter(
    Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)], config=ConfigDict(strict=True)
)


@dataclass(frozen=True)
class Expected:
    """What one site's reply must hold.

    Attributes:
        kind: of the message.
        shapes: allowed tensors, by name.
        charges: what the site can have been charged.
        sites: how many sites the exchange is with.
    """

    kind: Kind
    shapes: Shapes
    charges: Charges = NO_CHARGES
    sites: int = 1


@dataclass(frozen=True)
class Reply:
    """A site's answer that passed the checks.

    Attributes:
        words: strings and numbers, by name.
        tensors: float32 tensors, by name; none where they were taken in at once.
        scores: numbers of an evaluation, by name.
        num_bytes: size of its arrays.
        charged: what the site's ledger holds against the run; None where the reply does not say.
    """

    words: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scores: Mapping[str, float]
    num_bytes: int
    charged: tuple[PrivacyEvent, ...] | None = None


def read_reply(message: Message, expected: Expected) -> Reply:
    """The checked content of a reply.

    Raises:
        Declined: it is an error or a refusal, by the rules.
        WireError: it breaks a rule, and the text says which.
    """
    if message.has_error():
        if message.error.code == UNREADABLE:
            raise WireError("sent something that can't be read")
        if _APP_REFUSED in (message.error.reason or ""):
            raise Refused("refused the app: its digest is not one that the site approved, so none of it was run")
        raise Declined(_ERROR_CODES.get(message.error.code, f"failed (code {message.error.code})"))
    content, kind = message.content, expected.kind
    records_of = (content.array_records, content.config_records, content.metric_records)
    if any(set(records) - {name} for records, name in zip(records_of, ("tensors", "words", "scores"), strict=True)):
        raise WireError(f"message {kind}: a record is not on the allow-list; nothing of it is used")
    words = dict(content.config_records.get("words", {}))
    if "error" in words:
        raise _refusal(words)
    if words or REPLY_FIELDS[kind]:
        words = check_fields(kind, words)
    if any(len(words.get(table, "")) > _SITE_ENTRY * expected.sites for table in _TABLES):
        raise WireError(f"message {kind}: a table is longer than its sites need; nothing of it is used")
    charged = read_charged(words["charged"], expected.charges) if "charged" in words else None
    if charged is not None and not bool(charged) == bool(words["receipt"]) == bool(words["seal"]):
        raise WireError(f"message {kind}: a charge comes with a receipt and its seal; nothing of it is used")
    arrays = content.array_records.get("tensors", ArrayRecord())
    tensors = read_tensors(kind, arrays, expected.shapes)
    scores = _scores(kind, dict(content.metric_records.get("scores", {})))
    return Reply(words, tensors, scores, arrays.count_bytes(), charged)


def facts_of(reply: Reply) -> SiteFacts:
    """What a site said of itself (WireError: an identity or a canary that is none)."""
    words = reply.words
    try:
        identity = EncoderIdentity(**IdentityFields.model_validate_json(words["identity"]).model_dump())
        canary = decode(words["canary"])
    except (ValidationError, DataError) as error:
        which = broken_rule(error, IdentityFields) if isinstance(error, ValidationError) else "canary is no embedding"
        raise WireError(f"message hello: {which}; nothing of it is used") from None
    if words["canary"] and (canary.size != identity.dimension or not np.isfinite(canary).all()):
        raise WireError("message hello: canary is no embedding of the encoder's width; nothing of it is used")
    return SiteFacts(words["site"], words["position"], identity, words["canary"], words["public"], words["task"])


def read_charged(text: str, charges: Charges) -> tuple[PrivacyEvent, ...]:
    """What a site was charged, as `encode_events` wrote it: each mechanism once, with its number of releases.

    Raises:
        WireError: it is none, or nothing that this run can have cost; nothing of it is quoted.
    """
    try:
        runs = _RUNS.validate_json(text)
        reported = [(PrivacyEvent.from_json(event), times) for event, times in runs]
    except (ValidationError, FedHypeVAEError, RecursionError, OverflowError):
        raise WireError("word charged must be events and how often; nothing of it is used") from None
    return charges.check(reported)


def known_codes() -> frozenset[str]:
    """The codes that a site's error may have; a refusal by policy also names its rule."""
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return frozenset(value.code for value in found if issubclass(value, FedHypeVAEError))


def _refusal(words: Mapping[str, Any]) -> WireError:
    """A site's own error, as what is to be raised."""
    code = str(words["error"])
    policy, _, rule = code.partition(":")
    try:
        reference = check_refusal(words)
    except WireError as error:
        return error
    if code not in known_codes() and not (policy == "policy" and _POLICY_RULE.fullmatch(rule)):
        return WireError("sent an error of no known code")
    return Refused(f"refused: {code} (reference {reference} in its own log){_ADVICE.get(code, '')}")


def _scores(kind: Kind, scores: Mapping[str, Any]) -> dict[str, float]:
    if scores and kind != "evaluate":
        raise WireError(f"message {kind}: scores are not on the allow-list; nothing of it is used")
    check_scores(scores)
    parts = {name.partition(".")[0] for name in scores}
    if len(scores) != len(parts) * len(SCORE_PARTS):
        raise WireError("message evaluate: a score lacks a part; nothing of it is used")
    try:
        return {name: _SCORE.validate_python(value) for name, value in scores.items()}
    except ValidationError:
        raise WireError("message evaluate: a score must be a number from 0 to 1; nothing of it is used") from None

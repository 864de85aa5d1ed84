"""What a site's reply may say beside its tensors, by kind of message: the allow-list of its fields, with their limits.

Held against at the site before anything is sent, and at the server when it arrives. None of it depends on a record.
The messages of a secure sum hold random or encrypted values alone; no more records show in them than in the sum. What
breaks a rule is refused whole, and the error names the rule, never the content: it may be printed to a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from common.errors import WireError
from common.names import SITE_NAME, Task
from common.wire.allow_list import Kind

# Public limits. An honest site stays far below each of them.
MOST_SITES = 100_000
MOST_CLASSES = 10_000
WIDEST_EMBEDDING = 65_536
_IDENTITY = 2_000_000  # characters; the names of the classes are in it
_CANARY = 8 + WIDEST_EMBEDDING * 4 * 4 // 3


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable characters")
    return text


Line = Annotated[str, Field(max_length=10_000_000), AfterValidator(_printable)]
ShortLine = Annotated[Line, Field(max_length=300)]
# entry and digest of a ledger's head, and the site's own seal of it; empty where nothing was charged
Receipt = Annotated[str, StringConstraints(pattern=r"^([0-9]{1,15}:[0-9a-f]{64})?$")]
Seal = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
Charged = Annotated[str, Field(max_length=200_000)]
Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]*$", max_length=1000)]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class IdentityFields(_Fields):
    """The encoder's identity as a site tells it."""

    encoder: ShortLine
    revision: ShortLine
    dimension: Annotated[int, Field(ge=1, le=WIDEST_EMBEDDING)]
    preprocessing: Annotated[Line, Field(max_length=5000)]
    weights_digest: ShortLine
    precision: ShortLine
    class_names: Annotated[tuple[ShortLine, ...], Field(min_length=1, max_length=MOST_CLASSES)]


class HelloFields(_Fields):
    """What a site says of itself before a run."""

    site: Annotated[str, StringConstraints(pattern=SITE_NAME)]
    position: Annotated[int, Field(ge=-1, le=MOST_SITES)]
    identity: Annotated[str, Field(max_length=_IDENTITY)]
    canary: Annotated[str, Field(max_length=_CANARY)]
    public: bool
    task: Task


class ReleaseFields(_Fields):
    """What comes with a release: the head of the site's ledger, and what it was charged.

    What was charged follows from what was asked; the receipt is a salted digest of the ledger, and the seal a MAC of
    the receipt under the site's own key: with its next request the server brings both back.
    """

    receipt: Receipt
    seal: Seal
    charged: Charged


class CardFields(_Fields):
    """Public keys for one secure sum."""

    card: Annotated[Line, Field(max_length=4000)]


class SharesFields(_Fields):
    """Sealed shares for the other sites and what binds to them, or the sites whose cards can't be used."""

    boxes: Line = ""
    commitments: Line = ""
    refused: Line = "[]"


class CheckFields(_Fields):
    """The sites whose sealed shares can't be used."""

    refused: Line


class MaskedFields(_Fields):
    """What comes with a masked vector."""

    signature: Hex
    receipt: Receipt
    seal: Seal
    charged: Charged


class UnmaskFields(_Fields):
    """Shares that take the masks off a sum."""

    shares: Line
    receipt: Receipt
    seal: Seal
    charged: Charged


class NoFields(_Fields):
    """A reply without fields."""


class ErrorFields(_Fields):
    """A site's refusal: a known code, and a reference to its own log."""

    error: str
    reference: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]


REPLIES: dict[Kind, type[_Fields]] = {
    "hello": HelloFields,
    "consent": NoFields,
    "statistics": ReleaseFields,
    "train": ReleaseFields,
    "evaluate": NoFields,
    "secagg_keys": CardFields,
    "secagg_shares": SharesFields,
    "secagg_check": CheckFields,
    "secagg_masked": MaskedFields,
    "secagg_unmask": UnmaskFields,
}

REPLY_FIELDS: dict[Kind, frozenset[str]] = {kind: frozenset(model.model_fields) for kind, model in REPLIES.items()}


def check_fields(kind: Kind, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A reply's fields, those that may be left out filled in (WireError: one that is not allowed, or breaks a rule)."""
    return _checked(kind, REPLIES[kind], fields).model_dump()


def check_refusal(fields: Mapping[str, Any]) -> str:
    """The reference of a site's refusal (WireError: it is no code and reference)."""
    return str(_checked("error", ErrorFields, fields).model_dump()["reference"])


def broken_rule(error: ValidationError, model: type[BaseModel]) -> str:
    """The first rule that was broken: the field's name and the rule's, and nothing of what was sent."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    where = f"field {name!r}" if name in model.model_fields else "its content"
    return f"{where} breaks the rule {first['type']}"


def _checked(kind: str, model: type[BaseModel], fields: Mapping[str, Any]) -> BaseModel:
    unknown = sorted(set(fields) - set(model.model_fields))
    if unknown:
        raise WireError(f"message {kind}: field {unknown[0][:40]!r} is not on the allow-list; nothing of it is used")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise WireError(f"message {kind}: {broken_rule(error, model)}; nothing of it is used") from None

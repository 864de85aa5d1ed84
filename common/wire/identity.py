"""What makes embeddings of two sites comparable: the encoder, its weights, its preprocessing and the classes.

Sites exchange the fingerprint of their `EncoderIdentity` before a run (and the identity itself, which
describes software and no data). Counts are no part of it: two sites with the same identity may hold any
number of records.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from common.errors import DataError

_LONGEST_SHOWN = 300  # characters
_MEASURED = re.compile("[0-9a-f]{64}")
_ORIGIN = frozenset({"encoder", "revision"})


@dataclasses.dataclass(frozen=True)
class EncoderIdentity:
    """The encoder and classes of an embedding set: equal at all sites of a federation.

    `preprocessing` describes the steps from decoded pixels to the network's input; `precision` is the
    arithmetic (`float32`, `bfloat16`, `float16`); `class_names` in the order of the labels.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    encoder: str
    revision: str
    dimension: int
    preprocessing: str
    weights_digest: str
    precision: str
    class_names: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all fields, 64 hexadecimal digits."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "class_names": list(self.class_names)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> EncoderIdentity:
        """Build an identity from `to_json`'s value.

        Args:
            value: the fields by name.

        Returns:
            The identity.

        Raises:
            DataError: a field is missing or unknown, or has the wrong type.
        """
        try:
            return _IDENTITY.validate_json(json.dumps(value))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"encoder identity: {where}: {first['msg']}; extract the set again") from None


_IDENTITY = TypeAdapter(EncoderIdentity)


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """One site differs in one field from the others, or from the run."""

    site: str
    field: str
    expected: str
    found: str
    whose: str = "the other sites have"

    def __str__(self) -> str:
        return f"site {self.site}: {self.field} is {self.found}, {self.whose} {self.expected}"


def compare(sites: Mapping[str, EncoderIdentity]) -> tuple[Mismatch, ...]:
    """Find the sites whose encoder identity differs from the others', and the fields in which it does.

    The value that most sites share is taken as the right one, field by field; on a tie, that of the first
    site. Name and revision say where the weights came from, a hub or a folder: they are compared only where the
    weights themselves were not measured, or differ.

    Args:
        sites: site name -> its identity; at least one.

    Returns:
        One `Mismatch` per site and field; empty when all agree.

    Raises:
        DataError: no sites.
    """
    if not sites:
        raise DataError("encoder identities: expected at least one site, found none")
    found: list[Mismatch] = []
    digests = {identity.weights_digest for identity in sites.values()}
    same_weights = len(digests) == 1 and all(_MEASURED.fullmatch(digest) for digest in digests)
    for field in dataclasses.fields(EncoderIdentity):
        if same_weights and field.name in _ORIGIN:
            continue
        values = {site: getattr(identity, field.name) for site, identity in sites.items()}
        expected = Counter(values.values()).most_common(1)[0][0]
        found += [
            Mismatch(site, field.name, _shown(expected), _shown(value))
            for site, value in values.items()
            if value != expected
        ]
    return tuple(found)


def _shown(value: object) -> str:
    """A value in a line for a person: the beginning of a long one."""
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ..."

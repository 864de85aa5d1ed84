"""Base of one concern's settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST_SEED = 2**63 - 1
# A factor in a formula: so far from the ends of float32 that no product of a few of them comes near those.
_LEAST, _MOST = 1e-6, 1e6


def _none_or_some(value: float) -> float:
    if 0.0 < value < _LEAST:
        raise ValueError(f"must be 0 or at least {_LEAST:g}")
    return value


Positive = Annotated[float, Field(ge=_LEAST, le=_MOST)]
"""A number above 0 that a formula multiplies or divides by."""
NoneOrSome = Annotated[float, AfterValidator(_none_or_some)]
"""0, or no less than the least that a formula can use; the field says how much it may be."""
Weight = Annotated[NoneOrSome, Field(ge=0.0, le=_MOST)]
"""As `Positive`, or 0 for a term that is left out."""
Text = Annotated[str, Field(max_length=4096)]


class Concern(BaseModel):
    """Settings that belong together: frozen, no unknown fields, finite unless a field says otherwise.

    A server sends them, so every one has a range: what enters a formula can't make it overflow or vanish, and no
    setting makes a site work for hours or fill its memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

"""Base of one concern's settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Concern(BaseModel):
    """Settings that belong together: frozen, no unknown fields, finite unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

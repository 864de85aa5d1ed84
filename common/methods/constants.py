"""Names of what a site receives beside trained parameters, released or public, and what the total says."""

from __future__ import annotations

from common.methods.base import Tensors

CENTRE = "constant.centre"
TARGET = "constant.target"
TOTAL = "constant.total"


def known_total(params: Tensors, public_total: int) -> float:
    """Units of all sites: as released with the statistics, else the public number."""
    return float(params[TOTAL]) if TOTAL in params else float(public_total)

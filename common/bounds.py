"""Public bounds of what a run may ask for, and of what no honest run reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings are read where torch is not loaded
    from torch import Tensor

LEAST_CLIP_NORM = 1e-6
"""The smallest clip norm: far above what float32 rounds or loses, see `common.privacy.clipping`."""
# Norm of a trained tensor, and so of each of its rows and columns. With the default rates it was at most 81 in every
# method, at 20 records in all and epsilon 0.3 as well.
LARGEST_NORM = 1e4


def held_within(value: Tensor, most: float) -> Tensor:
    """Each number held within ±most, and 0 for one that is none: what is made of released numbers can't fail on them.

    Args:
        value: a function of released and public numbers alone.
        most: far beyond all that an honest run reaches.
    """
    return value.nan_to_num(0.0, most, -most).clamp(-most, most)

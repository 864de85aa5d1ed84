"""Random numbers of synthetic rows that are the same on every machine: Philox, one counter a row, an inverse CDF.

Row i of a set reads words of its own from a counter-based generator, so that no row depends on another, on the number
of threads, or on where a set is cut into pieces. The words are exact everywhere: Philox is specified to the bit, and
numpy promises the bit generator's stream. They become uniforms and normals by arithmetic in float64 alone; numpy's
`standard_normal` and torch's generators promise no stream, and are not used. Nothing here is secret, and nothing here
protects a record: rows are post-processing of a released generator.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor, from_numpy

Words = NDArray[np.uint64]
_WORDS_OF_BLOCK = 4  # Philox4x64 gives four words of 64 bits for each value of its counter
_STREAM_BITS = 192  # the counter's highest word tells the streams of a row apart
_COUNTERS = 2**256
_NEAR = 128  # rows between two wanted ones that are cheaper to draw than to skip


def row_key(purpose: str, seed: int) -> int:
    """Philox's 128-bit key for a seed; another purpose gives other rows for the same seed."""
    return int.from_bytes(hashlib.sha256(f"fedhypevae/rows/{purpose}/{seed}".encode()).digest()[:16], "little")


def row_words(key: int, rows: NDArray[np.int64], words: int, stream: int) -> Words:
    """Words of single rows.

    Args:
        key: from `row_key`.
        rows: (n,) numbers of the rows, at least 0, ascending.
        words: how many of 64 bits for each row, the same for all rows of a set.
        stream: which of a row's streams, at least 0.

    Returns:
        (n, words). With b = ceil(words / 4), row i has those of the counters b i .. b (i + 1) - 1 in `stream`.

    Source: Salmon et al. (2011), Philox4x64-10.
    """
    blocks = -(-words // _WORDS_OF_BLOCK)
    if len(rows) == 0 or blocks == 0:
        return np.empty((len(rows), words), dtype=np.uint64)
    parts = []
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > _NEAR) + 1):
        first, last = int(run[0]), int(run[-1])
        # numpy counts up before it draws
        counter = ((stream << _STREAM_BITS) + first * blocks - 1) % _COUNTERS
        drawn = np.random.Philox(key=key, counter=counter).random_raw((last - first + 1) * blocks * _WORDS_OF_BLOCK)
        of_rows = drawn.reshape(-1, blocks * _WORDS_OF_BLOCK)[:, :words]
        parts.append(of_rows if len(run) == len(of_rows) else of_rows[run - first])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def uniforms(words: Words) -> Tensor:
    """Words as numbers between 0 and 1, float64: the middles of 2^52 cells, so that neither end is ever met."""
    values = (words >> np.uint64(12)).astype(np.float64)
    values += 0.5
    values *= 2.0**-52
    return from_numpy(values)


def normals(words: Words) -> Tensor:
    """Words as standard normal numbers, float64, by the inverse of the normal distribution function."""
    values = uniforms(words)
    ndtri(values.numpy(), out=values.numpy())
    return values

"""Words of Philox against its published vectors and a second implementation; normals against Python's own."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generator.row_numbers import normals, row_key, row_words, uniforms

_WORD = 2**64
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10 as Salmon et al. (2011) write it, in Python's integers."""
    c = [counter >> (64 * place) & (_WORD - 1) for place in range(4)]
    k = [key >> (64 * place) & (_WORD - 1) for place in range(2)]
    for _ in range(10):
        first, second = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [second >> 64 ^ c[1] ^ k[0], second % _WORD, first >> 64 ^ c[3] ^ k[1], first % _WORD]
        k = [(k[place] + _WEYL[place]) % _WORD for place in range(2)]
    return c


# Random123 1.14, tests/kat_vectors: counter, key, and what ten rounds make of them
VECTORS = [
    (0, 0, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (2**256 - 1, 2**128 - 1, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (
        0x082EFA98EC4E6C89A4093822299F31D013198A2E03707344243F6A8885A308D3,
        0xBE5466CF34E90C6C452821E638D01377,
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_second_implementation_gives_the_published_vectors(counter: int, key: int, words: str) -> None:
    assert philox(counter, key) == [int(word, 16) for word in words.split()]


def test_row_words_begin_with_the_published_vector() -> None:
    """Row 0 of stream 0 under the key 0 is the block of the counter 0."""
    words = row_words(0, np.array([0]), 4, 0)
    assert words[0].tolist() == [int(word, 16) for word in VECTORS[0][2].split()]


@settings(max_examples=40)
@given(
    st.integers(0, 2**128 - 1),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=6, unique=True),
    st.integers(1, 11),
    st.integers(0, 200),
)
def test_row_words_are_philox_at_the_rows_own_counters(key: int, rows: list[int], words: int, stream: int) -> None:
    """Any rows in any company: row i has the counters b i .. b (i + 1) - 1, the stream in the highest word."""
    numbers = np.array(sorted(rows))
    blocks = -(-words // 4)
    found = row_words(key, numbers, words, stream)
    assert found.shape == (len(rows), words)
    for row, drawn in zip(numbers.tolist(), found.tolist(), strict=True):
        due = [word for block in range(blocks) for word in philox((stream << 192) + row * blocks + block, key)]
        assert drawn == due[:words]


def test_row_words_of_near_rows_and_of_a_stretch_are_those_of_the_rows_alone() -> None:
    numbers = np.array([0, 1, 2, 50, 51, 400, 401, 10_000])
    whole = row_words(7, np.arange(10_001), 9, 3)
    assert np.array_equal(row_words(7, numbers, 9, 3), whole[numbers])


def test_row_words_of_nothing() -> None:
    assert row_words(1, np.array([], dtype=np.int64), 5, 0).shape == (0, 5)
    assert row_words(1, np.array([3]), 0, 0).shape == (1, 0)


def test_row_keys_differ_by_seed_and_by_purpose() -> None:
    keys = {row_key(purpose, seed) for purpose in ("published", "more") for seed in range(50)}
    assert len(keys) == 100
    assert all(0 <= key < 2**128 for key in keys)
    assert row_key("published", 0) == 0xEF557B5164188FC13799C657FB89F5B0  # for good: published sets hang on it


def test_normals_by_hand() -> None:
    """Words 0, 2^63 and the largest: half a cell of 2^-52 from 0, from one half and from 1."""
    words = np.array([[0, 2**63, 2**64 - 1, 0xD2E7470EE14C6C93]], dtype=np.uint64)
    cell = 2.0**-52
    due = [0.5 * cell, 0.5 + 0.5 * cell, 1.0 - 0.5 * cell, ((0xD2E7470EE14C6C93 >> 12) + 0.5) * cell]
    assert uniforms(words)[0].tolist() == due
    assert normals(words)[0].tolist() == pytest.approx([NormalDist().inv_cdf(value) for value in due], rel=1e-13)


def test_normals_of_two_rows_by_python_alone() -> None:
    """Rows 3 and 1,000,003 of a set: Philox in Python's integers, the inverse distribution function of `statistics`."""
    key, numbers = row_key("published", 5), np.array([3, 1_000_003])
    found = normals(row_words(key, numbers, 6, 0))
    for row, drawn in zip(numbers.tolist(), found.tolist(), strict=True):
        words = philox(2 * row, key) + philox(2 * row + 1, key)
        due = [NormalDist().inv_cdf(((word >> 12) + 0.5) / 2**52) for word in words[:6]]
        assert drawn == pytest.approx(due, rel=1e-13)


def test_normals_are_normal() -> None:
    """Kolmogorov's distance of 200,000 of them, at about 1e-4."""
    drawn = np.sort(normals(row_words(row_key("test", 1), np.arange(50_000), 4, 0)).numpy().ravel())
    cells = np.array([NormalDist().cdf(value) for value in drawn[::100]])
    assert np.abs(cells - np.arange(0, len(drawn), 100) / len(drawn)).max() < 2.2 / len(drawn) ** 0.5

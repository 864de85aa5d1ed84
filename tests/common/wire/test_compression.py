"""Tensors in few bits: unbiased, bounded, the same on both ends; garbage is refused; each property has its breaker."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import WireError
from common.wire.compression import BLOCK, pack, packed_size, unpack

BITS = (6, 8, 16)
SHAPES = {"weight": (70, 40), "bias": (11,), "one": (), "odd": (67,)}


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: scale * torch.randn(shape, generator=draws(seed)) for name, shape in SHAPES.items()}


def step_of(values: Tensor, bits: int) -> float:
    return float(values.abs().max()) / (2 ** (bits - 1) - 1)


def carried(values: Tensor, bits: int, rounding: torch.Generator | None) -> Tensor:
    return unpack(pack({"x": values}, bits, rounding), {"x": tuple(values.shape)}, bits)["x"]


@pytest.mark.parametrize("bits", BITS)
def test_packed_tensors_come_back_within_a_step(bits: int) -> None:
    tensors = example()
    for rounding, room in ((draws(), 1.0), (None, 0.5)):
        packed = pack(tensors, bits, rounding)
        assert packed.dtype == torch.uint8
        assert packed.shape == (packed_size(SHAPES, bits),)
        back = unpack(packed, SHAPES, bits)
        assert {name: tuple(value.shape) for name, value in back.items()} == SHAPES
        for name, value in tensors.items():
            width = 16 if value.numel() <= 64 else bits
            assert float((back[name] - value).abs().max()) <= room * step_of(value, width) * (1 + 1e-6)


def test_packed_size_by_hand() -> None:
    """70 x 40 values in two blocks, 67 in one: six bits each; 11 and 1 of 16 bits; a scale of four bytes a block."""
    assert packed_size(SHAPES, 6) == 4 * 5 + (2867 * 6 + 7) // 8 + 2 * 12
    assert packed_size({"x": (BLOCK + 1,)}, 8) == 4 * 2 + BLOCK + 1
    assert packed_size({"x": (100_000,)}, 6) * 5 < 4 * 100_000


def nearest(values: Tensor, bits: int, _: torch.Generator) -> Tensor:
    return carried(values, bits, None)


def downwards(values: Tensor, bits: int, _: torch.Generator) -> Tensor:
    step = step_of(values, bits)
    return (values.double() / step).floor() * step


def at_random(values: Tensor, bits: int, rounding: torch.Generator) -> Tensor:
    return carried(values, bits, rounding)


def bias(way: Callable[[Tensor, int, torch.Generator], Tensor], bits: int) -> float:
    """Largest mean error of a value over 4,000 roundings, in standard errors of it."""
    values = torch.cat([torch.linspace(-1.0, 1.0, 97), torch.tensor([1.0])])
    rounding, repeats = draws(3), 4000
    errors = torch.stack([way(values, bits, rounding) for _ in range(repeats)]) - values.double()
    return float(errors.mean(0).abs().max() / (0.5 * step_of(values, bits) / repeats**0.5))


@pytest.mark.parametrize("bits", [6, 8])
def test_rounding_up_is_unbiased(bits: int) -> None:
    # a code is off by at most half a step in standard deviation: 98 values stay within 5 standard errors
    assert bias(at_random, bits) < 5.0


@pytest.mark.parametrize("broken", [nearest, downwards])
def test_unbiasedness_finds_rounding_that_is_biased(broken: Callable[[Tensor, int, torch.Generator], Tensor]) -> None:
    assert bias(broken, 6) > 20.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=90),
    st.sampled_from(BITS),
    st.booleans(),
    st.booleans(),
)
def test_any_finite_values_round_trip(values: list[float], bits: int, random: bool, leave_out: bool) -> None:
    tensor = torch.tensor(values)
    packed = pack({"x": tensor}, bits, draws() if random else None, leave_out_zeros=leave_out)
    back = unpack(packed, {"x": tuple(tensor.shape)}, bits, zeros_left_out=leave_out)["x"]
    step = step_of(tensor, 16 if len(values) <= 64 else bits)
    assert bool(torch.isfinite(back.float()).all())
    assert float((back - tensor.double()).abs().max()) <= step * (1 + 1e-5) + 2e-45


def test_packing_depends_on_values_and_public_draws_alone() -> None:
    assert torch.equal(pack(example(), 8, draws()), pack(dict(reversed(example().items())), 8, draws()))
    assert not torch.equal(pack(example(), 8, draws()), pack(example(), 8, draws(1)))


def test_zeros_are_left_out_where_asked() -> None:
    tensors = {"moved": torch.ones(100), "still": torch.zeros(5000)}
    shapes = {"moved": (100,), "still": (5000,)}
    packed = pack(tensors, 8, leave_out_zeros=True)
    assert packed.numel() == 4 * 4 + 100  # the scale of every block, the codes of one
    back = unpack(packed, shapes, 8, zeros_left_out=True)
    assert torch.equal(back["still"], torch.zeros(5000, dtype=torch.float64))
    assert float((back["moved"] - 1.0).abs().max()) < 1e-6
    assert pack(tensors, 8).numel() == packed_size(shapes, 8)  # at a site the size tells nothing


def test_pack_refuses_what_is_not_finite() -> None:
    with pytest.raises(WireError, match="not finite"):
        pack({"x": torch.tensor([1.0, float("nan")])}, 8)


def with_bytes(packed: Tensor, at: int, content: bytes) -> Tensor:
    changed = bytearray(packed.numpy().tobytes())
    changed[at : at + len(content)] = content
    return torch.tensor(list(changed), dtype=torch.uint8)


GARBAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "a scale that is no number": lambda packed: with_bytes(packed, 0, b"\x00\x00\xc0\x7f"),
    "an infinite scale": lambda packed: with_bytes(packed, 0, b"\x00\x00\x80\x7f"),
    "a negative scale": lambda packed: with_bytes(packed, 0, b"\x00\x00\x80\xbf"),
    "a scale of minus zero": lambda packed: with_bytes(packed, 0, b"\x00\x00\x00\x80"),
    "a code beyond the last": lambda packed: with_bytes(packed, 8, b"\xff"),
    "a code in a block of zeros": lambda packed: with_bytes(packed, packed.numel() - 1, b"\x00"),
    "bytes too few": lambda packed: packed[:-1],
    "bytes too many": lambda packed: torch.cat([packed, packed[:1]]),
    "no bytes": lambda packed: packed[:0],
    "another type": lambda packed: packed.to(torch.int32),
    "another shape": lambda packed: packed[None],
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("left_out", [False, True])
def test_unpack_refuses(kind: str, left_out: bool) -> None:
    tensors, shapes = {"x": torch.ones(100), "y": torch.zeros(100)}, {"x": (100,), "y": (100,)}
    if left_out and kind == "a code in a block of zeros":
        pytest.skip("there are no such codes")
    packed = pack(tensors, 8, leave_out_zeros=left_out)
    unpack(packed, shapes, 8, zeros_left_out=left_out)
    with pytest.raises(WireError, match="packed tensors"):
        unpack(GARBAGE[kind](packed), shapes, 8, zeros_left_out=left_out)


def test_unpack_refuses_bits_after_the_last_code() -> None:
    shapes = {"x": (101,)}
    packed = pack({"x": torch.ones(101)}, 6)
    with pytest.raises(WireError, match="after the last code"):
        unpack(with_bytes(packed, packed.numel() - 1, bytes([int(packed[-1]) | 1])), shapes, 6)

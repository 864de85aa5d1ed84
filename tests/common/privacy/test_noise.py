"""The noise module: the right stream, fresh in every process, added in one place, rounded afterwards."""

from __future__ import annotations

import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from randomgen import AESCounter

from common.errors import ConfigError, DataError
from common.privacy import mechanism
from common.privacy.mechanism import add_gaussian
from common.privacy.noise import SecureNoise, TestNoise, add_gaussian_array, noise_grid, round_to_grid

BAD_STD = [-1.0, -1e-300, 1e-300, 1e300, math.nan, math.inf, -math.inf, True, None, "1"]


class CountingSource:
    """Counts what is drawn; otherwise a test source."""

    name = "test"
    certified = False

    def __init__(self) -> None:
        self.inner, self.drawn = TestNoise(0), 0

    def gaussian(self, shape: int | tuple[int, ...], std: float) -> np.ndarray:
        noise = self.inner.gaussian(shape, std)
        self.drawn += noise.size
        return noise

    def uniform(self, size: int) -> np.ndarray:
        return self.inner.uniform(size)

    def exact_gaussian(self, values: np.ndarray, std: float) -> np.ndarray:
        return self.inner.exact_gaussian(values, std)


def test_stream_is_aes_in_counter_mode() -> None:
    key, start = bytes(range(16)), 2**64 - 5  # passes a carry into the counter's upper half
    stream = AESCounter(key=int.from_bytes(key, "little"), counter=start).random_raw(200)
    blocks = b"".join((start + i).to_bytes(16, "little") for i in range(100))
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    np.testing.assert_array_equal(stream, np.frombuffer(cipher.update(blocks), dtype="<u8"))


def test_secure_noise_asks_the_operating_system_for_256_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("common.privacy.noise.secrets.randbits", lambda bits: asked.append(bits) or 2**bits - 1)
    SecureNoise()
    assert sum(asked) == 256


def test_two_secure_sources_share_no_value() -> None:
    first, second = SecureNoise().gaussian(10_000, 1.0), SecureNoise().gaussian(10_000, 1.0)
    assert not set(first.tolist()) & set(second.tolist())


def test_numpy_and_torch_seeds_do_not_reach_secure_noise() -> None:
    draws = []
    for _ in range(2):
        np.random.seed(1)
        torch.manual_seed(1)
        draws.append(SecureNoise().gaussian(4, 1.0).tolist())
    assert draws[0] != draws[1]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_secure_noise_refuses_to_be_duplicated(duplicate) -> None:
    with pytest.raises(TypeError, match="stream would be used twice"):
        duplicate(SecureNoise())


def test_forked_child_gets_a_stream_of_its_own() -> None:
    source = SecureNoise()
    source.gaussian(3, 1.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - runs in the child
        os.write(writer, source.uniform(8).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        of_child = np.frombuffer(pipe.read())
    of_parent = source.uniform(8)
    assert of_child.shape == (8,)
    assert not set(of_child.tolist()) & set(of_parent.tolist())


def test_test_noise_repeats_and_says_that_it_is_not_private() -> None:
    np.testing.assert_array_equal(TestNoise(7).gaussian((2, 3), 2.0), TestNoise(7).gaussian((2, 3), 2.0))
    np.testing.assert_array_equal(TestNoise(7).uniform(5), TestNoise(7).uniform(5))
    assert (TestNoise(7).name, TestNoise(7).certified) == ("test", False)
    assert (SecureNoise().name, SecureNoise().certified) == ("secure", True)


@pytest.mark.parametrize("source", [SecureNoise(), TestNoise(3)])
def test_uniform_lies_in_the_unit_interval_with_its_mean(source) -> None:
    draws = source.uniform(100_000)
    assert draws.dtype == np.float64
    assert 0.0 <= draws.min() < draws.max() < 1.0
    assert abs(draws.mean() - 0.5) < 6.0 / math.sqrt(12.0 * 100_000)


def test_noise_grid_is_a_power_of_two_of_the_standard_deviation_alone() -> None:
    assert noise_grid(1.0) == 2.0**-20
    assert noise_grid(1.999) == 2.0**-20
    assert noise_grid(2.0) == 2.0**-19
    assert noise_grid(0.75) == 2.0**-21
    for std in (1e-30, 0.3, 17.0, 1e20):
        assert 2.0**-21 < noise_grid(std) / std <= 2.0**-20


def test_round_to_grid_takes_the_nearest_multiple() -> None:
    rounded = round_to_grid(np.array([0.3, -0.3, 0.125, 0.375, 5.0]), 0.25)
    assert rounded.tolist() == [0.25, -0.25, 0.0, 0.5, 5.0]


def test_released_values_lie_on_the_grid_even_where_the_sum_does_not() -> None:
    std = 3.7
    released = add_gaussian_array(np.full(1000, math.pi * 1e-3), std, SecureNoise())
    multiples = released / noise_grid(std)
    np.testing.assert_array_equal(multiples, np.rint(multiples))


def test_grid_of_a_release_says_nothing_of_how_large_the_sum_is() -> None:
    """One coordinate that is huge leaves the others on the same grid: half of them on its odd multiples."""
    sums = np.zeros(1000)
    sums[0] = 2.0**20
    multiples = add_gaussian_array(sums, 1.0, SecureNoise()) / noise_grid(1.0)
    np.testing.assert_array_equal(multiples, np.rint(multiples))
    assert 350 < np.count_nonzero(multiples % 2) < 650


def test_low_order_bits_of_the_sum_do_not_survive() -> None:
    # Sums that differ by far less than the grid release the same value under the same noise...
    sums = np.linspace(-1.0, 1.0, 1000)
    first = add_gaussian_array(sums, 1.0, TestNoise(5))
    second = add_gaussian_array(sums + 1e-12, 1.0, TestNoise(5))
    assert np.mean(first == second) > 0.99
    # ...and without the rounding nearly every one would show.
    noise = TestNoise(5).gaussian(1000, 1.0)
    assert np.mean(sums + noise == sums + 1e-12 + noise) < 0.01


def test_add_gaussian_keeps_names_shapes_dtypes_and_inputs() -> None:
    sums = {
        "weight": torch.ones(3, 4),
        "bias": torch.zeros(5, dtype=torch.float64, requires_grad=True),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 2),
    }
    before = {name: tensor.detach().clone() for name, tensor in sums.items()}
    noisy = add_gaussian(sums, 0.5, TestNoise(1))
    assert list(noisy) == list(sums)
    for name, tensor in noisy.items():
        assert (tensor.shape, tensor.dtype) == (sums[name].shape, sums[name].dtype)
        assert not tensor.requires_grad
        assert torch.equal(sums[name].detach(), before[name])
        if tensor.numel():
            assert not torch.equal(tensor, before[name])


def test_add_gaussian_does_not_depend_on_the_order_of_the_mapping() -> None:
    sums = {"b": torch.zeros(3), "a": torch.zeros(4)}
    one, other = (
        add_gaussian(sums, 1.0, TestNoise(2)),
        add_gaussian(dict(reversed(sums.items())), 1.0, TestNoise(2)),
    )
    assert all(torch.equal(one[name], other[name]) for name in sums)


def test_add_gaussian_is_the_sum_plus_the_drawn_noise() -> None:
    sums = {"a": torch.arange(6.0).reshape(2, 3)}
    expected = sums["a"].double().numpy() + TestNoise(9).gaussian((2, 3), 4.0)
    noisy = add_gaussian(sums, 4.0, TestNoise(9))["a"].double().numpy()
    np.testing.assert_allclose(noisy, expected, rtol=0, atol=noise_grid(4.0) / 2 + 1e-6)


def test_add_gaussian_with_zero_std_changes_nothing_and_draws_nothing() -> None:
    source, sums = CountingSource(), {"a": torch.tensor([0.1, -2.0])}
    assert torch.equal(add_gaussian(sums, 0.0, source)["a"], sums["a"])
    assert source.drawn == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_add_gaussian_refuses_a_sum_that_is_not_finite_before_any_noise(bad: float) -> None:
    source = CountingSource()
    sums = {"a": torch.zeros(3), "b": torch.tensor([1.0, bad])}
    with pytest.raises(DataError, match="'b': expected finite"):
        add_gaussian(sums, 1.0, source)
    with pytest.raises(DataError, match="finite"):
        add_gaussian_array(np.array([0.0, bad]), 1.0, source)
    assert source.drawn == 0


SUMS = {
    "weight": torch.arange(12.0).reshape(3, 4) / 7,
    "scalar": torch.tensor(2.0),
    "bias": torch.full((5,), -1e3, dtype=torch.float64),
    "empty": torch.zeros(0, 2),
}


@pytest.mark.parametrize("std", [0.0, 0.37, 1e-9, 4e7])
def test_sums_on_a_device_get_the_processors_noise_to_the_last_bit(std: float) -> None:
    expected = add_gaussian(SUMS, std, TestNoise(3))
    found = mechanism._add_on_device(SUMS, std, TestNoise(3))  # what a GPU computes, here
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sums_on_a_device_are_refused_where_they_are_not_finite(bad: float) -> None:
    for std in (0.0, 1.0):
        with pytest.raises(DataError, match="'b': expected finite"):
            mechanism._add_on_device({"a": torch.zeros(3), "b": torch.tensor([1.0, bad])}, std, TestNoise(0))


@pytest.mark.parametrize("std", BAD_STD)
def test_every_way_in_refuses_a_std_that_is_not_finite_and_positive(std) -> None:
    for source in (SecureNoise(), TestNoise(0)):
        with pytest.raises(ConfigError, match="standard deviation"):
            source.gaussian(3, std)
        with pytest.raises(ConfigError, match="standard deviation"):
            source.exact_gaussian(np.zeros(3), std)
        with pytest.raises(ConfigError, match="standard deviation"):
            add_gaussian({"a": torch.zeros(3)}, std, source)
    with pytest.raises(ConfigError, match="standard deviation"):
        noise_grid(0.0)


@pytest.mark.parametrize("source", [SecureNoise(), TestNoise(4)])
def test_exact_gaussian_has_its_mean_scale_grid_and_shape(source) -> None:
    values, std = np.tile([[3.0, -40.0]], (4000, 1)), 2.5
    released = source.exact_gaussian(values, std)
    assert released.shape == values.shape
    grid = noise_grid(std) * 2.0**-20
    np.testing.assert_array_equal(released / grid, np.rint(released / grid))
    noise = (released - values) / std
    assert np.abs(noise.mean(axis=0)).max() < 6.0 / math.sqrt(4000)
    assert abs(noise.var() - 1.0) < 6.0 * math.sqrt(2.0 / 8000)


@pytest.mark.parametrize("source", [SecureNoise(), TestNoise(4)])
def test_exact_gaussian_holds_sums_within_what_its_integers_can_be(source) -> None:
    """A refusal would tell without noise that a sum is large; held at a public bound, no difference grows."""
    released = source.exact_gaussian(np.array([1e300, -1.7e308, 2.0**23, 2.0**21]), 1.0)
    assert np.abs(released - [2.0**22, -(2.0**22), 2.0**22, 2.0**21]).max() < 8.0
    for values in ([math.nan], [math.inf]):
        with pytest.raises(DataError, match="expected finite numbers"):
            source.exact_gaussian(np.array(values), 1.0)
    assert source.exact_gaussian(np.zeros((0, 3)), 1.0).shape == (0, 3)

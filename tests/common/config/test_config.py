"""Settings: refused with one line that names them, and the same again after a round trip."""

from __future__ import annotations

import math

import pytest

from common.config.run import RunConfig, Scalar
from common.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epsilom": 1.0}, "did you mean epsilon"),
        ({"zzz": 1}, "list of settings"),
        ({"epsilon": 0.0}, "setting epsilon: "),
        ({"epsilon": -1.0}, "setting epsilon: "),
        ({"epsilon": math.nan}, "setting epsilon: "),
        ({"delta": 0.1}, "setting delta: "),
        ({"sampling-rate": 1.5}, "setting sampling-rate: "),
        ({"num-rounds": 2.5}, "setting num-rounds: "),
        ({"encoder-training": "raw"}, "setting encoder-training: "),
        ({"clip-norm": math.inf}, "clip-norm is infinite while epsilon is 3"),
        ({"clip-norm": math.nan}, "setting clip-norm: "),
        ({"learning-rate": math.inf}, "setting learning-rate: "),
        ({"feature-norm": math.inf}, "setting feature-norm: "),
        ({"round-timeout": math.inf}, "setting round-timeout: "),
        ({"hidden-widths": "64,x"}, "hidden-widths must be whole numbers"),
        ({"hidden-widths": "64", "latent-dim": 0}, "need a latent"),
        ({"min-sites": 5}, "lower min-sites"),
        ({"statistics-share": 0.0}, "set public-total"),
        ({"discriminative-weight": 0.0, "elbo-weight": 0.0}, "nothing would be trained"),
        ({"architectures": "tree"}, "architectures must be"),
        ({"architectures": "mlp-" + "-".join("9999999")}, "architectures must be"),
        ({"hidden-widths": ",".join("9999999")}, "hidden-widths must be at most"),
        ({"clip-norm": 1e7}, "clip-norm must be at most"),
        ({"statistics-share": 1e-9}, "setting statistics-share: must be 0 or at least"),
    ],
)
def test_from_flat_refuses_with_one_line(settings: dict[str, Scalar], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


_HUGE = {int: 10**30, float: 1e38}


def test_every_number_of_a_run_has_a_range() -> None:
    """A server sends them all: none may overflow a formula, vanish in one, or keep a site busy for a year."""
    numbers = {key: value for key, value in RunConfig().to_flat().items() if type(value) in _HUGE}
    assert len(numbers) > 50
    for key, value in numbers.items():
        for bad in (_HUGE[type(value)], -_HUGE[type(value)], math.nan, 1e-42):
            if bad == 1e-42 and type(value) is int:
                continue
            with pytest.raises(ConfigError):
                RunConfig.from_flat({"public-total": 1, key: bad})


def test_every_text_of_a_run_has_a_longest() -> None:
    for key, value in RunConfig().to_flat().items():
        if isinstance(value, str):
            with pytest.raises(ConfigError):
                RunConfig.from_flat({"method": "x" * 10_000} if key == "method" else {key: "1," * 10_000})


def test_from_flat_takes_unbounded_records_only_without_a_promise() -> None:
    config = RunConfig.from_flat({"epsilon": math.inf, "clip-norm": math.inf})
    assert config.privacy.clip_norm == math.inf
    assert not config.privacy.certified


def test_to_flat_gives_the_same_run_back() -> None:
    config = RunConfig.from_flat({"method": "dp_gauss", "epsilon": 1, "hidden-widths": "32,64", "alpha": 0.3})
    assert RunConfig.from_flat(config.to_flat()) == config
    assert config.model.widths == (32, 64)
    assert config.replace(epsilon=2.0).privacy.epsilon == 2.0
    assert config.privacy.epsilon == 1.0
    with pytest.raises(ValueError, match="frozen"):
        config.method = "other"


@pytest.mark.parametrize(
    ("settings", "certified"),
    [
        ({}, True),
        ({"encoder-training": "joint"}, True),
        ({"encoder-training": "unprotected"}, False),
        ({"noise": "test"}, False),
        ({"epsilon": math.inf}, False),
    ],
)
def test_certified_only_with_finite_epsilon_secret_noise_and_protected_encoder(
    settings: dict[str, Scalar], certified: bool
) -> None:
    assert RunConfig.from_flat(settings).privacy.certified is certified

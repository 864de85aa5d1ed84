"""Inversion of one upload: perfect without noise, nothing with it; with broken protection it must show."""

from __future__ import annotations

import pytest
import torch

from common.assurance.inversion import invert_batch_of_one
from common.config.run import RunConfig
from common.errors import ConfigError
from common.privacy.noise import SecureNoise

RECORD = torch.randn(768, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"latent_dim": 0, "code_dim": 0, "elbo_weight": 0.0},
        {"hidden_widths": "16"},
        {"unit": "patient"},
        {"trunk_width": 4},
    ],
)
def test_inversion_without_noise_is_the_record_and_its_label(settings: dict[str, float]) -> None:
    config = RunConfig().replace(**settings)
    for label in (0, 4, 10):
        found = invert_batch_of_one(config, RECORD, label, 11, 0.0, SecureNoise())
        assert found.cosine >= 0.99
        assert found.label == label
        assert float(found.embedding.norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_inversion_with_noise_finds_nothing(noise: float) -> None:
    assert abs(invert_batch_of_one(RunConfig(), RECORD, 4, 11, noise, SecureNoise()).cosine) <= 0.2


def test_inversion_refuses_other_methods() -> None:
    with pytest.raises(ConfigError, match="fedhypevae"):
        invert_batch_of_one(RunConfig().replace(method="dp_gauss"), RECORD, 1, 11, 0.0, SecureNoise())

"""FedAvg and its kin and DP-FedSGD: a round by hand, and what each becomes at its limit."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.cells import site_probabilities
from common.config.run import RunConfig
from common.evaluation.heads import fit_linear_head
from common.loop import run_loop
from common.methods.constants import CENTRE
from common.methods.features import head_features
from common.methods.heads import fedlambda
from common.methods.heads.linear import published_head
from common.records import SiteData, on_sphere

_LINE = {
    "feature_norm": math.sqrt(2.0),  # features are the embeddings as they are, of width 2
    "statistics_share": 0.0,
    "public_total": 4,
    "num_sites": 2,
    "num_rounds": 1,
    "spare_rounds": 0,
    "epsilon": math.inf,
    "local_rate": 1.0,
    "local_momentum": 0.0,
    "local_decay": 0.0,
}


def _line(method: str, **changes: str | float | bool) -> RunConfig:
    return RunConfig().replace(method=method, **{**_LINE, **changes})


def _two_sites() -> list[SiteData]:
    """One record of class 0 at (1, 0), and three of class 1 at (0.6, 0.8)."""
    return [
        SiteData(torch.tensor([[1.0, 0.0]]), torch.tensor([0])),
        SiteData(torch.tensor([[0.6, 0.8]]).repeat(3, 1), torch.tensor([1, 1, 1])),
    ]


def _blobs(seed: int = 0, sites: int = 3, rows: int = 40, dim: int = 6) -> list[SiteData]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, dim, generator=generator)
    result = []
    for _ in range(sites):
        labels = torch.randint(3, (rows,), generator=generator)
        result.append(SiteData(centres[labels] + 0.7 * torch.randn(rows, dim, generator=generator), labels))
    return result


def _head(config: RunConfig, sites: list[SiteData], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    head = published_head(run_loop(config, sites, [str(label) for label in range(classes)]).artifact)
    if head is None:
        pytest.fail("the method publishes no head")
    return head.weight, head.bias


def test_fedavg_round_by_hand() -> None:
    # At zero every softmax is 1/2. Site 1 moves to w_0 = (1/2, 0), b_0 = 1/2, site 2 to w_0 = (-0.3, -0.4), b_0 = -1/2;
    # weighted 1/4 and 3/4: w_0 = (0.125 - 0.225, -0.3), b_0 = 1/8 - 3/8; the other class has the opposite.
    weight, bias = _head(_line("fedavg"), _two_sites(), 2)
    assert torch.allclose(weight, torch.tensor([[-0.1, -0.3], [0.1, 0.3]]))
    assert torch.allclose(bias, torch.tensor([-0.25, 0.25]))


def test_fedprox_second_step_by_hand() -> None:
    # One site, two steps: after the first w = b = 1/2; then p = 1 / (1 + e^-2) and the pull is 0.5 x 1/2.
    config = _line("fedprox", local_epochs=2, prox_mu=0.5, num_sites=1, min_sites=1)
    weight, _ = _head(config, _two_sites()[:1], 2)
    expected = 0.5 + (1 - 1 / (1 + math.exp(-2))) - 0.25
    assert weight[0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_fedprox_without_pull_is_fedavg() -> None:
    settings = {"num_sites": 3, "num_rounds": 3, "local_epochs": 2, "local_rate": 0.1, "feature_norm": 2.0}
    plain = _head(_line("fedavg", **settings), _blobs(), 3)
    free = _head(_line("fedprox", prox_mu=0.0, **settings), _blobs(), 3)
    pulled = _head(_line("fedprox", prox_mu=0.5, **settings), _blobs(), 3)
    assert torch.equal(plain[0], free[0])
    assert torch.equal(plain[1], free[1])
    assert not torch.allclose(plain[0], pulled[0], atol=1e-3)


def test_fedlambda_is_local_only_at_one_and_fedavg_at_zero() -> None:
    sites = _blobs()
    config = _line("fedlambda", num_sites=3, num_rounds=2)
    result = run_loop(config, sites, ["a", "b", "c"])
    rows = on_sphere(sites[0].embeddings)
    features = head_features(result.context, rows, result.state.params[CENTRE])
    own = fit_linear_head(features, sites[0].labels, 3)
    alone = site_probabilities(result.context, result.state, result.sites[0], rows, 1.0)
    assert torch.equal(alone, own.probabilities(features))
    weight, bias = _head(_line("fedavg", num_sites=3, num_rounds=2), sites, 3)
    shared = site_probabilities(result.context, result.state, result.sites[0], rows, 0.0)
    assert torch.allclose(shared, torch.softmax(rows @ weight.T + bias, 1), atol=1e-5)


def test_fedlambda_takes_the_best_mean_over_sites() -> None:
    result = run_loop(_line("fedlambda", num_sites=3, num_rounds=1), _blobs(), ["a", "b", "c"])
    params = {name: result.state.params[name] for name in ("weight", "bias")}
    first, second = torch.zeros(11), torch.zeros(11)
    first[2], first[7], second[7] = 0.9, 0.8, 0.7
    uploads = {
        site: {**params, "num_examples": torch.ones(1), "accuracies": merit}
        for site, merit in enumerate((first, second))
    }
    after = fedlambda.server_step(result.context, result.state, uploads)
    assert after.memory["mixing"].item() == pytest.approx(0.7)


def test_dp_fedsgd_round_by_hand() -> None:
    # Each record's gradient over (w, b) has norm |residual| sqrt(|x|^2 + 1) = 1, above C. In units of C their
    # directions add up: w_0 moves by (1/2 (1, 0) - 3/2 (0.6, 0.8)) / 4.
    config = _line("dp_fedsgd", clip_norm=0.1, learning_rate=1.0, momentum=0.0, averaging_fraction=0.0,
                   class_bias_scale=1.0, feature_norm=10.0)  # fmt: skip
    weight, bias = _head(config, _two_sites(), 2)
    assert torch.allclose(weight[0], torch.tensor([-0.1, -0.3]), atol=1e-6)
    assert bias[0].item() == pytest.approx(-0.25, abs=1e-6)


def test_dp_fedsgd_without_clipping_and_noise_is_fedavg_with_one_full_batch_step() -> None:
    sites = _blobs()
    total = sum(len(site.labels) for site in sites)
    common = {"num_sites": 3, "num_rounds": 4, "public_total": total}
    private = _line("dp_fedsgd", clip_norm=math.inf, learning_rate=0.5, momentum=0.0, averaging_fraction=0.0,
                    class_bias_scale=1.0, feature_norm=100.0, **common)  # fmt: skip
    plain = _line("fedavg", local_rate=0.5, local_batch_size=1000, feature_norm=math.sqrt(6), **common)
    for one, other in zip(_head(private, sites, 3), _head(plain, sites, 3), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_dp_fedsgd_is_the_generators_own_discriminative_term() -> None:
    settings = {"num_sites": 3, "num_rounds": 3, "noise": "test", "epsilon": 4.0, "statistics_share": 0.1,
                "latent_dim": 0, "code_dim": 0, "elbo_weight": 0.0}  # fmt: skip
    head = run_loop(_line("dp_fedsgd", **settings), _blobs(), ["a", "b", "c"])
    generator = run_loop(_line("fedhypevae", **settings), _blobs(), ["a", "b", "c"])
    expected = generator.artifact.tensors["decoder.0.class_weight"].T
    assert torch.equal(head.artifact.tensors["head.weight"], expected)
    assert head.context.plan == generator.context.plan

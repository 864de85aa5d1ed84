"""MH-pFedHN: chunks by hand, a round against pFedHN in torch modules, distillation, joining, and its private form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config.run import RunConfig
from common.errors import ConfigError
from common.loop import run_loop
from common.methods import get_method
from common.methods.base import RunContext, StepInput
from common.methods.constants import CENTRE
from common.methods.heads.linear import published_head
from common.methods.mh_pfedhn import personal as mh_pfedhn
from common.methods.mh_pfedhn import taught as mh_pfedhn_gd
from common.methods.mh_pfedhn.architectures import Architecture, site_architecture
from common.methods.mh_pfedhn.chunks import clip_joint_norm, generate_model, init_chunks, pull_back
from common.methods.site_release import noise_source
from common.records import SiteData, unit_length

_SMALL = {
    "num_sites": 3,
    "num_rounds": 2,
    "spare_rounds": 0,
    "statistics_share": 0.0,
    "public_total": 60,
    "epsilon": math.inf,
    "noise": "test",
    "clip_norm": math.inf,
    "local_rate": 0.05,
    "chunk_size": 25,
    "chunk_embedding_dim": 4,
    "body_width": 6,
    "hyper_rate": 0.01,
}


def _config(method: str = "mh_pfedhn", **changes: str | float | bool) -> RunConfig:
    return RunConfig().replace(method=method, **{**_SMALL, **changes})


def _sites(dims: tuple[int, ...] = (5, 5, 5), rows: int = 20) -> list[SiteData]:
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(rows) % 3
    made = []
    for dim in dims:
        centres = torch.randn(3, dim, generator=generator)
        embeddings = centres[labels] + 0.3 * torch.randn(rows, dim, generator=generator)
        made.append(unit_length(SiteData(embeddings, labels)))
    return made


def _context(method: str = "mh_pfedhn", **changes: str | float | bool) -> RunContext:
    return run_loop(_config(method, num_rounds=0, **changes), _sites(), ["a", "b", "c"]).context


def test_a_model_is_its_chunks_end_to_end_and_cut() -> None:
    params = {f"body.{layer}.weight": torch.eye(2) for layer in range(3)}
    params |= {f"body.{layer}.bias": torch.zeros(2) for layer in range(3)}
    params["head.2.weight"] = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 0.0]]])
    params["head.2.bias"] = torch.tensor([[0.0, 10.0], [0.0, 0.0]])
    embedding = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    # Rectified, the second embedding is (3, 0): chunk one is (1, 2 + 10), chunk two (3, 6), of which one is kept.
    assert generate_model(params, embedding, 3).tolist() == [1.0, 12.0, 3.0]


def test_models_with_as_many_chunks_share_heads_in_any_order() -> None:
    settings = _config().rivals
    names = init_chunks({"a": 60, "b": 20, "c": 75}, settings, torch.Generator().manual_seed(0))
    other = init_chunks({"b": 20, "c": 75, "a": 60}, settings, torch.Generator().manual_seed(0))
    heads = {name: tuple(value.shape) for name, value in names.items() if name.startswith("head.")}
    assert heads == {"head.1.weight": (1, 25, 6), "head.1.bias": (1, 25), "head.3.weight": (3, 25, 6),
                     "head.3.bias": (3, 25)}  # fmt: skip
    assert all(torch.equal(names[name], other[name]) for name in heads)


def test_architecture_of_a_network_is_torchs() -> None:
    architecture = Architecture(5, (4, 3), 2)
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    theta = torch.cat([value.detach().flatten() for value in module.parameters()])
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    assert architecture.size == theta.numel()
    assert torch.allclose(architecture.logits(theta, features), module(features), atol=1e-6)


def test_equal_models_of_one_chunk_are_pfedhn() -> None:
    """Two rounds against pFedHN written with torch modules: embedding, body, one head, Adam, local SGD."""
    config = _config(architectures="linear", local_batch_size=100, local_decay=0.0)
    sites = _sites()
    result = run_loop(config, sites, ["a", "b", "c"])
    first = mh_pfedhn.init(result.context).params
    names = {"head.1.weight": (25, 6), "head.1.bias": (25,)}
    leaves = {name: nn.Parameter(first[name].reshape(names.get(name, first[name].shape)).clone())
              for name in first if name != CENTRE}  # fmt: skip
    optimiser = torch.optim.Adam(leaves.values(), lr=config.rivals.hyper_rate)
    for _ in range(2):
        total = torch.zeros(())
        for site, data in enumerate(sites):
            hidden = leaves[f"embedding.{site}"][0]
            for layer in range(3):
                hidden = torch.relu(leaves[f"body.{layer}.weight"] @ hidden + leaves[f"body.{layer}.bias"])
            theta = (leaves["head.1.weight"] @ hidden + leaves["head.1.bias"])[:18]
            local = nn.Linear(5, 3)
            local.load_state_dict({"weight": theta.detach()[:15].view(3, 5), "bias": theta.detach()[15:]})
            scale = math.sqrt(5) / config.training.feature_norm
            loss = functional.cross_entropy(local(data.embeddings * scale), data.labels)
            loss.backward()
            with torch.no_grad():
                moved = [param - config.rivals.local_rate * param.grad for param in local.parameters()]
            delta = theta.detach() - torch.cat([param.flatten() for param in moved])
            total = total + theta @ delta / 3
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    for name, value in leaves.items():
        assert torch.allclose(result.state.params[name].reshape(value.shape), value, atol=1e-5), name


def test_a_step_moves_the_generated_model_towards_the_trained_one() -> None:
    context = _context(hyper_rate=1e-4)
    state = mh_pfedhn.init(context)
    before = mh_pfedhn.site_model(context, state.params, 1)
    wanted = before + torch.randn(before.shape, generator=torch.Generator().manual_seed(2))
    after = mh_pfedhn.hyper_step(context, state, mh_pfedhn.model_sizes(context), {"1": before - wanted})
    moved = mh_pfedhn.site_model(context, after.params, 1) - before
    assert float(moved @ (wanted - before)) > 0
    assert torch.equal(after.params["embedding.0"], state.params["embedding.0"])


def test_server_gradients_are_bounded_jointly() -> None:
    gradients = clip_joint_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    assert (gradients["a"].item(), gradients["b"].item()) == (pytest.approx(0.6), pytest.approx(0.8))
    context = _context()
    params = mh_pfedhn.init(context).params
    sizes = mh_pfedhn.model_sizes(context)
    pulled = pull_back(params, sizes, {"0": torch.zeros(sizes["0"])})
    assert all(float(value.abs().max()) == 0 for value in pulled.values())


def test_distillation_follows_the_teacher_and_the_labels() -> None:
    """One full-batch step against the formula: a T^2 KL(teacher || model) + (1 - a) cross-entropy."""
    context = _context(local_batch_size=100, teacher_temperature=3.0, teacher_weight=0.4, local_decay=0.0)
    data, architecture = _sites()[0], Architecture(5, (), 3)
    theta = torch.randn(18, generator=torch.Generator().manual_seed(3))
    teacher = torch.randn(20, 3, generator=torch.Generator().manual_seed(6))
    trained = mh_pfedhn.train_model(
        context, architecture, theta, data.embeddings, data.labels, torch.Generator(), teacher
    )
    leaf = theta.clone().requires_grad_()
    scores = data.embeddings @ leaf[:15].view(3, 5).T + leaf[15:]
    wanted = torch.softmax(teacher / 3, 1)
    divergence = (wanted * (wanted.log() - torch.log_softmax(scores / 3, 1))).sum(1).mean()
    loss = 0.4 * 9 * divergence + 0.6 * functional.cross_entropy(scores, data.labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.allclose(trained, theta - context.config.rivals.local_rate * gradient, atol=1e-5)


def test_light_model_averages_by_records_and_is_published_as_a_head() -> None:
    sites = _sites()
    sites[0] = SiteData(sites[0].embeddings[:10], sites[0].labels[:10])
    result = run_loop(_config("mh_pfedhn_gd"), sites, ["a", "b", "c"])
    context, state = result.context, mh_pfedhn_gd.init(result.context)
    sent = {}
    for site, data in enumerate(sites):
        received = mh_pfedhn_gd.broadcast(context, state, site)
        site_state = mh_pfedhn.METHOD.init_site(context, site)
        work = StepInput(received, site_state, data, 0, site, noise_source(context.config, site, 0))
        sent[site] = mh_pfedhn_gd.client_step(context, work)[1]
    sizes = mh_pfedhn_gd.model_sizes(context)
    mean = (10 * sent[0]["light_delta"] + 20 * sent[1]["light_delta"] + 20 * sent[2]["light_delta"]) / 50
    changes = {str(site): sent[site]["delta"] / 3 for site in sent} | {"light-5": mean}
    expected = mh_pfedhn.hyper_step(context, state, sizes, changes).params
    found = mh_pfedhn_gd.server_step(context, state, sent).params
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    head = published_head(result.artifact)
    if head is None:
        pytest.fail("the light model is not published")
    light = mh_pfedhn_gd.light_model(context, result.state.params, 5)
    features = mh_pfedhn.features_at(context, sites[1].embeddings, result.state.params[CENTRE], 1)
    expected_scores = Architecture(5, (), 3).logits(light, features)
    assert torch.allclose(head.logits(sites[1].embeddings), expected_scores, atol=1e-5)


@pytest.mark.parametrize("method", ["mh_pfedhn", "mh_pfedhn_gd"])
def test_sites_with_different_widths_learn_together(method: str) -> None:
    sites = _sites((5, 8, 5))
    config = _config(method, num_rounds=60, local_rate=0.1)
    result = run_loop(config, sites, ["a", "b", "c"])
    for site, data in enumerate(sites):
        theta = mh_pfedhn.site_model(result.context, result.state.params, site)
        features = mh_pfedhn.features_at(result.context, data.embeddings, torch.zeros(5), site)
        scores = site_architecture(result.context, site).logits(theta, features)
        assert float((scores.argmax(1) == data.labels).float().mean()) > 0.9
    assert {name for name in result.artifact.tensors if "light" in name} == (
        {"embedding.light-5", "embedding.light-8"} if method == "mh_pfedhn_gd" else set()
    )


def test_a_new_site_fits_its_embeddings_alone() -> None:
    pool = _sites((5,), 80)[0]
    parts = [SiteData(pool.embeddings[at::4], pool.labels[at::4]) for at in range(4)]
    sites, newcomer = parts[:3], parts[3]
    result = run_loop(_config(num_rounds=40, local_rate=0.1), sites, ["a", "b", "c"])
    before = {name: value.clone() for name, value in result.artifact.tensors.items()}
    architecture = site_architecture(result.context, 1)
    embedding, theta = mh_pfedhn.join(result.context, result.artifact, newcomer, architecture)
    assert all(torch.equal(before[name], value) for name, value in result.artifact.tensors.items())
    assert embedding.shape == result.artifact.tensors["embedding.1"].shape
    features = mh_pfedhn.features_at(result.context, newcomer.embeddings, result.artifact.tensors[CENTRE], 2)
    assert float((architecture.logits(theta, features).argmax(1) == newcomer.labels).float().mean()) > 0.9
    with pytest.raises(ConfigError, match="no head for models of"):
        mh_pfedhn.join(result.context, result.artifact, newcomer, Architecture(5, (200,), 3))


def test_private_form_without_clipping_and_noise_is_the_published_one() -> None:
    sites = _sites()
    plain = run_loop(_config("mh_pfedhn_gd"), sites, ["a", "b", "c"]).state.params
    private = run_loop(_config("mh_pfedhn_gd_dp"), sites, ["a", "b", "c"]).state.params
    assert all(torch.allclose(plain[name], private[name], atol=1e-5) for name in plain)


def _work(context: RunContext, data: SiteData) -> StepInput:
    received = mh_pfedhn_gd.broadcast(context, mh_pfedhn_gd.init(context), 0)
    source = noise_source(context.config, 0, 0)
    return StepInput(received, mh_pfedhn_gd.METHOD.init_site(context, 0), data, 0, 0, source)


def _flat(sent: dict[str, Tensor]) -> Tensor:
    return torch.cat([sent["delta"], sent["light_delta"]])


def _private_changes(context: RunContext, data: SiteData) -> Tensor:
    return _flat(mh_pfedhn_gd.dp_client_step(context, _work(context, data))[1])


def test_private_form_noises_twice_the_clip_norm_and_is_charged_each_round() -> None:
    config = _config("mh_pfedhn_gd_dp", epsilon=2.0, clip_norm=0.5, architectures="mlp-400")
    result = run_loop(config, _sites(), ["a", "b", "c"])
    context, sigma = result.context, result.context.plan.training_noise
    if sigma is None:
        pytest.fail("a private plan without noise")
    assert [(event.sampling_rate, event.count) for event in context.plan.all_events] == [(1.0, 2)]
    noisy = _private_changes(context, _sites()[0])
    work = _work(context, _sites()[0])
    clean = _flat(dict(mh_pfedhn_gd.client_step(context, work)[1]))
    clipped = clean * min(1.0, 0.5 / float(clean.norm()))
    spread = float((noisy - clipped).std())
    assert spread == pytest.approx(sigma * 2 * 0.5, rel=0.05)
    assert abs(spread / (sigma * 0.5) - 1) > 0.5
    with pytest.raises(ConfigError, match="sampling-rate"):
        get_method("mh_pfedhn_gd_dp").plan(_config("mh_pfedhn_gd_dp", sampling_rate=0.5))


def test_clipping_bounds_what_any_data_can_change() -> None:
    context = _context("mh_pfedhn_gd_dp", clip_norm=0.1)
    context = replace(context, plan=replace(context.plan, training_noise=0.0))
    others = SiteData(1e4 * _sites()[1].embeddings, _sites()[1].labels)
    sent = [_private_changes(context, data) for data in (_sites()[0], others)]
    assert all(float(one.norm()) <= 0.1 * (1 + 1e-5) for one in sent)
    assert float((sent[0] - sent[1]).norm()) <= 0.2 * (1 + 1e-5)

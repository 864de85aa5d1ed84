"""One round by hand, the limits, and what a round may and may not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.config.run import RunConfig
from common.errors import DataError
from common.methods.base import PrivacyPlan, Problem, RunContext, StepInput, seeded
from common.methods.constants import TOTAL
from common.methods.fedhypevae.rates import CLASS_OFFSETS, class_offsets, generator_shape, rate_of
from common.methods.fedhypevae.server import METHOD
from common.privacy.combined import ReleasedStatistics
from common.privacy.noise import TestNoise
from common.records import SiteData
from tests.common.privacy.clipping_cases import Case, reference_loss

FREE = {
    "epsilon": math.inf,
    "clip-norm": math.inf,
    "sleep-steps": 0,
    "momentum": 0.0,
    "averaging-fraction": 0.0,
}


def _context(sites: int = 1, dim: int = 4, classes: int = 2, total: int = 4, noise: float = 0.0, **flat) -> RunContext:
    keys = {
        "num-sites": sites,
        "min-sites": 1,
        "public-total": total,
        "statistics-share": 0.0,
        "num-rounds": 2,
    }
    config = RunConfig.from_flat({**keys, **{k.replace("_", "-"): v for k, v in flat.items()}})
    plan = PrivacyPlan(None, noise, config.privacy.sampling_rate, config.training.local_steps, 2, 1e-5)
    return RunContext(config, Problem(dim, tuple(str(k) for k in range(classes)), sites), plan)


def _data(count: int, dim: int = 4, seed: int = 0) -> SiteData:
    generator = torch.Generator().manual_seed(seed)
    return SiteData(torch.randn(count, dim, generator=generator), torch.arange(count) % 2)


def _step(context: RunContext, data: SiteData, source_seed: int = 0, site_index: int = 0, state=None):
    state = METHOD.init(context) if state is None else state
    work = StepInput(state.params, METHOD.init_site(context, site_index), data, 0, site_index, TestNoise(source_seed))
    return METHOD.client_step(context, work)


def test_one_round_by_hand() -> None:
    # class scores alone, d = 1: all scores 0, so p = (1/2, 1/2); records +-1 on the sphere, clipped to 0.7
    context = _context(
        dim=1, total=2, learning_rate=8.0, **{"latent-dim": 0, "code-dim": 0, "elbo-weight": 0.0, "clip-norm": 0.1}
    )
    data = SiteData(torch.tensor([[2.0], [-3.0]]), torch.tensor([0, 1]))
    _, upload = _step(context, data)
    # g(record) = x ⊗ (p - y) and 0.117 (p - y), norm sqrt(1/2) sqrt(0.49 + 0.117^2), clipped to 0.1
    norm = math.sqrt(0.5 * (0.49 + 0.117**2))
    column = 0.1 / norm * (0.7 * -0.5 + -0.7 * 0.5)
    assert torch.allclose(upload["decoder.0.class_weight"], torch.tensor([[column, -column]]), rtol=2e-4)
    assert torch.allclose(upload["class_bias.weight"], torch.zeros(2), atol=1e-7)
    state = METHOD.server_step(context, METHOD.init(context), {0: upload})
    # divided by C q N = 0.1 * 1 * 2, times the rate 8
    expected = torch.tensor([[-8 * column / 0.2, 8 * column / 0.2]])
    assert torch.allclose(state.params["decoder.0.class_weight"], expected, rtol=2e-4)


def test_sites_sums_make_the_weighted_average_of_eq_10() -> None:
    """Without noise and clipping, sites of 1 and 3 records move Φ as the four records together do."""
    settings = {**FREE, "latent-dim": 0, "code-dim": 0}
    two, one = _context(sites=2, **settings), _context(sites=1, **settings)
    data = _data(4)
    parts = [SiteData(data.embeddings[rows], data.labels[rows]) for rows in (slice(0, 1), slice(1, 4))]
    start = METHOD.init(two)
    uploads = {i: _step(two, part, site_index=i, state=start)[1] for i, part in enumerate(parts)}
    split = METHOD.server_step(two, start, uploads).params
    whole = METHOD.server_step(one, start, {0: _step(one, data, state=start)[1]}).params
    for name in whole:
        assert torch.allclose(split[name], whole[name], atol=1e-6), name


@pytest.mark.parametrize("steps", [1, 3])
def test_one_site_is_local_training(steps: int) -> None:
    """σ = 0, C = inf, one site: the server lands where plain gradient descent on the records lands."""
    settings = {
        **FREE,
        "latent-dim": 0,
        "code-dim": 0,
        "elbo-weight": 0.0,
        "learning-rate": 0.5,
        "local-steps": steps,
    }
    context, data = _context(**settings), _data(4)
    state = METHOD.init(context)
    moved = METHOD.server_step(context, state, {0: _step(context, data, state=state)[1]})
    weight = torch.zeros(4, 2, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    x = 0.7 * torch.nn.functional.normalize(data.embeddings, dim=1)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(x @ weight + 0.117 * bias, data.labels)
        grads = torch.autograd.grad(loss, [weight, bias])
        with torch.no_grad():
            weight -= 0.5 * grads[0]
            bias -= 0.5 * grads[1]
    assert torch.allclose(moved.params["decoder.0.class_weight"], weight, atol=1e-6)
    assert torch.allclose(moved.params["class_bias.weight"], bias, atol=1e-6)


def test_empty_sites_and_batches_are_noised_like_any_other() -> None:
    context = _context(noise=2.0)
    _, upload = _step(context, _data(0))
    assert {name: tuple(value.shape) for name, value in upload.items()} == METHOD.upload_shapes(context)
    assert all(float(value.abs().min()) > 0 for value in upload.values() if value.numel())


def test_latent_numbers_come_from_the_secret_source() -> None:
    context, data = _context(**{"sleep-steps": 0}), _data(4)
    uploads = [_step(context, data, source_seed=seed)[1]["decoder.0.base_weight"] for seed in (0, 0, 1)]
    assert torch.equal(uploads[0], uploads[1])
    assert not torch.allclose(uploads[0], uploads[2])


def test_data_free_gradients_do_not_tell_the_batch_size() -> None:
    context = _context(mmd="per-example", mmd_weight=1.0, code_penalty=0.0, **{"clip-norm": 1e-6})
    counts = (0, 1, 4)
    uploads = [_step(context, _data(count))[1]["decoder.0.class_weight"] for count in counts]
    assert float(uploads[0].abs().sum()) > 1e-3
    for count, upload in zip(counts, uploads, strict=True):
        assert float((upload - uploads[0]).norm()) <= count * 1.001e-6


def test_encoder_and_uploads_names_hold_nothing_of_the_records_under_sleep() -> None:
    context = _context(**{"sleep-steps": 3})
    one, upload = _step(context, _data(4, seed=0))
    other, _ = _step(context, _data(7, seed=5))
    names = [name for name in one.tensors if name.startswith("encoder.")]
    assert names
    for name in names:
        assert torch.equal(one.tensors[name], other.tensors[name]), name
    assert not any(name.startswith(("encoder.", "code")) for name in upload)


def test_unprotected_encoder_follows_the_records_and_is_never_certified() -> None:
    context = _context(**{"encoder-training": "unprotected"})
    one, _ = _step(context, _data(4, seed=0))
    other, _ = _step(context, _data(4, seed=5))
    assert not torch.allclose(one.tensors["encoder.0.weight"], other.tensors["encoder.0.weight"], atol=1e-9)
    assert not context.config.privacy.certified
    assert RunConfig().privacy.certified
    assert RunConfig().replace(encoder_training="joint").privacy.certified
    assert not RunConfig().replace(noise="test").privacy.certified
    assert not RunConfig().replace(epsilon=math.inf).privacy.certified


def test_unprotected_code_and_encoder_step_along_eq_8_as_printed() -> None:
    options = {"encoder-training": "unprotected", "code-radius": 100.0, "code-penalty": 0.01, "latent-dim": 2}
    context, data = _context(**options), _data(4)
    state, generator = METHOD.init(context), torch.Generator().manual_seed(4)
    params = {
        name: value if name.startswith("constant.") else value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in state.params.items()
    }
    before = METHOD.init_site(context, 0).tensors
    after, _ = _step(context, data, state=replace(state, params=params))
    training = context.config.replace(elbo_weight=1.0, discriminative_weight=0.0).training
    encoder = {name: value for name, value in before.items() if name.startswith("encoder.")}
    x = 0.7 * torch.nn.functional.normalize(data.embeddings, dim=1)
    hot = torch.eye(2)[data.labels]
    case = Case(
        generator_shape(context), training, params, before["code"], encoder, x, data.labels, torch.ones(4, 1), False
    )
    leaves = {name: value.clone().requires_grad_() for name, value in before.items()}
    noise = torch.randn(4, 2, generator=seeded("free", context.config.federation.seed, 0, 0, 0))
    losses = reference_loss(case, {**params, **leaves}, x, hot, torch.ones(4), noise, hot, noise, x)
    loss = losses / 4 + 0.01 * leaves["code"].square().sum()
    rates = {"code": training.code_rate}
    for (name, leaf), grad in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        moved = leaf.detach() - rates.get(name, training.encoder_rate) * grad
        assert torch.allclose(after.tensors[name], moved, atol=1e-6), name
        assert not torch.equal(moved, leaf.detach()), name


class LargestStorage(TorchDispatchMode):
    """Floats in the largest tensor that is made meanwhile; views count as what they look into."""

    floats = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.floats = max(self.floats, value.untyped_storage().nbytes() // 4)
        return made


@pytest.mark.parametrize("mode", ["sleep", "joint"])
def test_step_holds_no_copy_of_a_gradient_for_each_record(mode: str) -> None:
    records, dim, classes = 256, 512, 8
    options = {"encoder-training": mode, "latent-dim": 32, "mmd": "per-example", "mmd-weight": 0.1, "sleep-steps": 1}
    context = _context(dim=dim, classes=classes, total=records, noise=1.0, **options)
    data = SiteData(torch.randn(records, dim), torch.arange(records) % classes)
    with LargestStorage() as seen:
        _, upload = _step(context, data)
    smallest_copy = records * upload["decoder.0.base_weight"].numel()
    assert seen.floats < smallest_copy / 8
    with LargestStorage() as seen:  # the counter would have seen it
        torch.einsum("ri,rj->rij", torch.randn(records, dim), torch.randn(records, context.config.model.latent_dim))
    assert seen.floats >= smallest_copy


def test_patients_are_promised_only_where_records_name_them() -> None:
    context, data = _context(unit="patient"), _data(4)
    with pytest.raises(DataError, match="add a group column"):
        _step(context, data)
    grouped = replace(data, groups=torch.tensor([0, 0, 1, 1]))
    _step(context, grouped)
    # where a record is the unit, groups change nothing
    plain = _context()
    first, second = _step(plain, grouped)[1], _step(plain, data)[1]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rates_keep_what_noise_does_to_a_score_within_its_bound() -> None:
    """Rounds of nothing but noise: the scores that come out have the standard deviation that was allowed, no more."""
    settings = {"latent-dim": 0, "code-dim": 0, "elbo-weight": 0.0, "averaging-fraction": 0.0, "learning-rate": 1e3}
    context = _context(sites=3, dim=2000, total=500, noise=7.0, **settings)
    config = context.config.model_copy(
        update={"training": context.config.training.model_copy(update={"num_rounds": 60})}
    )
    context = replace(context, config=config)
    state, generator = METHOD.init(context), torch.Generator().manual_seed(1)
    clip = config.privacy.clip_norm
    for _ in range(60):
        uploads = {
            site: {
                name: 7.0 * clip * torch.randn(shape, generator=generator)
                for name, shape in METHOD.upload_shapes(context).items()
            }
            for site in range(3)
        }
        state = METHOD.server_step(context, state, uploads)
    # the score of a record of norm 0.7 along any one coordinate
    spread = float((0.7 * state.params["decoder.0.class_weight"]).std())
    assert 0.85 * 1.8 < spread < 1.05 * 1.8


def test_rates_are_bounded_by_shared_noise_less_than_by_each_sites_own() -> None:
    """With n sites' own noise sqrt(n) whole shares, under secagg sqrt(n / honest shares): by hand for ten sites."""
    base = {"sites": 10, "total": 1000, "noise": 30.0, "latent-dim": 0, "code-dim": 0, "learning-rate": 1e6}
    walk = 30.0 * math.sqrt(2) / 1000 * 0.7 / (1 - 0.8)  # two rounds, momentum 0.8
    own, shared = _context(**base), _context(**base, trust="secagg", dropouts=1, colluders=1)
    assert rate_of(own, "decoder.0.class_weight", {}) == pytest.approx(1.8 / (walk * math.sqrt(10)))
    assert rate_of(shared, "decoder.0.class_weight", {}) == pytest.approx(1.8 / (walk * math.sqrt(10 / 8)))
    told = rate_of(own, "decoder.0.class_weight", {TOTAL: torch.tensor(2000.0)})
    assert told == pytest.approx(2 * 1.8 / (walk * math.sqrt(10)))
    low = _context(**{**base, "learning-rate": 0.01})
    assert rate_of(low, "decoder.0.class_weight", {}) == 0.01
    assert rate_of(_context(**base, score_noise=0.0), "decoder.0.class_weight", {}) == 1e6


def test_class_offsets_are_the_log_shares_of_the_released_counts() -> None:
    context = _context(classes=3)
    offsets = class_offsets(context, torch.tensor([60.0, 39.0, 1e-3]) / 99.0)
    shares = torch.tensor([60.0 / 99.0, 39.0 / 99.0, 0.01])
    assert torch.allclose(offsets, torch.log(shares / shares.sum()), atol=1e-4)
    assert float(class_offsets(_context(classes=3, logit_adjustment=0.0), torch.ones(3)).abs().max()) == 0.0
    counts = torch.tensor([60.0, 39.0, 1e-3])
    released = ReleasedStatistics(99.0, torch.zeros(4), counts, None, None, None, {"class_counts": 0.0})
    prepared = METHOD.prepare(context, METHOD.init(context), released)
    assert torch.allclose(prepared.params[CLASS_OFFSETS], offsets)


def test_adjusted_scores_do_not_learn_how_rare_a_class_is() -> None:
    """Same rows in both classes, nine times as many of one: plain scores prefer it, adjusted ones know no better."""
    rows = torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    data = SiteData(rows.repeat(10, 1), (torch.arange(200) >= 180).long())
    settings = {**FREE, "latent-dim": 0, "code-dim": 0, "elbo-weight": 0.0, "learning-rate": 4.0}
    counts = torch.tensor([180.0, 20.0])
    released = ReleasedStatistics(200.0, torch.zeros(4), counts, None, None, None, {"class_counts": 0.0})

    def gap(adjustment: float) -> float:
        context = _context(total=200, logit_adjustment=adjustment, **settings)
        state = METHOD.prepare(context, METHOD.init(context), released)
        for _ in range(2000):
            state = METHOD.server_step(context, state, {0: _step(context, data, state=state)[1]})
        bias = 0.117 * state.params["class_bias.weight"]
        return float(bias[0] - bias[1])

    assert gap(0.0) == pytest.approx(math.log(9), abs=0.05)
    assert gap(1.0) == pytest.approx(0.0, abs=0.05)

"""Class prototypes: where they lie, and the rows that are drawn at them."""

from __future__ import annotations

import torch

from common.config.run import RunConfig
from common.generator.hypernetwork import GeneratorShape, class_scores, init_hypernet_params
from common.generator.layers import PlainLayers
from common.generator.meta_code import MetaCodes, mixture_means
from common.generator.prototypes import class_prototypes
from common.privacy.combined import ReleasedStatistics
from tests.row_cases import generator_rows

COLUMNS = torch.tensor([[1.0, -1.0], [0.0, 0.0]])  # (d_x, K)
NOTHING = MetaCodes(torch.zeros(1, 0), torch.ones(1))


def _case(dim: int, residual_energy: float, columns: torch.Tensor) -> tuple[GeneratorShape, dict[str, torch.Tensor]]:
    config = RunConfig().replace(latent_dim=0, code_dim=0, residual_energy=residual_energy)
    shape = GeneratorShape.of(dim, columns.shape[1], config.model, config.training)
    params = init_hypernet_params(shape, torch.Generator().manual_seed(0))
    return shape, {**params, "decoder.0.class_weight": columns}


def _two_classes() -> tuple[GeneratorShape, dict[str, torch.Tensor]]:
    """Variance 0.1 a coordinate: the decoder itself puts the classes 0.1 to either side."""
    shape, params = _case(2, 0.2, COLUMNS)
    return shape, {**params, "decoder.0.base_bias": torch.tensor([0.0, 0.5])}


def _released(offsets: torch.Tensor, std: float) -> ReleasedStatistics:
    counts = torch.tensor([10.0, 20.0])
    return ReleasedStatistics(
        30.0, torch.zeros(2), counts, offsets, None, None, {"class_sums": std}, class_offsets=offsets
    )


def test_class_prototypes_fit_one_length_of_all_columns_to_the_release() -> None:
    shape, params = _two_classes()
    offsets = torch.tensor([[0.4, 0.5], [-0.2, 9.0]])
    exact = class_prototypes(shape, params, NOTHING, _released(offsets * torch.tensor([[1.0, 1.0], [2.0, 1.0]]), 0.0))
    assert exact is not None
    assert torch.allclose(exact, torch.tensor([[0.4, 0.5], [-0.4, 0.5]]), atol=1e-4)
    # noise of 1 in the sums: 0.1 and 0.05 in the means, so the classes count 1 to 4 and each holds 0.01 of squares
    noisy = class_prototypes(shape, params, NOTHING, _released(offsets, 1.0))
    factor = (1.0 + 100 * 0.1 * 0.4 + 400 * 0.1 * 0.2) / (1.0 + 100 * 0.01 + 400 * 0.01)
    assert noisy is not None
    assert torch.allclose(noisy, torch.tensor([[0.1 * factor, 0.5], [-0.1 * factor, 0.5]]), atol=1e-5)


def test_class_prototypes_stay_where_the_decoder_puts_them_when_noise_is_large_and_never_turn_round() -> None:
    shape, params = _two_classes()
    drowned = class_prototypes(shape, params, NOTHING, _released(torch.tensor([[5.0, 5.0], [5.0, 5.0]]), 1e6))
    assert drowned is not None
    assert torch.allclose(drowned, torch.tensor([[0.1, 0.5], [-0.1, 0.5]]), atol=1e-5)
    turned = class_prototypes(shape, params, NOTHING, _released(torch.tensor([[-0.4, 0.5], [0.4, 0.5]]), 0.0))
    assert turned is not None
    assert torch.allclose(turned, torch.tensor([[0.0, 0.5], [0.0, 0.5]]), atol=1e-5)
    assert class_prototypes(shape, params, NOTHING, None) is None


def test_the_nearest_prototype_is_that_of_the_likeliest_class() -> None:
    config = RunConfig().replace(latent_dim=2, code_dim=2, residual_energy=0.5)
    shape = GeneratorShape.of(6, 4, config.model, config.training)
    generator = torch.Generator().manual_seed(3)
    params = init_hypernet_params(shape, generator)
    params = {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    params["class_bias.weight"] = torch.tensor([3.0, -2.0, 0.0, 5.0])
    meta = MetaCodes(torch.tensor([[0.4, -0.7]]), torch.ones(1))
    offsets = mixture_means(shape, params, meta) + 0.3 * params["decoder.0.class_weight"].T
    counts = torch.full((4,), 50.0)
    released = ReleasedStatistics(
        200.0, torch.zeros(6), counts, offsets, None, None, {"class_sums": 1.0}, class_offsets=offsets
    )
    prototypes = class_prototypes(shape, params, meta, released)
    assert prototypes is not None
    rows = torch.randn(3000, 6, generator=generator)
    likeliest = class_scores(shape, PlainLayers.at(params, meta.codes[0]), rows).argmax(1)
    assert set(likeliest.tolist()) == {0, 1, 2, 3}
    assert float((torch.cdist(rows, prototypes).argmin(1) == likeliest).float().mean()) > 0.999


def test_generator_draws_the_share_of_prototypes_bare() -> None:
    shape, params = _two_classes()
    prototypes = torch.tensor([[3.0, 0.5], [-3.0, 0.5]])
    labels = torch.arange(4000) % 2
    settings = {"prototypes": prototypes, "relabel": True}
    rows, drawn = generator_rows(shape, params, NOTHING, labels, prototype_share=0.25, **settings)
    bare = (rows == prototypes[labels]).all(1)
    assert abs(float(bare.float().mean()) - 0.25) < 0.03
    assert torch.equal(drawn[bare], labels[bare])  # labelled by the posterior, which knows them
    plain, _ = generator_rows(shape, params, NOTHING, labels, relabel=True)
    assert torch.equal(rows[~bare], plain[~bare])


def test_generator_spreads_a_share_of_the_prototypes_as_the_latent_does() -> None:
    config = RunConfig().replace(latent_dim=1, code_dim=0, residual_energy=0.2)
    shape = GeneratorShape.of(2, 2, config.model, config.training)
    params = init_hypernet_params(shape, torch.Generator().manual_seed(0))
    params |= {"decoder.0.class_weight": COLUMNS, "decoder.0.base_weight": torch.tensor([[0.0], [0.7]])}
    params |= {"prior.head.weight": torch.zeros_like(params["prior.head.weight"])}
    params |= {"prior.head.bias": torch.tensor([0.3, 0.0])}  # z ~ N(0.3, 1) for both classes
    prototypes = torch.tensor([[3.0, 0.5], [-3.0, 0.5]])
    labels = torch.arange(20_000) % 2

    def rows(spread: float) -> torch.Tensor:
        settings = {"prototype_share": 1.0, "prototype_spread": spread}
        return generator_rows(shape, params, NOTHING, labels, prototypes=prototypes, **settings)[0]

    around = rows(0.25) - prototypes[labels]
    moved = around.abs().sum(1) > 0
    assert abs(float(moved.float().mean()) - 0.25) < 0.02
    assert torch.all(around[:, 0].abs() < 1e-6)  # the latent acts on the second coordinate alone
    assert abs(float(around[moved, 1].mean())) < 0.03  # around the prototype, the prior's mean taken off
    assert abs(float(around[moved, 1].std()) - 0.7) < 0.02
    assert torch.equal(rows(0.0), prototypes[labels])


def test_generator_fills_rows_up_to_unit_length_around_the_centre() -> None:
    variance = 0.67 / 400
    columns = torch.zeros(400, 2)
    columns[0, 0], columns[1, 1] = 0.6 / variance, 1.4 / variance
    shape, params = _case(400, 0.67, columns)
    centre = torch.zeros(400)
    centre[2] = 0.5
    labels = torch.arange(2000) % 2
    drawn, _ = generator_rows(shape, params, NOTHING, labels, centre=centre, unit_rows=True)
    rows = drawn - centre
    # class 0 has the mean (0.6, 0, 0.5): 0.61 of its squared length, which leaves 0.39 over 400 coordinates to noise
    first = rows[labels == 0]
    assert abs(float((first + centre).square().sum(1).mean()) - 1.0) < 0.01
    assert abs(float(first.var(0).sum()) - 0.39) < 0.01
    # the mean of class 1 is longer than 1 alone: nothing is left, and it is not scaled
    second = torch.zeros(400)
    second[1] = 1.4
    assert torch.allclose(rows[labels == 1], second.expand(1000, -1), atol=1e-6)

"""What the server holds of a round's uploads: their sum, each site's part weighed by the classes that it has."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm

from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import Problem, RunContext, ServerState
from common.methods.fedhypevae.presence import presence_weights
from common.methods.fedhypevae.rates import PRESENCE, generator_shape
from common.methods.uploads import SummedUploads, gather, summed
from common.privacy.combined import combine_statistics


def _context(**settings: str | int | float | bool) -> RunContext:
    flat = {"num-sites": 3, "num-rounds": 2, **{name.replace("_", "-"): value for name, value in settings.items()}}
    config = RunConfig.from_flat(flat)
    return RunContext(config, Problem(4, ("a", "b"), 3), get_method(config.method).plan(config))


def test_summed_uploads_hold_one_sum() -> None:
    context = _context()
    uploads = gather(get_method("fedhypevae"), context, ServerState(0, {}))
    assert isinstance(uploads, SummedUploads)
    each = {site: {"w": torch.full((3,), float(site))} for site in range(1, 5)}
    for site, tensors in each.items():
        uploads[site] = tensors
    assert summed(uploads, "w").tolist() == summed(each, "w").tolist() == [10.0] * 3
    assert uploads[2]["w"].tolist() == [2.5] * 3
    assert list(uploads) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="second one of site 2"):
        uploads[2] = each[2]
    assert gather(get_method("fedavg"), context, ServerState(0, {})) == {}


def test_uploads_are_weighed_where_their_name_has_weights_and_a_late_site_has_weight_one() -> None:
    uploads = SummedUploads({"w": torch.tensor([[1.0, 0.5], [0.0, 2.0]])[:, None]})
    for site in range(3):
        uploads[site] = {"w": torch.ones(4, 2) * (site + 1), "other": torch.ones(2)}
    assert summed(uploads, "w").tolist() == [[1 + 0 + 3, 0.5 + 4 + 3]] * 4
    assert summed(uploads, "other").tolist() == [3.0, 3.0]


def test_presence_by_hand() -> None:
    counts = torch.tensor([[300.0, 100.0], [0.0, 104.0], [20.0, 96.0], [280.0, 100.0]])
    weights = presence_weights(counts, 10.0)
    variance = float(counts[:, 0].var())
    spread = variance - (1.0 + 2.0 * (2.0 / 3.0) ** 0.5) * 100.0
    kept = spread / (spread + 100.0)
    present = torch.tensor(norm.cdf(counts[:, 0].numpy() / 10.0)).float()
    raw = 1.0 - kept * (1.0 - present)
    held = (150.0 + kept * (counts[:, 0] - 150.0)).clamp(min=0.0)
    assert torch.allclose(weights[:, 0], raw * held.sum() / (raw * held).sum(), atol=1e-5)
    assert torch.equal(weights[:, 1], torch.ones(4))  # they differ by no more than their noise
    assert torch.equal(presence_weights(counts, 0.0), torch.ones(4, 2))
    assert torch.equal(presence_weights(counts[:1], 10.0), torch.ones(1, 2))


def test_alike_sites_count_alike_but_for_chance() -> None:
    """Ten sites with the same counts, noise of their size: a class's weights differ in few of a thousand classes."""
    noise = torch.randn(10, 1000, generator=torch.Generator().manual_seed(0))
    weights = presence_weights(60.0 + 60.0 * noise, 60.0)
    assert float((weights != 1.0).any(0).float().mean()) < 0.06


def test_server_weighs_class_columns_by_the_released_counts() -> None:
    context, method = _context(epsilon=8.0), get_method("fedhypevae")
    spec = method.statistics(context)
    assert spec is not None
    noise = context.plan.statistics_noise or 0.0
    releases = [{name: torch.zeros(shape) for name, shape in spec.shapes.items()} for _ in range(2)]
    for release, counts in zip(releases, ((9000.0, 9000.0), (0.0, 9000.0)), strict=True):
        release["class_counts"] = torch.tensor(counts)
    state = method.prepare(context, method.init(context), combine_statistics(spec, releases, noise, [0, 2]))
    assert PRESENCE in state.memory
    assert method.upload_weights is not None
    weights = method.upload_weights(context, state)
    assert weights != {}
    uploads, column = gather(method, context, state), f"{generator_shape(context).output_layer}.class_weight"
    shapes = method.upload_shapes(context)
    for site in range(3):
        uploads[site] = {name: torch.ones(shape) for name, shape in shapes.items()}
    total = summed(uploads, column)
    assert total[0, 1] == pytest.approx(3.0)  # all who told their counts have the second class; one told none
    assert total[0, 0] < 2.7
    assert summed(uploads, "class_bias.weight")[1] == pytest.approx(3.0)
    others = [name for name in shapes if not name.startswith(("class_", column))]
    assert all(torch.equal(summed(uploads, name), torch.full(shapes[name], 3.0)) for name in others)


def test_under_shared_noise_sites_count_alike() -> None:
    context, method = _context(trust="secagg", dropouts=0, colluders=1), get_method("fedhypevae")
    spec = method.statistics(context)
    assert spec is not None
    release = {name: torch.ones(shape) for name, shape in spec.shapes.items()}
    state = method.prepare(context, method.init(context), combine_statistics(spec, [release] * 3, 1.0))
    assert PRESENCE not in state.memory

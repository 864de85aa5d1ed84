"""The reference rows: by hand on a small federation, and against the figures that OrganAMNIST must reach."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.protocol import BenchmarkSite, Federation, load_federations
from benchmarks.reference import (
    alone_heads,
    as_record,
    centralised_head,
    local_heads,
    score_heads_at_sites,
    score_method,
    split_of,
)
from benchmarks.sources import data_folder
from common.errors import ConfigError, DataError
from common.evaluation.heads import LinearHead
from common.evaluation.scores import SiteScores, mean_scores, personal_head
from common.records import SiteData


def _records(values: list[float], labels: list[int]) -> SiteData:
    return SiteData(torch.tensor(values)[:, None], torch.tensor(labels))


def _federation() -> Federation:
    """Two sites on a line: one knows classes 0 and 1, the other 1 and 2; all three are tested at both."""
    test = _records([-3.0, 0.0, 3.0], [0, 1, 2])
    first = _records([-3.0, -3.2, 0.1, -0.1], [0, 0, 1, 1])
    second = _records([0.1, -0.1, 3.0, 3.2], [1, 1, 2, 2])
    left = BenchmarkSite("left", first, _records([-3.1], [0]), test)
    right = BenchmarkSite("right", second, _records([3.1], [2]), test)
    return Federation("line", 1, ("a", "b", "c"), (left, right))


def test_local_heads_miss_what_their_site_lacks_and_the_centralised_head_does_not() -> None:
    federation = _federation()
    local = score_heads_at_sites(federation, local_heads(federation))
    assert local == (SiteScores(pytest.approx(2 / 3), pytest.approx(2 / 3)),) * 2
    centralised = centralised_head(federation)
    assert score_heads_at_sites(federation, [centralised] * 2) == (SiteScores(1.0, 1.0),) * 2


def test_local_only_chooses_between_two_penalties_as_a_personal_head_does() -> None:
    federation = _federation()
    own = local_heads(federation)
    silent = LinearHead(torch.zeros_like(own[0].weight), torch.zeros_like(own[0].bias))
    for site, fitted, chosen in zip(federation.sites, own, alone_heads(federation, own), strict=True):
        pulled = personal_head(silent, split_of(site.train), split_of(site.validation))
        assert any(torch.equal(chosen.weight, one.weight) for one in (fitted, pulled))
        rows, labels = split_of(site.validation)
        losses = [float(cross_entropy(one.logits(rows), labels)) for one in (chosen, fitted, pulled)]
        assert losses[0] == pytest.approx(min(losses[1:]))  # one class a row: plain and balanced are one


def test_score_method_gives_every_column_for_every_site() -> None:
    federation = _federation()
    local = local_heads(federation)
    scores = score_method(federation, centralised_head(federation), local)
    assert scores.local_only == score_heads_at_sites(federation, local)
    assert scores.synthetic_only == (SiteScores(1.0, 1.0),) * 2
    assert len(scores.mixed) == len(scores.own_lambda) == len(scores.personalised) == 2
    assert score_method(federation, centralised_head(federation), local, mixing=1.0).mixed == scores.local_only
    with pytest.raises(ConfigError, match="2 sites"):
        score_method(federation, centralised_head(federation), local[:1])


def test_as_record_keeps_means_and_sites() -> None:
    assert as_record((SiteScores(1.0, 0.5), SiteScores(0.5, 0.0))) == {
        "accuracy": 0.75,
        "balanced_accuracy": 0.25,
        "per_site": {"accuracy": [1.0, 0.5], "balanced_accuracy": [0.5, 0.0]},
    }


@pytest.mark.slow
def test_local_only_and_centralised_reach_their_figures_on_organ() -> None:
    try:
        folder = data_folder()
    except DataError:
        pytest.skip("the shared data folder is not here")
    (federation,) = load_federations("organ-iid", 3407, folder)
    local = mean_scores(list(score_heads_at_sites(federation, local_heads(federation))))
    assert local.accuracy >= 0.917
    assert local.balanced_accuracy >= 0.910
    together = mean_scores(list(score_heads_at_sites(federation, [centralised_head(federation)] * 10)))
    assert together.accuracy >= 0.955
    assert together.balanced_accuracy >= 0.955

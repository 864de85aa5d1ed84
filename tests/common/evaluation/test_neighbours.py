"""Manifold scores and the copying sign against loops and cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.errors import DataError
from common.evaluation.neighbours import manifold_scores, nearest_neighbour_warning


def _radius(rows: list[list[float]], index: int, neighbours: int) -> float:
    return sorted(math.dist(rows[index], other) for at, other in enumerate(rows) if at != index)[neighbours - 1]


def _by_loops(real: list[list[float]], fake: list[list[float]], k: int) -> tuple[float, float, float, float]:
    """The four definitions, one pair at a time."""
    in_real = [[math.dist(x, y) <= _radius(real, i, k) for i, x in enumerate(real)] for y in fake]
    in_fake = [[math.dist(x, y) <= _radius(fake, j, k) for j, y in enumerate(fake)] for x in real]
    return (
        sum(any(row) for row in in_real) / len(fake),
        sum(any(row) for row in in_fake) / len(real),
        sum(sum(row) for row in in_real) / (k * len(fake)),
        sum(any(row[i] for row in in_real) for i in range(len(real))) / len(real),
    )


@pytest.mark.parametrize("chunk", [7, 1024])
def test_manifold_scores_agree_with_loops(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=generator)
    synthetic = 0.7 * torch.randn(30, 3, generator=generator) + 0.4
    scores = manifold_scores(real, synthetic, neighbours=3, chunk=chunk)
    expected = _by_loops(real.double().tolist(), synthetic.double().tolist(), 3)
    assert (scores.precision, scores.recall, scores.density, scores.coverage) == pytest.approx(expected)
    assert 0 < scores.coverage < 1


def test_manifold_scores_by_hand_in_one_dimension() -> None:
    # Real balls: 0 and 1 reach out by 1, 10 by 9. Synthetic balls: 0.5 and 1.5 reach out by 1, 50 by 48.5.
    real, synthetic = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.5], [1.5], [50.0]])
    scores = manifold_scores(real, synthetic, neighbours=1)
    assert scores.precision == pytest.approx(2 / 3)  # 50 lies in no real ball
    assert scores.recall == pytest.approx(1.0)  # 0 and 1 near 0.5; 10 within 48.5 of 50
    assert scores.density == pytest.approx((2 + 2 + 0) / 3)  # 1.5 is 8.5 from 10
    assert scores.coverage == pytest.approx(1.0)


def test_manifold_scores_of_a_set_with_itself_and_with_a_far_one() -> None:
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    same, far = manifold_scores(rows, rows), manifold_scores(rows, rows + 100)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)


def test_manifold_scores_tell_missing_modes_from_bad_samples() -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(60, 2, generator=generator), torch.randn(60, 2, generator=generator) + 20
    dropped = manifold_scores(torch.cat([left, right]), torch.randn(60, 2, generator=generator))
    assert dropped.precision > 0.8
    assert dropped.recall <= 0.5
    assert dropped.coverage <= 0.5


def test_manifold_scores_refuse_too_few_rows() -> None:
    with pytest.raises(DataError, match="at least 6 rows"):
        manifold_scores(torch.zeros(5, 2), torch.zeros(9, 2), neighbours=5)
    with pytest.raises(DataError, match="one width"):
        manifold_scores(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(DataError, match="finite"):
        manifold_scores(torch.full((9, 2), float("nan")), torch.zeros(9, 2))


def _draw(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, 8, generator=generator)


def test_nearest_neighbour_warning_stays_quiet_for_fresh_draws() -> None:
    generator = torch.Generator().manual_seed(3)
    alarms = 0
    for _ in range(8):
        found = nearest_neighbour_warning(
            _draw(400, generator), _draw(300, generator), _draw(200, generator), generator
        )
        assert found.copies == 0
        alarms += found.warning
    assert alarms == 0


def test_nearest_neighbour_warning_knows_how_far_a_few_central_records_tip_the_share() -> None:
    """A narrow cloud has a handful of records as nearest: far from one half by chance, and no margin for independent
    rows would bear it."""
    generator = torch.Generator().manual_seed(6)
    margin, far, alarms = 4 * (0.25 / 4000 + 0.25 / 200) ** 0.5, 0, 0
    for _ in range(8):
        train, held_out = (torch.randn(200, 64, generator=generator) for _ in range(2))
        found = nearest_neighbour_warning(0.3 * torch.randn(4000, 64, generator=generator), train, held_out, generator)
        far += abs(found.share_nearer - 0.5) > margin
        alarms += found.warning
    assert far >= 1
    assert alarms == 0


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_nearest_neighbour_warning_sees_blurred_copies(share: float) -> None:
    """Also where nine rows in ten are fresh, and the share nearer to training records tells nothing."""
    generator = torch.Generator().manual_seed(4)
    train, held_out = (torch.randn(300, 64, generator=generator) for _ in range(2))
    blurred = train[: int(300 * share)]
    blurred = blurred + 0.3 * torch.randn(blurred.shape, generator=generator)
    rows = torch.cat([blurred, torch.randn(300 - len(blurred), 64, generator=generator)])
    found = nearest_neighbour_warning(rows, train, held_out, generator)
    assert found.warning
    assert found.copies == 0
    other_way = nearest_neighbour_warning(rows, held_out, train, generator)
    assert not other_way.warning


def test_nearest_neighbour_warning_sees_an_exact_copy() -> None:
    generator = torch.Generator().manual_seed(4)
    train, held_out = _draw(300, generator), _draw(300, generator)
    exact = nearest_neighbour_warning(torch.cat([_draw(300, generator), train[:1]]), train, held_out, generator)
    assert exact.copies == 1
    assert exact.warning


def test_nearest_neighbour_warning_deals_out_whole_patients() -> None:
    """Twenty near-equal images of one patient count as one: as single records they would raise an alarm."""
    generator = torch.Generator().manual_seed(8)
    sides = []
    for _ in range(2):
        patients = torch.randn(12, 64, generator=generator).repeat_interleave(20, 0)
        sides.append(patients + 0.05 * torch.randn(patients.shape, generator=generator))
    names = torch.arange(12).repeat_interleave(20)
    rows = sides[0][:40] + torch.randn(40, 64, generator=generator)  # near two patients, of the trained ones by chance
    by_record = nearest_neighbour_warning(rows, *sides, generator)
    by_patient = nearest_neighbour_warning(rows, *sides, generator, groups=(names, names + 12))
    assert by_record.warning
    assert by_patient.chance > 0.05
    assert not by_patient.warning


def test_nearest_neighbour_warning_by_hand() -> None:
    train, held_out = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [7.0]])
    synthetic = torch.tensor([[0.4], [0.9], [3.0], [6.0]])
    # Nearer to training: 0.4 (0.4 < 0.6) and 3.0 (1 < 2); nearer to held-out: 0.9 and 6.0.
    found = nearest_neighbour_warning(synthetic, train, held_out, torch.Generator().manual_seed(5))
    assert found.share_nearer == pytest.approx(0.5)
    assert not found.warning

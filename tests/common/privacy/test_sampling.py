"""The public cap on a patient's records, where training reads them and where the statistics do."""

from __future__ import annotations

import torch

from common.config.run import RunConfig
from common.loop import problem_of
from common.methods import get_method
from common.methods.base import PrivacyPlan, RunContext
from common.methods.site_release import site_statistics
from common.privacy.noise import SecureNoise
from common.privacy.sampling import draw_units
from common.records import SiteData, by_unit, cumulative

CAP = 2


def patient_of_ten(length: float = 1.0) -> SiteData:
    """One patient with ten records that differ in their first coordinate, and one with a single record."""
    rows = torch.zeros(11, 3)
    rows[:, 0] = torch.arange(1, 12)
    groups = torch.tensor([4] * 10 + [9])
    return SiteData(length * rows, torch.zeros(11, dtype=torch.long), groups)


def test_a_patient_gives_no_more_records_than_the_cap() -> None:
    """Which ones is drawn each time from the secret source: every one of the ten is used now and then."""
    source, seen = SecureNoise(), set()
    for _ in range(200):
        batch = draw_units(patient_of_ten(), 1.0, CAP, source)
        assert batch.embeddings.shape == (2, CAP, 3)
        assert batch.mask.sum(1).tolist() == [CAP, 1]
        seen |= set(batch.embeddings[0, :, 0].tolist())
    assert seen == set(map(float, range(1, 11)))


def test_statistics_see_no_more_records_of_a_patient_than_the_cap() -> None:
    """Short records are not clipped: the counts without noise show how many were read, 2 and 1, not 10 and 1."""
    config = RunConfig().replace(unit="patient", max_records_per_patient=CAP, num_sites=1, min_sites=1)
    context = RunContext(config, problem_of([patient_of_ten()], "a"), PrivacyPlan(0.0, 1.0, 1.0, 1, 1, 1e-5))
    spec = get_method("fedhypevae").statistics(context)
    assert spec is not None
    released = site_statistics(context, spec, 0.0, patient_of_ten(1e-6), SecureNoise())
    assert float(released["class_counts"].sum()) == CAP + 1


def test_records_of_no_class_are_left_out_and_the_others_stay() -> None:
    """A label outside the classes would end the release of all: whether it ends would tell of one record."""
    labels = torch.tensor([0, 1, 2, 3, -1, 2**40])
    data = SiteData(torch.arange(6.0)[:, None], labels, torch.arange(6))
    for unit in ("record", "patient"):
        kept = by_unit(data, unit, 3)
        assert kept.embeddings[:, 0].tolist() == [0.0, 1.0, 2.0]
        assert kept.labels.tolist() == [0, 1, 2]
        assert (kept.groups is None) == (unit == "record")


def test_records_with_a_finding_that_is_none_are_left_out_and_the_others_stay() -> None:
    labels = torch.tensor([[0, 1], [-1, -1], [2, 0], [0, -2], [1, 0]], dtype=torch.int8)
    data = SiteData(torch.arange(5.0)[:, None], labels, torch.arange(5))
    kept = by_unit(data, "patient", 2)
    assert kept.embeddings[:, 0].tolist() == [0.0, 1.0, 4.0]
    assert torch.equal(kept.labels, labels[[0, 1, 4]])


def test_findings_of_a_patient_are_unknown_where_padded() -> None:
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.int8)
    batch = draw_units(SiteData(torch.eye(3), labels, torch.tensor([5, 7, 7])), 1.0, CAP, SecureNoise())
    assert batch.labels.dtype == torch.int8
    assert batch.labels.tolist() == [[[1, 0], [-1, -1]], [[0, 1], [1, 1]]]


def test_grades_as_findings_say_at_least_this_grade() -> None:
    assert cumulative(torch.tensor([0, 2, 1, 3]), 4).tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert cumulative(torch.tensor([0, 1]), 2).dtype == torch.int8


def test_padding_of_a_patient_reads_no_other_ones_record() -> None:
    """The first record is another patient's, and not finite: times zero it would not be zero."""
    rows = torch.full((4, 3), 2.0)
    rows[0] = torch.nan
    data = SiteData(rows, torch.tensor([1, 0, 0, 0]), torch.tensor([0, 1, 1, 2]))
    batch = draw_units(data, 1.0, CAP, SecureNoise())
    assert batch.mask.tolist() == [[1, 0], [1, 1], [1, 0]]
    assert batch.embeddings[1:].isfinite().all()
    assert not batch.embeddings[2, 1].any()
    assert not batch.embeddings[0, 1].any()
    assert batch.labels.tolist() == [[1, 0], [0, 0], [0, 0]]

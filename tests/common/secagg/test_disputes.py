"""Who is left out where sites refuse what others sent: few sites, and among them whoever lies to many."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.secagg.disputes import partners, to_leave_out

CASES = {
    "nobody": ([], []),
    "one against one: the accused": ([(0, 3)], [3]),
    "each accuses the other: the later index stays": ([(0, 3), (3, 0)], [0]),
    "a liar to all": ([(0, 3), (1, 3), (2, 3)], [3]),
    "a slanderer of all": ([(3, 0), (3, 1), (3, 2)], [3]),
    "a liar who slanders back": ([(0, 3), (1, 3), (3, 0), (3, 2)], [3]),
    "two liars": ([(0, 5), (1, 5), (2, 5), (4, 0), (4, 1), (4, 2)], [5, 4]),
}


@pytest.mark.parametrize("name", CASES)
def test_those_are_left_out_who_are_in_most_disputes(name: str) -> None:
    disputes, wanted = CASES[name]
    assert to_leave_out(disputes) == wanted


@given(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda pair: pair[0] != pair[1]), max_size=20))
def test_no_dispute_is_left(disputes: set[tuple[int, int]]) -> None:
    gone = to_leave_out(disputes)
    assert len(set(gone)) == len(gone)
    assert all(by in gone or of in gone for by, of in disputes)


@given(st.data())
def test_one_liar_costs_itself_or_one_other(data: st.DataObject) -> None:
    """Every dispute has the liar on one side: it goes, but where a single other one stands against it."""
    liar, others = 2, [0, 1, 3, 4]
    disputes = data.draw(st.sets(st.sampled_from([(liar, one) for one in others] + [(one, liar) for one in others])))
    gone = to_leave_out(disputes)
    assert len(gone) <= 1
    if len(partners(disputes, liar)) > 1:
        assert gone == [liar]


def test_partners_are_counted_once() -> None:
    disputes = [(0, 1), (1, 0), (2, 0)]
    assert partners(disputes, 0) == {1, 2}
    assert [partners(disputes, site) for site in (1, 2, 3)] == [{0}, {0}, set()]

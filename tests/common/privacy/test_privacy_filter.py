"""The filter across runs: whatever it lets through is within the limit, and it forgets nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.privacy.calibration import calibrate_noise_multiplier
from common.privacy.composition import RDP_ORDERS, epsilon_offset, epsilon_pld, rdp_to_epsilon
from common.privacy.events import PrivacyEvent, gaussian, sampled_gaussian
from common.privacy.filter import filter_allows, filter_cap, filter_epsilon_spent, filter_order, filter_share_spent

events = st.one_of(
    st.builds(gaussian, st.floats(2.0, 60.0)),
    st.builds(sampled_gaussian, st.floats(0.6, 10.0), st.floats(0.005, 0.6), count=st.integers(1, 300)),
)


def test_filter_cap_is_the_conversion_backwards() -> None:
    order = filter_order(1.0, 1e-5)
    assert rdp_to_epsilon(filter_cap(1.0, 1e-5), order, 1e-5) == pytest.approx(1.0, rel=1e-12)
    # By hand: log(1 - 1/18) - log(18e-5) / 17 = -0.05716 + 0.50722
    assert order == 18
    assert filter_cap(1.0, 1e-5) == pytest.approx(1.0 - (-0.057158 + 0.507213), abs=1e-5)


def test_filter_order_leaves_most_room_for_gaussian_releases() -> None:
    for epsilon, delta in [(0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-5)]:
        chosen = filter_order(epsilon, delta)
        room = {order: (epsilon - epsilon_offset(order, delta)) / order for order in RDP_ORDERS}
        assert room[chosen] == max(room.values())


def test_filter_order_for_planned_runs_leaves_more_room_for_them() -> None:
    planned = [sampled_gaussian(0.6, 0.005, count=100)]
    order = filter_order(1.0, 1e-5, planned)
    assert filter_share_spent(planned, 1.0, 1e-5, order) < filter_share_spent(planned, 1.0, 1e-5)


@given(asked=st.lists(events, min_size=1, max_size=6), epsilon=st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=25)
def test_filter_never_lets_the_composition_pass_the_limit(asked: list[PrivacyEvent], epsilon: float) -> None:
    spent: list[PrivacyEvent] = []
    for event in asked:
        if filter_allows(spent, [event], epsilon, 1e-5):
            spent.append(event)
    assert epsilon_pld(spent, 1e-5) <= epsilon
    assert filter_epsilon_spent(spent, epsilon, 1e-5) <= epsilon


def test_filter_admits_a_first_run_that_uses_all_and_nothing_after_it() -> None:
    sigma = calibrate_noise_multiplier(1.0, 1e-4, 0.08, 50)
    run = [sampled_gaussian(sigma, 0.08, count=50)]
    assert filter_allows([], run, 1.0, 1e-4)
    assert not filter_allows(run, [gaussian(1e6)], 1.0, 1e-4)
    assert not filter_allows([gaussian(1e6)], run, 1.0, 1e-4)  # no longer the first
    assert filter_epsilon_spent(run, 1.0, 1e-4) <= 1.0


def test_filter_admits_many_small_runs_up_to_its_cap_and_then_none() -> None:
    order, spent = filter_order(1.0, 1e-5), []
    each = gaussian(20.0)
    while filter_allows(spent, [each], 1.0, 1e-5):
        spent.append(each)
    # order / (2 · 400) each
    assert len(spent) == math.floor(filter_cap(1.0, 1e-5) / (order / 800.0))
    assert filter_share_spent(spent, 1.0, 1e-5) <= 1.0 < filter_share_spent([*spent, each], 1.0, 1e-5)
    assert epsilon_pld(spent, 1e-5) <= 1.0


def test_filter_refuses_no_noise_and_allows_nothing_asked() -> None:
    assert not filter_allows([], [gaussian(0.0)], 100.0, 1e-5)
    assert filter_allows([gaussian(0.0)], [], 1.0, 1e-5)
    assert filter_share_spent([gaussian(0.0)], 1.0, 1e-5) == math.inf
    assert filter_share_spent([], 1.0, 1e-5) == 0.0
    assert filter_epsilon_spent([], 1.0, 1e-5) == 0.0


def test_filter_epsilon_spent_grows_with_every_event() -> None:
    spent = [filter_epsilon_spent([gaussian(20.0, count=count)], 4.0, 1e-5) for count in (1, 5, 20, 60)]
    assert spent == sorted(spent)
    assert spent[0] > 0.0
    assert spent[-1] < 4.0


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)]
)
def test_filter_refuses_limits_out_of_range(epsilon: float, delta: float) -> None:
    with pytest.raises(ConfigError):
        filter_allows([], [gaussian(1.0)], epsilon, delta)
    with pytest.raises(ConfigError):
        filter_allows([], [], epsilon, delta)
    with pytest.raises(ConfigError):
        filter_epsilon_spent([], epsilon, delta)

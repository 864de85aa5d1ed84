"""How many sites may fail or collude: thresholds, shares of noise, and ε against each adversary."""

from __future__ import annotations

import math

import pytest

from common.config.privacy import PrivacyConfig
from common.errors import ConfigError
from common.privacy.composition import epsilon_pld
from common.privacy.events import gaussian, sampled_gaussian
from common.secagg.assumptions import Assumptions, charged_events, local_events


@pytest.mark.parametrize(("sites", "each"), [(4, 1), (10, 1), (19, 1), (20, 2), (50, 5), (200, 20)])
def test_default_is_a_tenth_of_the_sites_and_at_least_one(sites: int, each: int) -> None:
    found = PrivacyConfig().assumptions(sites)
    assert (found.dropouts, found.colluders) == (each, each)


def test_settings_override_the_default() -> None:
    assert PrivacyConfig(dropouts=3, colluders=0).assumptions(10) == Assumptions(10, 3, 0)


@pytest.mark.parametrize(("sites", "dropouts", "colluders"), [(10, 1, 1), (10, 2, 2), (20, 2, 2), (50, 5, 5)])
def test_share_is_that_of_the_sites_left(sites: int, dropouts: int, colluders: int) -> None:
    """m - d - c shares make the whole noise."""
    found = Assumptions(sites, dropouts, colluders)
    assert found.honest_shares == sites - dropouts - colluders
    assert found.honest_shares * found.share**2 == pytest.approx(1.0)
    assert found.threshold == sites - dropouts > sites / 2


@pytest.mark.parametrize("sites", range(4, 120, 5))
def test_honest_shares_hold_against_lists_that_differ(sites: int) -> None:
    """Every way in which a lying server may spread its omissions: never fewer honest sites than assumed."""
    for dropouts in range(sites // 3):
        for colluders in range(sites - 2 * dropouts - 1):
            try:
                found = Assumptions(sites, dropouts, colluders)
            except ConfigError:
                continue
            least = math.inf
            for absent in range(dropouts + 1):  # missing before the masked sums, as all agree
                honest = sites - absent - colluders
                help_needed = found.threshold - colluders
                struck = min(honest, (dropouts - absent) * honest // help_needed)
                least = min(least, honest - struck)
            assert found.honest_shares <= least
            assert 2 * found.threshold > sites + colluders  # never both secrets of one site


@pytest.mark.parametrize(
    ("sites", "dropouts", "colluders"),
    [(3, 1, 1), (2, 1, 0), (1, 0, 0), (10, 5, 0), (10, 0, 9), (10, -1, 1), (4, 1, 2)],
)
def test_too_few_sites_are_refused(sites: int, dropouts: int, colluders: int) -> None:
    with pytest.raises(ConfigError):
        Assumptions(sites, dropouts, colluders)


def test_local_epsilon_is_that_of_one_share() -> None:
    events = (gaussian(8.0), sampled_gaussian(6.0, 0.5, count=4))
    expected = [gaussian(8.0 / math.sqrt(8)), sampled_gaussian(6.0 / math.sqrt(8), 0.5, count=4)]
    found = local_events(events, Assumptions(10, 1, 1))
    assert epsilon_pld(found, 1e-5) == pytest.approx(epsilon_pld(expected, 1e-5), rel=1e-6)
    assert epsilon_pld(found, 1e-5) > epsilon_pld(events, 1e-5)


def test_site_that_fears_more_colluders_is_charged_more() -> None:
    events, run = (gaussian(5.0),), Assumptions(10, 1, 1)
    assert charged_events(events, run, 1) == events
    (charged,) = charged_events(events, run, 4)
    # 10 - 1 - 4 of the 8 shares are left
    assert charged.noise_multiplier == pytest.approx(5.0 * math.sqrt(5 / 8))
    with pytest.raises(ConfigError):
        charged_events(events, run, 8)

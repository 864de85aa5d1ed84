"""Composition across runs whose settings were chosen after seeing earlier results: a Rényi privacy filter.

Accountants that add up privacy losses assume that all releases were declared in advance. A site's later runs
are not: somebody looked at the first synthetic set before asking for a second. A *filter* fixes the limit
first and refuses whatever would pass it; the whole is then (ε, δ)-private however the releases were chosen.
Ours caps the Rényi divergence at one order, which is fixed by the public limits (ε, δ) alone and never by
what was released.

One exception, itself decided before anything was released: the *first* declared block of events at a site is
admitted if its privacy loss distribution is within the limit, even where the looser Rényi sum is not. The
filter's cap is then passed already, and everything later is refused.

Neighbouring relation: add or remove one unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from common.privacy.composition import (
    RDP_ORDERS,
    check_delta,
    check_epsilon,
    epsilon_from_rdp,
    epsilon_offset,
    epsilon_pld,
    rdp_at_order,
    rdp_curve,
)
from common.privacy.events import PrivacyEvent, mechanism_counts


def filter_order(epsilon_limit: float, delta: float, planned_events: Iterable[PrivacyEvent] = ()) -> int:
    """The order at which the filter caps, fixed before the first release: where most releases fit.

    Args:
        epsilon_limit: the site's lifetime ε, positive.
        delta: the site's lifetime δ in (0, 1).
        planned_events: releases of the kind that the site expects; none means plain Gaussian releases. Rare
            sampling with little noise wants a lower order. A caller who passes them keeps the resulting order
            with the limits: it must never be chosen again after a release.

    Returns:
        An order of `RDP_ORDERS`, a function of public values only.

    Raises:
        ConfigError: a limit out of range.
    """
    check_epsilon(epsilon_limit)
    check_delta(delta)
    planned = mechanism_counts(planned_events)

    def room(order: int) -> float:
        # How many times the planned releases fit; a plain Gaussian's divergence is proportional to the order.
        cost = rdp_at_order(planned, order) if planned else float(order)
        return (epsilon_limit - epsilon_offset(order, delta)) / cost

    return max(RDP_ORDERS, key=room)


def filter_cap(epsilon_limit: float, delta: float, order: int | None = None) -> float:
    """The Rényi divergence that may be spent in all at `order`, or at the limits' `filter_order`; >= 0."""
    at = filter_order(epsilon_limit, delta) if order is None else order
    return max(0.0, epsilon_limit - epsilon_offset(at, delta))


def filter_allows(
    spent_events: Iterable[PrivacyEvent],
    new_events: Iterable[PrivacyEvent],
    epsilon_limit: float,
    delta: float,
    order: int | None = None,
) -> bool:
    """Whether the new events may be released after the spent ones, however they were chosen.

    Args:
        spent_events: everything ever reserved or released at the site.
        new_events: the *whole* run that is asked for, declared before its first release.
        epsilon_limit: the site's lifetime ε, fixed before the first release.
        delta: the site's lifetime δ, fixed before the first release.
        order: the filter's order, fixed before the first release; None takes `filter_order` of the limits.

    Returns:
        True if all releases together stay (ε, δ)-private for adding or removing one unit, under adaptive
        choice.

    Raises:
        ConfigError: a limit out of range.

    Source: Feldman and Zrnic 2021, theorem 4.3; Lécuyer 2021; Whitehouse et al. 2023.
    Departs: a first block that fits by its privacy loss distribution is admitted too (module docstring).
    """
    spent, new = tuple(spent_events), tuple(new_events)
    at = filter_order(epsilon_limit, delta) if order is None else order
    cap = filter_cap(epsilon_limit, delta, at)
    if not new:
        return True
    if rdp_at_order(mechanism_counts(spent + new), at) <= cap:
        return True
    return not spent and epsilon_pld(new, delta) <= epsilon_limit


def filter_share_spent(
    events: Iterable[PrivacyEvent], epsilon_limit: float, delta: float, order: int | None = None
) -> float:
    """Share of the filter's cap that the events use: 0 untouched, 1 all; infinity where there is no room."""
    at = filter_order(epsilon_limit, delta) if order is None else order
    divergence = rdp_at_order(mechanism_counts(events), at)
    if divergence == 0.0:
        return 0.0
    cap = filter_cap(epsilon_limit, delta, at)
    return math.inf if cap == 0.0 else divergence / cap


def filter_epsilon_spent(events: Iterable[PrivacyEvent], epsilon_limit: float, delta: float) -> float:
    """ε that the events would have as one declared block: what a person is shown beside the limit.

    The guarantee under adaptive choice is the limit itself; `filter_share_spent` is the meter that the
    filter goes by.

    Args:
        events: everything spent.
        epsilon_limit: the site's lifetime ε.
        delta: the site's lifetime δ.

    Returns:
        ε >= 0 for adding or removing one unit, by RDP; by PLD where RDP passes the limit.

    Raises:
        ConfigError: a limit out of range.
    """
    check_epsilon(epsilon_limit)
    check_delta(delta)
    spent = tuple(events)
    if not spent:
        return 0.0
    epsilon = epsilon_from_rdp(rdp_curve(spent), delta)
    return epsilon if epsilon <= epsilon_limit else min(epsilon, epsilon_pld(spent, delta))

"""How many sites may fail and how many may collude, and what follows: threshold, noise share, accounting.

With m sites, up to d of them missing and up to c of them telling the server all they know:

- A secret is shared among the sites so that t = m - d of them rebuild it; as many must send their sums. A site gives
  the server a share of one secret of each other site, never of both, so two secrets of one site can't be rebuilt while
  2 t > m + c (the colluders alone would give both). Hence m > 2 d + c.
- The server sees no sum of fewer than `honest_shares` honest sites, so each adds noise of variance
  sigma^2 S^2 / honest_shares. With a server that tells all sites the same list of survivors that is m - d - c. One that
  tells each another list makes a site count as missing only with the help of t - c honest ones, each of which lets at
  most d sites be missing; counting those gives m - c - floor(d (m - c) / (m - d - c)), which is m - d - c as long as
  d^2 < m - d - c, and the number used here.

Neighbouring relation throughout: add or remove one unit at one site.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from common.errors import ConfigError
from common.privacy.events import PrivacyEvent


@dataclass(frozen=True)
class Assumptions:
    """What a run assumes of its sites.

    Attributes:
        num_sites: m, the sites of the run.
        dropouts: d, how many may be missing from a round or lie in it, in all phases together.
        colluders: c, how many may work with the server.

    Raises:
        ConfigError: negative numbers, or fewer sites than m > 2 d + c.
    """

    num_sites: int
    dropouts: int
    colluders: int

    def __post_init__(self) -> None:
        """Refuse numbers under which a single site's secrets could be rebuilt."""
        if self.dropouts < 0 or self.colluders < 0:
            raise ConfigError(f"dropouts and colluders must be at least 0, found {self.dropouts} and {self.colluders}")
        least = max(2 * self.dropouts + self.colluders + 1, 2)
        if self.num_sites < least or self.honest_shares < 2:
            raise ConfigError(
                f"trust secagg with {self.dropouts} dropouts and {self.colluders} colluders needs at least "
                f"{max(least, self.colluders + 2)} sites, found {self.num_sites}: add sites, lower dropouts or "
                "colluders, or set trust to local"
            )

    @classmethod
    def of(cls, num_sites: int, dropouts: int, colluders: int) -> Assumptions:
        """The assumptions of a run's settings; a negative number stands for max(1, m // 10)."""
        default = max(1, num_sites // 10)
        return cls(num_sites, default if dropouts < 0 else dropouts, default if colluders < 0 else colluders)

    @property
    def threshold(self) -> int:
        """t = m - d: sites whose sums must be there, and shares that rebuild a secret; above half of the sites."""
        return self.num_sites - self.dropouts

    @property
    def honest_shares(self) -> int:
        """Shares of noise in whatever sum the server can learn that none of the colluders knows."""
        honest = self.num_sites - self.colluders
        return honest - self.dropouts * honest // max(honest - self.dropouts, 1)

    @property
    def share(self) -> float:
        """One site's noise over the whole noise, as standard deviations: 1 / sqrt(honest_shares)."""
        return 1.0 / math.sqrt(self.honest_shares)


def local_events(events: Iterable[PrivacyEvent], assumptions: Assumptions) -> tuple[PrivacyEvent, ...]:
    """The events as a server sees them that broke the protocol and reads each site's own vector: its share of noise."""
    return _scaled(events, assumptions.share)


def charged_events(
    events: Iterable[PrivacyEvent], run: Assumptions, least_colluders: int = 0
) -> tuple[PrivacyEvent, ...]:
    """What a site's ledger is charged: the run's events, or worse ones where the site fears more colluders.

    Args:
        events: of the run, with the noise of the whole sum.
        run: what the run assumes.
        least_colluders: how many colluders the site's policy assumes at least.

    Returns:
        The events, with less noise where `least_colluders` is above the run's number: some of the shares are then known
        to the server. Against the server and outsiders, for adding or removing one unit.

    Raises:
        ConfigError: with so many colluders the protocol hides nothing.
    """
    if least_colluders <= run.colluders:
        return tuple(events)
    feared = replace(run, colluders=least_colluders)
    return _scaled(events, math.sqrt(feared.honest_shares / run.honest_shares))


def _scaled(events: Iterable[PrivacyEvent], factor: float) -> tuple[PrivacyEvent, ...]:
    # rounded down: never more noise than there is
    factor *= 1.0 - 1e-12
    return tuple(replace(event, noise_multiplier=event.noise_multiplier * factor) for event in events)

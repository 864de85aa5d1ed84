"""Who is left out when sites say of each other that what came can't be used, and the server can't see who lies.

A box opens for its receiver alone: that it does not is the receiver's word against the sender's. One of the two lies
(or what lies between them is broken), so one of the two has to go for the sum to come about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

Dispute = tuple[int, int]
"""(who refuses, whose card or box it refuses)."""


def to_leave_out(disputes: Iterable[Dispute]) -> list[int]:
    """Sites without which no dispute is left, few of them: the site that is in most goes first, of equals the accused.

    A site that lies to all is in a dispute with each and goes by itself, as does one that slanders all. Where one
    stands against one, nobody can tell: the accused goes, in this run and no further.
    """
    left, gone = set(disputes), []
    while left:
        among, accused = Counter(site for pair in left for site in pair), Counter(pair[1] for pair in left)
        gone.append(max(among, key=lambda site: (among[site], accused[site], -site)))
        left = {pair for pair in left if gone[-1] not in pair}
    return gone


def partners(disputes: Iterable[Dispute], site: int) -> set[int]:
    """Who is in a dispute with a site: more of them than collude, and it is that site that lies."""
    return {other for pair in disputes if site in pair for other in pair if other != site}

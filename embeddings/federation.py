"""The check before a run: do the sites' embeddings mean the same?"""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import FederationError
from embeddings.canary import compare_canaries, decode
from embeddings.identity import Mismatch, compare
from embeddings.sets import SetMetadata


def check_sites(sites: Mapping[str, SetMetadata]) -> tuple[Mismatch, ...]:
    """Compare what sites know of their sets: encoder, classes and canary; no counts.

    Args:
        sites: site name -> its set's metadata.

    Returns:
        One `Mismatch` per site and field; empty when the sites agree. Sites without a canary (imported sets)
        are compared by identity alone.

    Raises:
        DataError: no sites, or a canary that can't be read.
    """
    found = compare({site: metadata.identity for site, metadata in sites.items()})
    canaries = {site: decode(metadata.canary) for site, metadata in sites.items() if metadata.canary}
    if found or len(canaries) < 2:
        return found
    precision = next(iter(sites.values())).identity.precision
    return compare_canaries(canaries, precision)


def require_agreement(sites: Mapping[str, SetMetadata]) -> None:
    """Refuse to go on when sites differ; raises `FederationError` naming each site and field."""
    found = check_sites(sites)
    if found:
        raise FederationError("the sites' embeddings differ: " + "; ".join(str(mismatch) for mismatch in found))

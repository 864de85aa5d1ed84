"""What a run whose noise is shared says of it: who is assumed to do what, and what is left if they do otherwise."""

from __future__ import annotations

import math
from typing import Any

from common.methods.base import RunContext
from common.methods.shared_sums import assumptions_of
from common.privacy.composition import epsilon_pld
from common.secagg.assumptions import local_events

_PROTOCOL = (
    "Bonawitz et al. (2017) with per-round keys signed by each site's registered key and checked against the list that "
    "each site pinned (X25519, HKDF, AES-256-GCM, ChaCha20, ECDSA P-384, Shamir's secret sharing)."
)
_NOISE = (
    "Each site rounds its clipped sum to integers at random, which widens its sensitivity by 2^-10 of it (charged), "
    "and adds normal noise rounded to integers. The sum of the shares is the Gaussian mechanism with rounding after "
    "it, but for less than 1e-100 in total variation; sums wrap around with a probability below 1e-20."
)
_LOCAL = (
    "Against a server that breaks the protocol, by more colluding sites than assumed or by breaking its cryptography, "
    "a site's own share of the noise alone remains: epsilon_of_own_share. A sum that was masked and never unmasked is "
    "charged all the same."
)


def shared_noise_facts(context: RunContext) -> dict[str, Any] | None:
    """The part of a privacy statement that is about secure aggregation; None under trust `local`.

    Args:
        context: the run's public context.

    Returns:
        JSON-ready. `epsilon_of_own_share` is for adding or removing one unit at the run's delta: what remains of the
        protection against a server that reads a site's single vector.
    """
    if context.config.privacy.trust != "secagg":
        return None
    assumed = assumptions_of(context)
    epsilon = epsilon_pld(local_events(context.plan.all_events, assumed), context.plan.delta)
    return {
        "protocol": _PROTOCOL,
        "sites": assumed.num_sites,
        "dropouts_borne": assumed.dropouts,
        "colluders_assumed": assumed.colluders,
        "sites_needed": assumed.threshold,
        "honest_shares": assumed.honest_shares,
        "noise": _NOISE,
        "epsilon_of_own_share": epsilon if math.isfinite(epsilon) else None,
        "in_words": _LOCAL,
    }

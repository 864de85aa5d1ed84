"""Settings that runs had once: what each one did is said by the line that refuses it."""

from __future__ import annotations

_UNIT = "every embedding is scaled to unit length, always"
_FILLED = 'set prototypes = false for the decoder\'s own rows; "true" fills rows up and shows 2 % of them bare'
_PRINTED = "printed-rows draws rows by Eqs. 12 and 13 as printed"

REMOVED = {
    "cache-dir": "the environment variable FEDHYPEVAE_CACHE names the cache of the demonstration's embeddings",
    "sites-dir": "simulated sites keep their files in the folder sites of output-dir",
    "sphere": _UNIT,
    "embedding-radius": _UNIT,
    "centre": "the released mean is subtracted, always",
    "class-presence": "a site's sums count by how likely it has a class, always, under trust local",
    "placement": "classes move to their released means, always",
    "relabel": "a row has the class that the generator finds likeliest, always",
    "relabel-temperature": "a row has the class that the generator finds likeliest, always",
    "keep-balance": "`fedhypevae synthesize` draws each class until it has its number",
    "init-seed": "nothing ever read it: seed starts the parameters",
    "unit-rows": _FILLED,
    "prototype-share": _FILLED,
    "prototype-spread": _FILLED,
    "mmd-features": "64 random features are a constant of common/generator",
    "mmd-bandwidths": "the kernels' bandwidths 0.5, 1 and 2 are a constant of common/generator",
    "mixture": _PRINTED,
    "latent-law": _PRINTED,
    "kl-weight": "the evidence lower bound has the weight elbo-weight as a whole",
    "mixing": "half a site's own head and half the published one; `fedhypevae evaluate --mixing` takes another share",
    "head-scale": "a published head's logits are scaled by 0.35 before it is mixed, a constant of common/evaluation",
    "wire-bits": "numbers travel as they are, in 32 bits",
}
"""Removed key -> what holds now, or what to set in its place."""

"""What the server holds of a round's uploads: only their sum, where nothing else matters.

Ten thousand sites then take no more memory at the server than ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from common.methods.base import Method, RunContext, ServerState, Tensors


class SummedUploads(MutableMapping[int, Tensors]):
    """Uploads by site index, added up as they come: each site is then read as an equal part of the sum.

    The sum is kept in float64. A site's upload is taken once, and can't be taken back.

    Args:
        weights: by what uploads are multiplied: tensors (num_sites, ...) by name. A name that is not there, and a site
            beyond them, which joined later, has weight 1.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        self._weights = weights or {}
        self._total: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._sites: set[int] = set()

    def __setitem__(self, site: int, tensors: Tensors) -> None:
        """Add a site's upload (ValueError if it was added before)."""
        if site in self._sites:
            raise ValueError(f"expected one upload of each site, found a second one of site {site}")
        for name, value in tensors.items():
            self._dtypes[name] = value.dtype
            weights = self._weights.get(name)
            weighed = value if weights is None or site >= len(weights) else value * weights[site].to(torch.float64)
            if name in self._total:
                self._total[name] += weighed
            else:
                self._total[name] = weighed.to(torch.float64, copy=True)
        self._sites.add(site)

    def __getitem__(self, site: int) -> Tensors:
        """An equal part of the sum."""
        if site not in self._sites:
            raise KeyError(site)
        return {name: (value / len(self)).to(self._dtypes[name]) for name, value in self._total.items()}

    def __delitem__(self, site: int) -> None:
        raise TypeError("an upload that was added can't be taken out of the sum again")

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._sites))

    def __len__(self) -> int:
        return len(self._sites)

    def total(self, name: str) -> Tensor:
        """The sum of one tensor over the sites."""
        return self._total[name].to(self._dtypes[name])


def gather(method: Method, context: RunContext, state: ServerState) -> MutableMapping[int, Tensors]:
    """An empty round's uploads, as the method needs them: their sum where only that matters, else each by itself."""
    if not (method.shares_noise and method.uploads_sums):
        return {}
    return SummedUploads(None if method.upload_weights is None else method.upload_weights(context, state))


def summed(uploads: Mapping[int, Tensors], name: str) -> Tensor:
    """The sum over sites of one uploaded tensor, without a copy of them all side by side."""
    if isinstance(uploads, SummedUploads):
        return uploads.total(name)
    sites = sorted(uploads)
    total = uploads[sites[0]][name].clone()
    for site in sites[1:]:
        total += uploads[site][name]
    return total

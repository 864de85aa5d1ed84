"""What the server holds of a round's uploads: only their sum, where nothing else matters.

Ten thousand sites then take no more memory at the server than ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from common.methods.base import Method, Tensors


class SummedUploads(MutableMapping[int, Tensors]):
    """Uploads by site index, added up as they come: each site is then read as an equal part of the sum.

    The sum is kept in float64. A site's upload is taken once, and can't be taken back.
    """

    def __init__(self) -> None:
        self._total: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._sites: set[int] = set()

    def __setitem__(self, site: int, tensors: Tensors) -> None:
        """Add a site's upload (ValueError if it was added before)."""
        if site in self._sites:
            raise ValueError(f"expected one upload of each site, found a second one of site {site}")
        for name, value in tensors.items():
            self._dtypes[name] = value.dtype
            if name in self._total:
                self._total[name] += value
            else:
                self._total[name] = value.to(torch.float64, copy=True)
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


def gather(method: Method) -> MutableMapping[int, Tensors]:
    """An empty round's uploads, as the method needs them: their sum where only that matters, else each by itself."""
    return SummedUploads() if method.shares_noise and method.uploads_sums else {}


def summed(uploads: Mapping[int, Tensors], name: str) -> Tensor:
    """The sum over sites of one uploaded tensor, without a copy of them all side by side."""
    if isinstance(uploads, SummedUploads):
        return uploads.total(name)
    sites = sorted(uploads)
    total = uploads[sites[0]][name].clone()
    for site in sites[1:]:
        total += uploads[site][name]
    return total

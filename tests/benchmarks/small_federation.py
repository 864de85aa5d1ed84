"""A federation on which a method of the comparison runs in a moment."""

from __future__ import annotations

import torch

from benchmarks.protocol import BenchmarkSite, Federation
from common.records import SiteData


def small_federation(held_out: str | None = None, seed: int = 7, num_sites: int = 3) -> Federation:
    """Three classes in eight dimensions, sites with 60 training rows each."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)

    def rows(count: int) -> SiteData:
        labels = torch.arange(count) % 3
        noisy = centres[labels] + 0.2 * torch.randn(count, 8, generator=generator)
        return SiteData(torch.nn.functional.normalize(noisy, dim=1), labels)

    sites = tuple(BenchmarkSite(f"site-{at}", rows(60), rows(12), rows(30)) for at in range(num_sites))
    return Federation("organ-iid", seed, ("a", "b", "c"), sites, held_out)

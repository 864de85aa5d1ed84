"""What audits attack: a run with one site, and made-up records."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import Method, Problem, RunContext
from common.records import SiteData


def audited_run(config: RunConfig, dim: int, num_classes: int, units: int) -> tuple[Method, RunContext]:
    """The run with one site, whose number of units is public here, without the sleep phase, which reads no record."""
    config = config.replace(num_sites=1, min_sites=1, sleep_steps=0, public_total=max(units, 1))
    method = get_method(config.method)
    task = config.federation.task
    names = tuple(f"class-{index}" for index in range(num_classes + (task == "ordinal")))
    problem = Problem(dim, names, 1, task=task)
    return method, RunContext(config, problem, method.plan(config))


def canary_records(count: int, dim: int, num_classes: int, seed: int, *, findings: bool = False) -> SiteData:
    """Made-up records with nearly orthogonal gradients: axes of a random rotation, labels in turn; each a group.

    Of findings each record has one, and all are known.
    """
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    index = torch.arange(count)
    labels = (index + index // dim) % num_classes
    if findings:
        labels = functional.one_hot(labels, num_classes).to(torch.int8)
    return SiteData(axes[index % dim].contiguous(), labels, index)


def some_records(records: SiteData, rows: list[int]) -> SiteData:
    """The records in these rows."""
    index = torch.tensor(rows, dtype=torch.long)
    groups = None if records.groups is None else records.groups[index]
    return replace(records, embeddings=records.embeddings[index], labels=records.labels[index], groups=groups)

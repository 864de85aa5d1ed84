"""Rows of a law or of a small generator, for the tests of what is drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.evaluation.scores import Split
from common.generator.hypernetwork import GeneratorShape
from common.generator.layers import Tensors
from common.generator.meta_code import MetaCodes
from common.generator.row_law import RowDrawer, RowLaw
from common.generator.row_numbers import row_key
from common.generator.rows import RowSettings, generator_law


def rows_of(law: RowLaw, labels: Tensor, seed: int = 0, tries: int = 1) -> Split:
    """Rows 0..n-1 with the wanted labels."""
    return RowDrawer(law, row_key("test", seed), tries).draw(np.arange(len(labels)), labels)


def generator_rows(
    shape: GeneratorShape,
    params: Tensors,
    meta: MetaCodes,
    labels: Tensor,
    seed: int = 0,
    *,
    centre: Tensor | None = None,
    placement: Tensor | None = None,
    prototypes: Tensor | None = None,
    relabel: bool = False,
    **settings: Any,
) -> Split:
    """Rows of a generator, around 0 unless a centre is given; with the wanted labels, or those of its posterior."""
    origin = torch.zeros(shape.dim) if centre is None else centre
    law = generator_law(
        shape, params, meta, RowSettings(**settings), centre=origin, placement=placement, prototypes=prototypes
    )
    return rows_of(law if relabel else replace(law, heads=()), labels, seed)

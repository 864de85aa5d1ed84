"""Rows with findings: how often the generator's own posterior may find each. Post-processing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.evaluation.heads import LinearHead
from common.generator.label_tree import LabelTree
from common.generator.row_law import RowDrawer, RowLaw
from common.generator.row_numbers import row_key

OFFSETS = "labels.offsets"
"""Name of what is added to the posterior's scores, among what is published."""
_ROWS = 2**13  # a prevalence of 1 % then errs by a tenth of it


def score_offsets(law: RowLaw, tree: LabelTree) -> Tensor:
    """What brings the share of rows whose posterior finds each finding to its prevalence: (K,) float32.

    A row gets the findings whose score is above 0. The scores alone place its boundary badly: each is trained by
    itself, and their noise makes them too sure. How often a finding occurs is released, so that the share of rows with
    it is right by construction, and the order of rows by their score is kept.

    Args:
        law: of the rows; the order of its heads' scores is all that is used.
        tree: whose label vectors rows are drawn for.
    """
    numbers = np.arange(_ROWS)
    wanted = tree.draw("offsets", 0, torch.from_numpy(numbers))
    scores = RowDrawer(law, row_key("offsets", 0), 1).scores(numbers, wanted).sort(0).values
    above = (tree.prevalence * _ROWS).round().long().clamp(0, _ROWS - 1)
    at = _ROWS - above  # so many rows lie above the middle between the two rows there
    columns = torch.arange(scores.shape[1])
    upper, lower = scores[at.clamp(max=_ROWS - 1), columns], scores[at - 1, columns]
    middle = torch.where(above == 0, scores[-1] + 1e-6, 0.5 * (upper + lower))
    return (-middle).float()


def with_offsets(law: RowLaw, offsets: Tensor) -> RowLaw:
    """The law with these numbers added to the scores of every head."""
    return replace(law, heads=[LinearHead(head.weight, head.bias + offsets.double()) for head in law.heads])

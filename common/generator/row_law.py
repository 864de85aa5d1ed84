"""What synthetic rows are drawn from, and how: each row a function of the seed and its own number alone.

Every method's rows have one form, x = middle + scale * root e with e standard normal, and class scores that are linear
in x. A row makes tries of its own until the posterior gives it the class that it should have. What the posterior can
tell of the noise e lies in the span of the K score columns, so that a try draws K numbers of the noise, and the rest of
it is drawn once, for the try that is taken. All of it is float64, and becomes float32 in one place; all of it is
post-processing of released values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import FedHypeVAEError
from common.evaluation.heads import LinearHead
from common.evaluation.scores import Split
from common.generator.row_numbers import normals, row_words, uniforms
from common.names import Task

_NOISE = 0  # a row's stream of noise; its tries follow
_LEAST_STRENGTH = 1e-6  # of a score column beside the strongest, below which a direction says nothing of the class


@dataclass(frozen=True)
class Middle:
    """Where rows lie but for their noise.

    Attributes:
        means: (n, d).
        scale: (n, 1), standard deviation of the noise before the law's root.
        head: (n,) which of the law's heads reads a row.
    """

    means: Tensor
    scale: Tensor
    head: Tensor


@dataclass(frozen=True)
class RowLaw:
    """The law of a generator's rows, float64 throughout.

    Attributes:
        dim: d.
        num_uniforms: numbers between 0 and 1 that `middle` reads for a try.
        num_normals: standard normal numbers that it reads for a try.
        middle: (labels (n,), uniforms (n, .), normals (n, .)) -> where rows of those labels lie.
        heads: the generator's own posterior, whose likeliest class a row has, or all findings with a score above 0;
            empty where rows keep the label that was asked for.
        root: (d, d) of the noise's covariance; None: the identity.
        noisy: whether there is noise at all.
        task: what the labels of rows are. Rows of a task that is not `multiclass` are asked for by their findings,
            (n, K) int8; grades come out as such.
    """

    dim: int
    num_uniforms: int
    num_normals: int
    middle: Callable[[Tensor, Tensor, Tensor], Middle]
    heads: Sequence[LinearHead] = ()
    root: Tensor | None = None
    noisy: bool = True
    task: Task = "multiclass"


class RowDrawer:
    """Draws rows of a law.

    Args:
        law: what rows are drawn from.
        key: of the set, from `row_numbers.row_key`.
        tries: how often a row is tried at most, until the posterior gives it the class that was asked for; 1: rows are
            taken as they come, with the class that the posterior gives them.
    """

    def __init__(self, law: RowLaw, key: int, tries: int) -> None:
        self._law, self._key, self._tries = law, key, tries
        self._spans = [_span(law, head) for head in law.heads]
        classes = len(law.heads[0].bias) if law.heads else 0
        self._words = law.num_uniforms + law.num_normals + classes
        self._classes = classes

    def draw(self, rows: NDArray[np.int64], wanted: Tensor, nudge: float = 0.0) -> Split:
        """Rows by their numbers.

        Args:
            rows: (n,) numbers within the set, ascending.
            wanted: (n,) class that each row should have, or (n, K) findings.
            nudge: added to class k's score k + 1 times: shows what a row would be if a score on the border between two
                classes fell on the other side, as rounding may let it on another machine.

        Returns:
            embeddings (n, d) float32, labels as `wanted`, but grades (n,) int64. A row has the wanted labels, or, where
            no try gave them, those of the last try.
        """
        law = self._law
        means, scale, head, labels, judged = self._try(rows, wanted, 0, nudge)
        left = torch.nonzero(~_agree(labels, wanted))[:, 0]
        for attempt in range(1, self._tries if law.heads else 1):
            if len(left) == 0:
                break
            tried = self._try(rows[left.numpy()], wanted[left], attempt, nudge)
            taken = _agree(tried[3], wanted[left])
            if attempt == self._tries - 1:
                taken = torch.ones_like(taken)  # the last try stands, whatever it gave
            for of_rows, found in zip((means, scale, head, labels, judged), tried, strict=True):
                of_rows[left[taken]] = found[taken]
            left = left[~taken]
        if law.noisy:
            means.addcmul_(scale, self._noise(rows, head, judged))
        if law.task == "ordinal":
            labels = labels.sum(1)
        return means.float(), labels  # the one place where float64 becomes float32

    def scores(self, rows: NDArray[np.int64], wanted: Tensor) -> Tensor:
        """Scores of rows at their first try, (n, K) float64: args as `draw`."""
        tried, judged = self._drawn(rows, wanted, 0)
        return self._scores(tried, judged)

    def _try(
        self, rows: NDArray[np.int64], wanted: Tensor, attempt: int, nudge: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One try of each row: means, scale, head and label, and the part of the noise that the scores saw."""
        tried, judged = self._drawn(rows, wanted, attempt)
        if not self._law.heads:
            return tried.means, tried.scale, tried.head, wanted.clone(), judged
        scores = self._scores(tried, judged) + nudge * torch.arange(1, self._classes + 1)
        if self._law.task == "multiclass":
            labels = torch.from_numpy(scores.numpy().argmax(1))
        else:
            labels = (scores > 0).to(torch.int8)
        return tried.means, tried.scale, tried.head, labels, judged

    def _drawn(self, rows: NDArray[np.int64], wanted: Tensor, attempt: int) -> tuple[Middle, Tensor]:
        """A try's rows without their noise, and the part of the noise that the scores see."""
        law = self._law
        words = row_words(self._key, rows, self._words, _NOISE + 1 + attempt)
        of_middle, words = np.split(words, [law.num_uniforms + law.num_normals], axis=1)
        uniform, normal = uniforms(of_middle[:, : law.num_uniforms]), normals(of_middle[:, law.num_uniforms :])
        return law.middle(wanted, uniform, normal), normals(words[:, : self._classes])

    def _scores(self, tried: Middle, noise: Tensor) -> Tensor:
        """Class scores of rows with the part of their noise that the scores see: (n, K)."""
        scores = torch.empty_like(noise)
        for index, (head, (_, seen)) in enumerate(zip(self._law.heads, self._spans, strict=True)):
            chosen = _rows_of(tried.head, index, len(self._spans))
            of_means = tried.means[chosen] @ head.weight.T + head.bias
            scores[chosen] = of_means + tried.scale[chosen] * (noise[chosen] @ seen)
        return scores

    def _noise(self, rows: NDArray[np.int64], head: Tensor, judged: Tensor) -> Tensor:
        """Noise before its scale, (n, d): what the tries drew within the span of the scores, and the rest outside."""
        noise = normals(row_words(self._key, rows, self._law.dim, _NOISE))
        for index, (span, _) in enumerate(self._spans):
            chosen = _rows_of(head, index, len(self._spans))
            there = noise[chosen]
            noise[chosen] = there.addmm_(judged[chosen] - there @ span, span.T)
        return noise if self._law.root is None else noise @ self._law.root.T


def _agree(labels: Tensor, wanted: Tensor) -> Tensor:
    """Which rows have the labels that they should have: (n,) bool."""
    same = labels == wanted
    return same if same.ndim == 1 else same.all(1)


def _rows_of(head: Tensor, index: int, heads: int) -> Tensor | slice:
    return slice(None) if heads == 1 else torch.nonzero(head == index)[:, 0]


def _span(law: RowLaw, head: LinearHead) -> tuple[Tensor, Tensor]:
    """The directions of the noise that a head sees: F (d, K) and F^T M (K, K), with M = root^T weight^T.

    F = U V^T of M = U S V^T, over singular values that are not nearly 0: it does not hang on the signs or the rotation
    that a library picks for U and V, and is the same on every machine.
    """
    matrix = head.weight.T if law.root is None else law.root.T @ head.weight.T
    if not bool(matrix.isfinite().all()):
        raise FedHypeVAEError("the generator's values are not finite, so no rows can be drawn: its training diverged")
    left, strengths, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = strengths > _LEAST_STRENGTH * max(float(strengths.max()), math.ulp(0.0))
    span = left[:, kept] @ right[kept]
    return span, span.T @ matrix

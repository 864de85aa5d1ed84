"""Scores of one federation: the Local-only and Centralised rows, and what any global head is worth.

Every head here is fitted to a tolerance (`common.evaluation.heads`), so that no gain owes its size to an undertrained
rival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.protocol import BenchmarkSite, Federation, pooled_training_rows
from common.errors import ConfigError
from common.evaluation.heads import HeadConfig, LinearHead, fine_tune_head, fit_linear_head
from common.evaluation.scores import (
    MIXING,
    SiteScores,
    Split,
    choose_head,
    mean_scores,
    personal_head,
    score,
    score_site,
)
from common.records import SiteData


@dataclass(frozen=True)
class MethodScores:
    """Per site, in the federation's order: a global head alone, mixed with the local one, and fitted further.

    `personalised` is the site's own fit pulled towards the global head, alone; it never leaves the site.
    """

    local_only: tuple[SiteScores, ...]
    synthetic_only: tuple[SiteScores, ...]
    mixed: tuple[SiteScores, ...]
    own_lambda: tuple[SiteScores, ...]
    personalised: tuple[SiteScores, ...]


def split_of(data: SiteData) -> Split:
    """Embeddings and labels of some records."""
    return data.embeddings, data.labels


def local_heads(federation: Federation, config: HeadConfig | None = None) -> tuple[LinearHead, ...]:
    """Each site's own head, fitted on its training rows; fit them once for all methods of a federation."""
    return tuple(
        fit_linear_head(*split_of(site.train), num_classes=federation.num_classes, config=config)
        for site in federation.sites
    )


def alone_heads(federation: Federation, own: Sequence[LinearHead]) -> tuple[LinearHead, ...]:
    """What a site makes of its own records: the Local-only row.

    Each site chooses on its validation rows, as it does where it is given a head, between its own head with the penalty
    of all heads and the fit that `personal_head` makes of a head that says nothing: no personal head then owes its
    score to a better penalty alone.
    """
    _check_count(federation, own)
    heads = []
    for site, fitted in zip(federation.sites, own, strict=True):
        silent = LinearHead(torch.zeros_like(fitted.weight), torch.zeros_like(fitted.bias))
        heads.append(choose_head([fitted, fine_tune_head(silent, *split_of(site.train))], split_of(site.validation)))
    return tuple(heads)


def centralised_head(federation: Federation, config: HeadConfig | None = None) -> LinearHead:
    """The non-private head on the training rows of all sites together."""
    return fit_linear_head(*split_of(pooled_training_rows(federation)), federation.num_classes, config)


def score_heads_at_sites(federation: Federation, heads: Sequence[LinearHead]) -> tuple[SiteScores, ...]:
    """Each site's score of its own entry of `heads`, on the site's test rows."""
    _check_count(federation, heads)
    return tuple(score(head, *split_of(site.test)) for site, head in zip(federation.sites, heads, strict=True))


def score_method(
    federation: Federation,
    global_head: LinearHead,
    local: Sequence[LinearHead],
    mixing: float = MIXING,
) -> MethodScores:
    """All scores that the table gives a method with one global head.

    Args:
        federation: the sites.
        global_head: trained on a synthetic set, or by the method itself.
        local: the sites' own heads, from `local_heads`.
        mixing: λ of `mixed`, in [0, 1].
    """
    _check_count(federation, local)
    tables = [_score_one(site, global_head, own, mixing) for site, own in zip(federation.sites, local, strict=True)]
    return MethodScores(**{name: tuple(table[name] for table in tables) for name in tables[0]})


def as_record(scores: Sequence[SiteScores]) -> dict[str, object]:
    """The means over sites and the values of each, in [0, 1], as `table.json` stores them."""
    mean = mean_scores(list(scores))
    return {
        "accuracy": mean.accuracy,
        "balanced_accuracy": mean.balanced_accuracy,
        "per_site": {
            "accuracy": [one.accuracy for one in scores],
            "balanced_accuracy": [one.balanced_accuracy for one in scores],
        },
    }


def _score_one(
    site: BenchmarkSite,
    global_head: LinearHead,
    own: LinearHead,
    mixing: float,
) -> dict[str, SiteScores]:
    train, validation, test = split_of(site.train), split_of(site.validation), split_of(site.test)
    personal = personal_head(global_head, train, validation)
    scores = score_site(train, validation, test, global_head, mixing, local_head=own)
    return {**scores, "personalised": score(personal, *test)}


def _check_count(federation: Federation, heads: Sequence[LinearHead]) -> None:
    if len(heads) != len(federation.sites):
        raise ConfigError(f"expected one head for each of {len(federation.sites)} sites, found {len(heads)}")

"""What a site should know of its findings before a run: how often, how often unknown, which together, and of whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.readers.classes import remarks_on
from embeddings.store.file import iterate_store, read_metadata
from embeddings.store.sets import EmbeddingSet

_SHOWN = 20
_TABLE = 30  # findings whose pairs one table can hold
_PAIRS = 5


@dataclasses.dataclass(frozen=True)
class FindingFacts:
    """Counts of a multi-label set, by finding.

    `present` and `unknown` (K,) records; `together` (K, K) records that have both; `patients` (K,) patients who have it
    in a record, or None. `a_record` and `a_patient` say how many have 0, 1, 2, ... findings.
    """

    names: tuple[str, ...]
    records: int
    present: NDArray[np.int64]
    unknown: NDArray[np.int64]
    together: NDArray[np.int64]
    patients: NDArray[np.int64] | None
    a_record: tuple[int, ...]
    a_patient: tuple[int, ...]

    def prevalence(self, finding: int) -> str:
        """Share of the records that have a finding, among those in which it is known."""
        return _share(self.present[finding], self.records - self.unknown[finding])

    def lines(self) -> list[tuple[str, str]]:
        """The facts as (name, value), in the order to be read."""
        some = range(min(len(self.names), _SHOWN))
        more = f", ... ({len(self.names) - _SHOWN:,} more)" if len(self.names) > _SHOWN else ""
        pairs = np.triu(self.together, 1)
        commonest = np.argsort(-pairs, axis=None, kind="stable")[:_PAIRS]
        both = [(*np.unravel_index(place, pairs.shape), int(pairs.flat[place])) for place in commonest]
        parts = [f"{self.names[i]} + {self.names[j]} {count:,}" for i, j, count in both if count]
        lines = [
            ("prevalence", ", ".join(f"{self.names[k]} {self.prevalence(k)}" for k in some) + more),
            ("unknown", self._unknown()),
            ("found together", ", ".join(parts) or "none"),
            ("findings a record", _how_many(self.a_record)),
        ]
        return [*lines, ("findings a patient", _how_many(self.a_patient))] if self.patients is not None else lines

    def table(self) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """A row for each finding: records, prevalence, share of unknown, patients."""
        columns = ("finding", "records", "prevalence", "unknown", "patients")
        whose = ["not known"] * len(self.names) if self.patients is None else [f"{count:,}" for count in self.patients]
        rows = (
            (name, f"{self.present[k]:,}", self.prevalence(k), _share(self.unknown[k], self.records), whose[k])
            for k, name in enumerate(self.names)
        )
        return columns, tuple(rows)

    def pairs(self) -> tuple[list[int], NDArray[np.int64]]:
        """The commonest findings, at most 30, in their order, and how often two of them are in a record."""
        chosen = sorted(np.argsort(-self.present, kind="stable")[:_TABLE].tolist())
        return chosen, self.together[np.ix_(chosen, chosen)]

    def _unknown(self) -> str:
        total = int(self.unknown.sum())
        if not total:
            return "none"
        most = int(self.unknown.argmax())
        return (
            f"{_share(total, self.records * len(self.names))} of all; most of {self.names[most]}: "
            f"{_share(self.unknown[most], self.records)}"
        )


def finding_facts(data: EmbeddingSet) -> FindingFacts:
    """Count the findings of a multi-label set without bad rows."""
    present = data.labels == 1
    numbers = present.astype(np.float64)
    patients, a_patient = None, ()
    if data.groups is not None:
        _, member = np.unique(data.groups, return_inverse=True)
        whose = np.zeros((int(member.max(initial=-1)) + 1, data.num_classes), dtype=bool)
        np.logical_or.at(whose, member, present)
        patients, a_patient = whose.sum(axis=0), tuple(np.bincount(whose.sum(axis=1)).tolist())
    return FindingFacts(
        names=data.metadata.class_names,
        records=len(data),
        present=present.sum(axis=0),
        unknown=(data.labels == -1).sum(axis=0),
        together=(numbers.T @ numbers).astype(np.int64),
        patients=patients,
        a_record=tuple(np.bincount(present.sum(axis=1)).tolist()),
        a_patient=a_patient,
    )


def against_each_other(sites: Mapping[str, Path]) -> list[str]:
    """The findings of several stores beside each other, as lines: one for each finding of any of them.

    Args:
        sites: name -> multi-label store; it is read in constant memory.
    """
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for site, path in sites.items():
        names = read_metadata(path).class_names
        present, known = (np.zeros(len(names), dtype=np.int64) for _ in range(2))
        for chunk in iterate_store(path):
            present += (chunk.labels == 1).sum(axis=0)
            known += (chunk.labels >= 0).sum(axis=0)
        for finding, name in enumerate(names):
            counts.setdefault(name, {})[site] = int(present[finding]), int(known[finding])
    lines = [f"{len(counts):,} findings; the share of those who have it, among the records in which it is known:"]
    for name in sorted(counts):
        parts = [
            f"{site} {_share(*counts[name][site])} of {counts[name][site][1]:,}"
            if site in counts[name]
            else f"{site} -"
            for site in sites
        ]
        lines.append(f"{name}: {', '.join(parts)}")
    missing = [name for name in sorted(counts) if len(counts[name]) < len(sites)]
    if missing:
        lines.append(f"not labelled everywhere, and unknown where not: {', '.join(missing)}")
    return [*lines, *remarks_on(sorted(counts), "finding")]


def _share(part: int | np.int64, whole: int | np.int64) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _how_many(counts: tuple[int, ...]) -> str:
    words = ["none", "one", "two"]
    parts = [f"{word} {count:,}" for word, count in zip(words, counts, strict=False)]
    return ", ".join(parts + ([f"three or more {sum(counts[3:]):,}"] if len(counts) > 3 else [])) or "none"

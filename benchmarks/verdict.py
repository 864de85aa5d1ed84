"""What the table says, worked out from its records: where FedHypeVAE is the best private row, and where it is not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.markdown import as_line, head_of
from common.config.rivals import RivalsConfig

OURS = "fedhypevae"
_COLUMNS = ("synthetic_only", "mixed", "personalised")
_MEASURES = ("accuracy", "balanced_accuracy")
# name -> whether more is better; the accuracy of a two-sample test is best at one half, chance, and density at one
_SAMPLES = {
    "knn": True, "mlp": True, "mmd2": False, "precision": True, "recall": True, "density": False, "coverage": True,
    "two_sample": False,
}  # fmt: skip
_PERSONAL_MODELS = ("mh_pfedhn", "mh_pfedhn_gd")


@dataclass(frozen=True)
class Standing:
    """One column of one data set under one trust: the best row of ours and the best of the others.

    `mean` and `spread` (standard deviation over seeds) are in the column's unit; `names` are method names.
    """

    dataset: str
    trust: str
    column: str
    ours: str
    our_mean: float
    our_spread: float
    rival: str
    rival_mean: float
    rival_spread: float
    more_is_better: bool

    @property
    def lead(self) -> float:
        """How far ours is ahead; below 0 where it is behind."""
        ahead = self.our_mean - self.rival_mean
        return ahead if self.more_is_better else -ahead

    @property
    def verdict(self) -> str:
        """`ahead` or `behind` by more than the larger spread over seeds; else `level`."""
        if abs(self.lead) <= max(self.our_spread, self.rival_spread):
            return "level"
        return "ahead" if self.lead > 0 else "behind"


def standings(records: Sequence[dict[str, Any]]) -> list[Standing]:
    """Every column in which a row of ours and a private rival of the same trust both have a value.

    Args:
        records: of `table.json`.

    Returns:
        In the order of the records' data sets: scores in percent, then measures of the synthetic set.
    """
    found = []
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        for trust in ("local", "secagg"):
            mine = [one for one in records if one["dataset"] == dataset and one["trust"] == trust]
            for name, better in _columns():
                values: dict[str, list[float]] = {}
                for record in mine:
                    value = _value(record, name)
                    if value is not None:
                        values.setdefault(record["method"], []).append(value)
                ours = {method: kept for method, kept in values.items() if method.startswith(OURS)}
                rivals = {method: kept for method, kept in values.items() if not method.startswith(OURS)}
                if ours and rivals:
                    best, rival = _best(ours, better), _best(rivals, better)
                    found.append(Standing(dataset, trust, name, *best, *rival, better))
    return found


def verdict_lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: the columns in which FedHypeVAE is not the best private row, then the whole comparison."""
    found = standings(records)
    if not found:
        return []
    behind = [one for one in found if one.verdict == "behind"]
    level, ahead = (sum(one.verdict == word for one in found) for word in ("level", "ahead"))
    lines = [
        "## Where FedHypeVAE is not the best",
        "",
        f"Of {len(found)} comparisons with the best other private row of the same trust, FedHypeVAE (the better of",
        f"its rows) is ahead in {ahead}, level in {level} and behind in {len(behind)}. Ahead and behind mean by more",
        "than the larger of the two standard deviations over seeds.",
        "",
    ]
    lines += [f"- {one.dataset}, {one.trust}, {_title(one.column)}: {_pair(one)}" for one in behind]
    lines += _against_no_sharing(records)
    head = ["data set", "trust", "column", "FedHypeVAE", "", "best other private row", "", "ahead by", ""]
    lines += ["", *head_of(head)]
    for one in found:
        cells = [one.dataset, one.trust, _title(one.column), one.ours, _number(one.column, one.our_mean), one.rival]
        cells += [_number(one.column, one.rival_mean), _number(one.column, one.lead), one.verdict]
        lines.append(as_line(cells))
    return lines


@dataclass(frozen=True)
class Gain:
    """Sites of one architecture: ACC and BACC (%) of their own models and of their own heads alone, over `seeds`."""

    dataset: str
    method: str
    architecture: str
    personal: tuple[float, float]
    alone: tuple[float, float]
    seeds: int


def architecture_gains(records: Sequence[dict[str, Any]]) -> list[Gain]:
    """What MH-pFedHN gives the sites of each architecture over each site's own linear head.

    Args:
        records: of `table.json`.

    Returns:
        Means over the sites and over the seeds that both rows have; leave-one-site-out is not among them, since its
        values belong to folds.
    """
    names = [name.strip() for name in RivalsConfig().architectures.split(",")]
    gains = []
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        mine = [record for record in records if record["dataset"] == dataset and dataset != "ham-loso"]
        alone = {one["seed"]: one["personalised"] for one in mine if one["method"] == "local_only"}
        for method in _PERSONAL_MODELS:
            runs = [one for one in mine if one["method"] == method and one["seed"] in alone]
            for at, name in enumerate(names):
                pairs = [
                    [_at_sites(scores, at, len(names)) for scores in (one["personalised"], alone[one["seed"]])]
                    for one in runs
                    if at < len(one["personalised"]["per_site"]["accuracy"])
                ]
                if pairs:
                    own, head = (_means([pair[side] for pair in pairs]) for side in (0, 1))
                    gains.append(Gain(dataset, method, name, own, head, len(pairs)))
    return gains


def architecture_lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: each site's own model of MH-pFedHN against its own head alone, by the model's architecture."""
    gains = architecture_gains(records)
    if not gains:
        return []
    titles = ["data set", "method", "the site's model", "personal", "local_only", "difference", "seeds"]
    lines = [
        "## MH-pFedHN by architecture",
        "",
        "ACC/BACC in % at the sites that have the architecture, means over them and over seeds. `local_only` is each",
        "site's own linear head, trained to a tolerance.",
        "",
        *head_of(titles),
    ]
    for one in gains:
        own, head = one.personal, one.alone
        cells = [
            one.dataset,
            one.method,
            one.architecture,
            f"{own[0]:.1f}/{own[1]:.1f}",
            f"{head[0]:.1f}/{head[1]:.1f}",
        ]
        lines.append(as_line([*cells, f"{own[0] - head[0]:+.1f}/{own[1] - head[1]:+.1f}", str(one.seeds)]))
    return lines


def _against_no_sharing(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line a data set and trust where no personalised row of ours beats the site's own head."""
    lines = []
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        alone = _values(records, dataset, "none", "local_only")
        for trust in ("local", "secagg"):
            ours: dict[str, list[float]] = {}
            for record in records:
                if record["dataset"] == dataset and record["trust"] == trust and record["method"].startswith(OURS):
                    value = _value(record, "personalised balanced_accuracy")
                    if value is not None:
                        ours.setdefault(record["method"], []).append(value)
            if ours and alone:
                name, mean, _ = _best(ours, True)
                own = statistics.mean(alone)
                if mean <= own:
                    lines.append(
                        f"- {dataset}, {trust}: taking part gains nothing: personalised {name} {mean:.1f}, "
                        f"a site's own head {own:.1f} BACC"
                    )
    return lines


def _values(records: Sequence[dict[str, Any]], dataset: str, trust: str, method: str) -> list[float]:
    chosen = [one for one in records if (one["dataset"], one["trust"], one["method"]) == (dataset, trust, method)]
    values = [_value(one, "personalised balanced_accuracy") for one in chosen]
    return [value for value in values if value is not None]


def _columns() -> list[tuple[str, bool]]:
    scores = [(f"{column} {measure}", True) for column in _COLUMNS for measure in _MEASURES]
    return scores + list(_SAMPLES.items())


def _value(record: dict[str, Any], column: str) -> float | None:
    """A column's value in a record: percent, or a fidelity measure as it stands, or how far it lies from its best."""
    if " " in column:
        name, measure = column.split(" ")
        return None if record[name] is None else 100.0 * float(record[name][measure])
    if column in ("knn", "mlp"):
        return None if record["heads"] is None else 100.0 * float(record["heads"][column]["balanced_accuracy"])
    value = None if record["fidelity"] is None else record["fidelity"][column]
    if value is None:
        return None
    if column == "density":
        return abs(float(value) - 1.0)
    return max(float(value) - 0.5, 0.0) if column == "two_sample" else float(value)


def _best(values: dict[str, list[float]], more_is_better: bool) -> tuple[str, float, float]:
    """Name, mean and spread over seeds of the best row."""
    sign = 1.0 if more_is_better else -1.0
    name = max(values, key=lambda method: sign * statistics.mean(values[method]))
    kept = values[name]
    return name, statistics.mean(kept), statistics.stdev(kept) if len(kept) > 1 else 0.0


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.mean(pair[0] for pair in pairs), statistics.mean(pair[1] for pair in pairs)


def _at_sites(scores: dict[str, Any], first: int, step: int) -> tuple[float, float]:
    accuracy, balanced = (statistics.mean(scores["per_site"][measure][first::step]) for measure in _MEASURES)
    return 100 * accuracy, 100 * balanced


def _title(column: str) -> str:
    words = {"balanced_accuracy": "BACC", "accuracy": "ACC", "synthetic_only": "synthetic-only"}
    if " " in column:
        return " ".join(words.get(word, word) for word in column.split(" "))
    titles = {"knn": "kNN head BACC", "mlp": "MLP head BACC", "mmd2": "MMD²", "two_sample": "two-sample test above ½"}
    titles["density"] = "density's distance from 1"
    return titles.get(column, column)


def _number(column: str, value: float) -> str:
    return f"{value:.1f}" if " " in column or column in ("knn", "mlp") else f"{value:.4f}"


def _pair(one: Standing) -> str:
    ours, rival = (_number(one.column, value) for value in (one.our_mean, one.rival_mean))
    return f"{one.rival} {rival}, {one.ours} {ours}"

"""The coordinator's page: what a run trained, what it cost, what it gave, and what it does not protect.

Made from the run's own files, all of which are published or public: no record is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.assurance.statement import check_statement
from common.errors import DataError
from common.publishing.bundle import STATEMENT, Bundle, load_bundle
from common.texts import read_object
from deploy.report import draw
from deploy.report.own import as_classes
from deploy.report.project import class_plane
from embeddings.quality.page import Grid, Picture, render

WAYS = {
    "local_only": "own data only",
    "statistics_only": "released class means only",
    "synthetic_only": "synthetic set only",
    "mixed": "own and synthetic, half each",
    "own_lambda": "own and synthetic, tuned",
    "personal": "the model made for the site",
}
_DOTS = 3000
_CURE = "name the output folder of a completed run (such as outputs/demo), or restore the file"
_TEMPLATE = Path(__file__).with_name("run.html.j2")


@dataclass(frozen=True)
class RunFacts:
    """A completed run as its files tell it; of a bundle there is no summary but what else was published tells."""

    summary: Mapping[str, Any]
    statement: Mapping[str, Any]
    bundle: Bundle
    is_bundle: bool = False

    @property
    def sites(self) -> list[str]:
        """All sites that were charged or took part, in natural order."""
        known = set(self.statement["sites"]) | {site for names in self.summary["rounds_taken_part"] for site in names}
        known |= {site for missing in self.summary["rounds_missing"] for site in missing}
        return sorted(known, key=draw.natural)


def read_run(folder: Path) -> RunFacts:
    """Read a run's output folder, or a released bundle.

    Args:
        folder: with privacy_statement.json and generator.safetensors, and summary.json or bundle.json.

    Raises:
        DataError: the run is not complete, or a file can't be read or is not what it should be.
    """
    if is_bundle(folder):
        return _read_bundle(folder)
    summary, statement = read_object(folder / "summary.json", _CURE), read_object(folder / STATEMENT, _CURE)
    check_statement(statement)
    wanted = {"rounds", "rounds_taken_part", "rounds_missing", "scores", "privacy", "config", "synthetic_rows"}
    if not wanted <= set(summary):
        raise DataError(f"{folder / 'summary.json'} lacks {sorted(wanted - set(summary))[0]!r}: is it of this version?")
    return RunFacts(summary, statement, load_bundle(folder))


def is_bundle(folder: Path) -> bool:
    """Whether a folder is what `fedhypevae release` made, and no run's output folder."""
    return (folder / "bundle.json").is_file() and not (folder / "summary.json").is_file()


def _read_bundle(folder: Path) -> RunFacts:
    about, statement = read_object(folder / "bundle.json", _CURE), read_object(folder / STATEMENT, _CURE)
    check_statement(statement)
    bundle = load_bundle(folder)
    used = [site["rounds_used"] for site in statement["sites"].values()]
    summary = {
        "method": bundle.config.method,
        "rounds": max(used, default=0),
        "rounds_taken_part": [],
        "rounds_missing": [],
        "scores": {},
        "synthetic_rows": about.get("rows", bundle.config.synthesis.synthetic_rows),
        "config": bundle.config.to_flat(),
    }
    return RunFacts(summary, statement, bundle, is_bundle=True)


def render_run(facts: RunFacts) -> str:
    """The page, one self-contained HTML text."""
    summary, statement = facts.summary, facts.statement
    guarantee, encoder = statement["guarantee"], facts.bundle.encoder
    spent = [site["epsilon"] for site in statement["sites"].values()]
    worst = max((math.inf if value is None else value for value in spent), default=0.0)
    return render(
        _TEMPLATE,
        run=statement["run"],
        private=guarantee["end_to_end"],
        guarantee=guarantee,
        worst=worst,
        odds=math.exp(worst) if worst < 50 else math.inf,
        tiles_of_run=_tiles(facts),
        meter_lines=_meters(facts),
        charges=_charges(facts),
        epsilon=_curves(facts),
        participation=draw.participation(summary["rounds_taken_part"], facts.sites)
        if summary["rounds_taken_part"]
        else None,
        is_bundle=facts.is_bundle,
        missing=_missing(summary),
        scores=_scores(summary["scores"]),
        planes=_planes(facts.bundle),
        released=_released(statement),
        statement=statement,
        mechanism=_details(statement["mechanism"]),
        software=_details(statement["software"]),
        settings=_details(summary["config"]),
        encoder=None if encoder is None else _details(encoder.to_json()),
        audit=_details(statement["audit"] or {}),
        class_names=facts.bundle.class_names,
    )


def _curves(facts: RunFacts) -> Picture | None:
    """ε over the rounds; none for a run without a guarantee, whose sums would look like one."""
    history, guarantee = facts.summary.get("history"), facts.statement["guarantee"]
    return draw.epsilon_curves(history, guarantee["epsilon_target"]) if history and guarantee["end_to_end"] else None


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    summary, bundle = facts.summary, facts.bundle
    parameters = sum(value.numel() for value in bundle.artifact.tensors.values())
    encoder = "not noted" if bundle.encoder is None else bundle.encoder.encoder
    tiles = [
        ("Method", summary["method"], f"{parameters:,} published numbers"),
        ("Sites", str(len(facts.sites)), draw.together(facts.sites)),
        ("Rounds", str(summary["rounds"]), f"{summary['seconds']:.0f} s in all" if "seconds" in summary else ""),
        ("Classes", str(len(bundle.class_names)), f"embeddings of width {bundle.dim}"),
        ("Encoder", encoder, "turned images into embeddings, at the sites"),
        ("Synthetic rows", f"{summary['synthetic_rows']:,}", "more can be drawn at no cost"),
    ]
    if "bytes_up_per_site" in summary:
        tiles.append(("Sent by a site", _bytes(summary["bytes_up_per_site"]), "at most, in the whole run"))
    return tiles


def _meters(facts: RunFacts) -> list[dict[str, Any]]:
    target = facts.statement["guarantee"]["epsilon_target"]
    lines = []
    for name in facts.sites:
        spent = facts.statement["sites"].get(name, {}).get("epsilon", 0.0)
        share = 0.0 if not target else 100.0 if spent is None else min(100.0 * spent / target, 100.0)
        text = "not protected" if spent is None else f"{spent:.2f} of {draw.number(target)}"
        lines.append({"name": name, "percent": round(share, 1), "text": text})
    return lines


def _charges(facts: RunFacts) -> Grid:
    rows = []
    for name in facts.sites:
        site = facts.statement["sites"].get(name)
        if site is None:
            rows.append((name, "0", "", "0", "0", ""))
            continue
        events = sum(event["count"] for event in site["events"])
        epsilon = "no guarantee" if site["epsilon"] is None else f"{site['epsilon']:.3f}"
        receipt = (site["ledger_receipt"] or "")[:20]
        rows.append((name, epsilon, f"{site['delta']:g}", str(events), str(site["rounds_used"]), receipt))
    columns = ("site", "epsilon", "delta", "charged releases", "rounds used", "ledger receipt")
    return Grid(columns, tuple(rows), (False, True, True, True, True, False))


def _missing(summary: Mapping[str, Any]) -> Grid | None:
    rows = [
        (str(index), site, why)
        for index, sites in enumerate(summary["rounds_missing"], start=1)
        for site, why in sorted(sites.items(), key=lambda item: draw.natural(item[0]))
    ]
    return Grid(("round", "site", "why"), tuple(rows)) if rows else None


def _scores(scores: Mapping[str, Any]) -> Picture | None:
    found = {
        label: {
            site: scores[key]["per_site"][site]["balanced_accuracy"]
            for site in sorted(scores[key]["per_site"], key=draw.natural)
        }
        for key, label in WAYS.items()
        if key in scores
    }
    if not found:
        return None
    caption = (
        "Each mark is one site's own test images; farther right is better. The middle row is what the published set "
        "alone teaches."
    )
    return draw.score_dots(found, "How well a classifier does, by what it learned from", caption, "site")


def _planes(bundle: Bundle) -> list[Picture]:
    """The published set on its own two main directions, by class and by code; nothing real is drawn."""
    if not bundle.published_files():
        return []
    rows, labels = bundle.published()
    labels, class_names = as_classes(labels, bundle.class_names)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    few = chosen[: 2 * _DOTS]
    project = class_plane(rows[few].numpy(), labels[few].numpy())
    points = project(rows[few[:_DOTS]].numpy())
    shown = [
        draw.plane(
            points,
            labels[few[:_DOTS]].numpy(),
            class_names,
            "By class",
            "Each dot is one synthetic embedding, seen from the side where the classes' middles lie farthest apart. "
            "A flat picture hides most of it: groups that overlap here may lie apart in other directions.",
        )
    ]
    codes = _codes(bundle)
    if codes == 0:
        return shown
    drawn = [bundle.draw(max(_DOTS // codes, 1), code=index, seed=index)[0].numpy() for index in range(codes)]
    which = np.repeat(np.arange(codes), [len(part) for part in drawn])
    weights = bundle.artifact.tensors["meta.weights"].tolist()
    names = [f"code {index} ({100 * weights[index]:.0f} %)" for index in range(codes)]
    caption = (
        "All rows come from one code, the meta-code, which belongs to no site."
        if codes == 1
        else f"The same view; each of {codes} codes draws its own variant of the data, and no code is a site's own. "
        "Where the colours lie on top of each other, the codes draw alike."
    )
    return [*shown, draw.plane(np.concatenate([project(part) for part in drawn]), which, names, "By code", caption)]


def _codes(bundle: Bundle) -> int:
    codes = bundle.artifact.tensors.get("meta.codes")
    return 0 if codes is None or not bundle.can_sample else int(codes.shape[0])


def _released(statement: Mapping[str, Any]) -> Grid:
    rows = [
        (item["what"], item["when"], "" if item["values"] is None else f"{item['values']:,}", item["protection"])
        for item in statement["released"]
    ]
    return Grid(("what", "when", "numbers", "protection"), tuple(rows), (False, False, True, False))


def _details(values: Mapping[str, Any]) -> Grid:
    return Grid(("what", "value"), tuple((name.replace("_", " "), _plain(value)) for name, value in values.items()))


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _bytes(count: float) -> str:
    power = min(int(math.log10(max(count, 1)) / 3), 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"

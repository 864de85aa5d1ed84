"""The descriptions in a bundle: dataset card, Croissant, and bundle.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.names import WORD, WORDS
from common.plain import plain as seen
from common.publishing.bundle import FREE_OF_COST, Bundle
from common.publishing.parquet import Written
from common.templates import fill
from deploy.release.audits import CONFIDENCE
from deploy.release.promises import largest_epsilon

# Verification writes card, Croissant and bundle.json again: a change of their words is another format.
BUNDLE_FORMAT = "fedhypevae-bundle/2"
DATA_FILE = "data/train-00000-of-00001.parquet"
_TEMPLATE = Path(__file__).with_name("card.md.j2")
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
_EVEN = 1.05
_LARGEST_SIZE = "10M<n<100M"
_MARKDOWN = re.compile(r"([\\`*_|<>\[\]#])")
NOT_PRIVATE = "NOT PRIVATE"


@dataclass(frozen=True)
class Facts:
    """What the descriptions say.

    Attributes:
        bundle: the run.
        data: the parquet file of the set.
        statement: the bundle's own privacy statement.
        audits: as in audit.json. why_none: why there is none.
        not_private_because: reasons; empty where the promise stands.
        name: title of the set. license: its SPDX identifier.
        signed_by: fingerprint of the coordinator's key.
        date: ISO date of publication.
    """

    bundle: Bundle
    data: Written
    statement: Mapping[str, Any]
    audits: Sequence[Mapping[str, Any]]
    why_none: str
    not_private_because: Sequence[str]
    name: str
    license: str
    signed_by: str
    date: str


def bundle_json(facts: Facts) -> dict[str, Any]:
    """The content of bundle.json: what a program needs to know of the bundle."""
    bundle = facts.bundle
    return {
        "format": BUNDLE_FORMAT,
        "name": facts.name,
        "license": facts.license,
        "date": facts.date,
        "run": facts.statement["run"],
        "method": bundle.config.method,
        "private": not facts.not_private_because,
        "not_private_because": list(facts.not_private_because),
        "signed_by": facts.signed_by,
        "encoder": None if bundle.encoder is None else bundle.encoder.to_json(),
        "dim": bundle.dim,
        "class_names": list(bundle.class_names),
        **({} if bundle.context.problem.task == "multiclass" else {"task": bundle.context.problem.task}),
        "rows": facts.data.rows,
        "class_counts": list(facts.data.class_counts),
        "config": bundle.config.to_flat(),
    }


def front_matter(facts: Facts) -> dict[str, Any]:
    """The card's metadata, as the Hugging Face Hub reads it."""
    tags = ["synthetic", "embeddings", "medical", "federated-learning"]
    tags += ["not-private"] if facts.not_private_because else ["differential-privacy"]
    size = next((name for limit, name in _SIZES if facts.data.rows < limit), _LARGEST_SIZE)
    return {
        "license": facts.license,
        "pretty_name": facts.name,
        "size_categories": [size],
        "annotations_creators": ["machine-generated"],
        "source_datasets": ["original"],
        "task_categories": ["image-classification", "image-feature-extraction"],
        "tags": tags,
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }


def card(facts: Facts) -> str:
    """The dataset card, README.md."""
    bundle, statement = facts.bundle, facts.statement
    task = bundle.context.problem.task
    sites = [
        {
            "name": name,
            "epsilon": site["epsilon"],
            "delta": site["delta"],
            "releases": sum(event["count"] for event in site["events"]),
        }
        for name, site in statement["sites"].items()
    ]
    counted = zip(bundle.class_names, facts.data.class_counts, strict=True)
    values: dict[str, object] = {
        "front": front_matter(facts),
        "name": facts.name,
        "not_private_because": facts.not_private_because,
        "rows": facts.data.rows,
        "dim": bundle.dim,
        "classes": [{"name": name, "rows": rows} for name, rows in counted],
        "what": WORD[task],
        "whats": WORDS[task],
        "findings": task == "multilabel",
        "uneven": task != "multilabel"
        and max(facts.data.class_counts) > _EVEN * max(min(facts.data.class_counts), 1)
        and bundle.config.synthesis.balance == "uniform",
        "sites": sites,
        "method": bundle.config.method,
        "encoder": None if bundle.encoder is None else bundle.encoder.to_json(),
        "free_of_cost": FREE_OF_COST,
        "statement": statement,
        "shared": statement.get("secure_aggregation"),
        "epsilon": largest_epsilon(statement),
        "confidence": f"{CONFIDENCE:.1%}",
        "audits": facts.audits,
        "why_none": facts.why_none,
        "signed_by": facts.signed_by,
    }
    return fill(_TEMPLATE, values, {"plain": plain})


def json_text(content: Mapping[str, Any]) -> str:
    """A JSON file of a bundle, in the one form that it has."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def plain(text: object) -> str:
    """Text from elsewhere on one line of Markdown, without a meaning of its own there; nothing hidden or reordered."""
    return _MARKDOWN.sub(r"\\\1", seen(" ".join(str(text).split())))


def croissant(facts: Facts) -> dict[str, Any]:
    """The set in Croissant 1.1 (JSON-LD)."""
    bundle, task = facts.bundle, facts.bundle.context.problem.task
    mark = f"{NOT_PRIVATE}: {'; '.join(facts.not_private_because)}. "
    privacy = "" if not facts.not_private_because else mark
    described = (
        f"{privacy}{facts.data.rows} synthetic embeddings of width {bundle.dim} in {len(bundle.class_names)} "
        f"{WORDS[task]} ({', '.join(bundle.class_names)}), drawn from a generator that several sites trained together "
        "without pooling their images. What is promised to whom is in privacy_statement.json."
    )
    findings, coordinates = task == "multilabel", "Coordinates of the embedding."
    labels = (WORDS if findings else WORD)[task]
    label = _field("label", "sc:Integer", f"Number of the {WORD[task]}.")
    if findings:
        words = f"1 for each finding that is present, else 0, in this order: {', '.join(bundle.class_names)}."
        label = _field("label", "sc:Integer", words, isArray=True, arrayShape=str(len(bundle.class_names)))
    file = {
        "@type": "cr:FileObject",
        "@id": "rows",
        "name": "rows",
        "description": "The synthetic set.",
        "contentUrl": DATA_FILE,
        "contentSize": f"{facts.data.size} B",
        "encodingFormat": "application/x-parquet",
        "sha256": facts.data.sha256,
    }
    return {
        "@context": json.loads(Path(__file__).with_name("croissant_context.json").read_text(encoding="utf-8")),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": re.sub(r"[^A-Za-z0-9_-]+", "-", facts.name).strip("-") or "synthetic-embeddings",
        "alternateName": facts.name,
        "description": described,
        "license": f"https://spdx.org/licenses/{facts.license}",
        "url": "https://arxiv.org/abs/2601.00785",
        "version": "1.0.0",
        "datePublished": facts.date,
        "creator": {"@type": "sc:Organization", "name": "A FedHypeVAE federation"},
        "keywords": front_matter(facts)["tags"],
        "citeAs": "Gupta, Jangid, Sethi. FedHypeVAE. arXiv 2601.00785.",
        "distribution": [file],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "synthetic",
                "name": "synthetic",
                "description": f"One synthetic embedding with its {labels} in each row.",
                "field": [
                    _field("embedding", "sc:Float", coordinates, isArray=True, arrayShape=str(bundle.dim)),
                    label,
                ],
            }
        ],
    }


def _field(name: str, kind: str, words: str, **more: Any) -> dict[str, Any]:
    source = {"fileObject": {"@id": "rows"}, "extract": {"column": name}}
    common = {"@type": "cr:Field", "@id": f"synthetic/{name}", "name": name, "description": words, "dataType": kind}
    return {**common, **more, "source": source}

"""The contents of a bundle: what its files say, held against each other and against what can be computed again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common.assurance.audit_run import Watch
from common.config.run import RunConfig
from common.durable import sha256_of
from common.errors import FedHypeVAEError
from common.generator.row_sets import ROWS_FORMAT
from common.privacy.events import PrivacyEvent
from common.publishing.bundle import STATEMENT, Bundle, load_bundle
from common.publishing.generator_file import GENERATOR
from common.publishing.parquet import Written, check_layout, label_counts, read_notes, set_notes, stream_rows
from deploy.release.audits import audit_file, objections
from deploy.release.build import SIGNATURE, SUMS, check_title
from deploy.release.describe import (
    BUNDLE_FORMAT,
    DATA_FILE,
    NOT_PRIVATE,
    Facts,
    bundle_json,
    card,
    croissant,
    json_text,
)
from deploy.release.layout import check_generator_layout
from deploy.release.ledgers import check_published
from deploy.release.promises import faults_of, largest_epsilon, same_words
from deploy.release.redraw import FOREIGN, check_every_row, check_sampled_rows

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._/-]{1,200})")
_CLAIM_TOLERANCE = 1e-4


def require(right: bool, fault: str) -> None:
    """Raise the fault as FedHypeVAEError unless it is right."""
    if not right:
        raise FedHypeVAEError(fault)


def read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS: digests by file name. Raises FedHypeVAEError for another form."""
    sums: dict[str, str] = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            continue
        found = _LINE.fullmatch(line)
        if found is None or found[2] in sums:
            raise FedHypeVAEError(f"{SUMS}: a line is not as `fedhypevae release` writes it: {line!r:.100}")
        sums[found[2]] = found[1]
    return sums


class Contents:
    """The contents of a bundle whose bytes are those that were signed; each check raises what makes no sense."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._json: dict[str, Any] = {}
        self.missed_share: float | None = None

    @cached_property
    def bundle(self) -> Bundle:
        """What the files publish; read once, for all checks."""
        return load_bundle(self._folder)

    def json(self, name: str) -> dict[str, Any]:
        """One of the JSON files."""
        if name not in self._json:
            content = json.loads((self._folder / name).read_text(encoding="utf-8"))
            require(isinstance(content, dict), f"{name} is no JSON object")
            self._json[name] = content
        found: dict[str, Any] = self._json[name]
        return found

    def check_format(self) -> None:
        """Whether this version can draw the rows again."""
        found = self.json("bundle.json").get("format")
        require(
            found == BUNDLE_FORMAT and self.bundle.rows_format == ROWS_FORMAT,
            f"expected {BUNDLE_FORMAT}, rows of {ROWS_FORMAT}, found {found!r:.40}: this version can't draw its rows "
            "again; verify it with the version that made it, or ask for a release of today's format",
        )

    def check_marks(self) -> None:
        """Whether every file says the same of the promise."""
        reasons = list(self.json("bundle.json")["not_private_because"])
        private = not reasons
        notes = read_notes(self._folder / DATA_FILE)
        stated: dict[str, Mapping[str, Any]] = {
            name: self.json(name) for name in ("bundle.json", "audit.json", "ledgers.json", SIGNATURE)
        }
        stated |= {DATA_FILE: notes}
        for name, content in stated.items():
            same = content["private"] is private and list(content["not_private_because"]) == reasons
            require(same, f"{name} says otherwise than bundle.json whether the set is private")
        guarantee = self.json(STATEMENT)["guarantee"]
        require(guarantee["end_to_end"] is private, f"{STATEMENT} says otherwise than bundle.json")
        require(list(guarantee["why_not"]) == reasons, f"{STATEMENT} gives other reasons than bundle.json")
        require(bool(self.bundle.not_private) is not private, f"{GENERATOR} says otherwise")
        card, sums = ((self._folder / name).read_text(encoding="utf-8") for name in ("README.md", SUMS))
        described = str(self.json("croissant.json")["description"])
        for name, text in (("README.md", card), (SUMS, sums), ("croissant.json", described)):
            require((NOT_PRIVATE in text) is not private, f"{name} says otherwise than bundle.json")

    def check_config(self) -> None:
        """Whether every file names the same settings, classes, encoder and run."""
        bundle = self.bundle
        stated, config = self.json("bundle.json"), bundle.config.to_flat()
        for name in ("bundle.json", "audit.json"):
            found = RunConfig.from_flat(self.json(name)["config"]).to_flat()
            require(found == config, f"{name} has another configuration than {GENERATOR}")
        encoder = None if bundle.encoder is None else bundle.encoder.to_json()
        same = stated["class_names"] == list(bundle.class_names) and stated["dim"] == bundle.dim
        require(
            same and stated["encoder"] == encoder, f"bundle.json has other classes or another encoder than {GENERATOR}"
        )
        runs = {stated["run"], self.json(STATEMENT)["run"], self.json("ledgers.json")["run"]}
        require(len(runs) == 1, "the files name different runs")

    def check_statement(self) -> None:
        """Whether every figure of the privacy statement comes out the same."""
        withdrawn = self.json("bundle.json")["not_private_because"]
        faults = faults_of(self.json(STATEMENT), self.bundle.context, withdrawn)
        if withdrawn:  # a run that charged nobody can be released by force: it promises nothing
            faults = [fault for fault in faults if "names no site" not in fault and "was not charged" not in fault]
        require(not faults, "; ".join(faults))
        same = same_words(self.json(STATEMENT), load_bundle(self._folder).context, withdrawn)
        require(same, f"{STATEMENT} says it in other words than this version: verify it with the one that made it")

    def check_ledgers(self) -> None:
        """Whether the charges are chained, and are those of the statement."""
        sites, shown = self.json(STATEMENT)["sites"], self.json("ledgers.json")["sites"]
        context = self.bundle.context
        require(set(sites) == set(shown), "ledgers.json and the privacy statement name different sites")
        for site, facts in sites.items():
            stated = [PrivacyEvent(**event) for event in facts["events"]]
            require(shown[site]["receipt"] == facts["ledger_receipt"], f"ledgers.json: another receipt of {site}")
            check_published(shown[site], self.json(STATEMENT)["run"], site, facts["ledger_receipt"], stated, context)

    def check_audit(self) -> None:
        """Whether the audit is of this claim, and does not contradict it."""
        statement, audits = self.json(STATEMENT), self.json("audit.json")["audits"]
        if statement["audit"] is not None:
            require(statement["audit"] in audits, f"the audit in {STATEMENT} is not one of audit.json")
        if self.json("bundle.json")["private"]:
            faults = objections(audits, self.json("audit.json")["why_none"], largest_epsilon(statement))
            require(not faults, "; ".join(faults))
            declared = statement["guarantee"]["epsilon_declared"]
            wrong = [
                audit
                for audit in audits
                if audit["kind"] == "one-run"
                and not math.isclose(audit["epsilon_claimed"], declared, rel_tol=_CLAIM_TOLERANCE)
            ]
            require(not wrong, "the audit was made for another claim than the privacy statement's")

    def check_generator(self) -> None:
        """Whether the generator holds what its method publishes, and rows can be drawn."""
        bundle = self.bundle
        check_generator_layout(bundle, self.json("bundle.json")["not_private_because"])
        embeddings, labels = bundle.draw(len(bundle.class_names), threads=1)
        fits = embeddings.shape == (len(bundle.class_names), bundle.dim) and bool(embeddings.isfinite().all())
        require(fits and labels.shape[:1] == embeddings.shape[:1], f"{GENERATOR} gives rows of another shape")

    def check_data(self) -> None:
        """Whether the set's file holds its rows, as many as said, and nothing else."""
        stated, bundle = self.json("bundle.json"), self.bundle
        task = bundle.context.problem.task
        check_layout(self._folder / DATA_FILE, bundle.dim, bundle.class_names, task)
        due = set_notes(bundle.context, stated["not_private_because"])
        require(read_notes(self._folder / DATA_FILE) == due, f"{DATA_FILE} notes other facts than the bundle's")
        classes, rows = len(stated["class_names"]), 0
        counts = torch.zeros(classes, dtype=torch.int64)
        for _, labels in stream_rows(self._folder / DATA_FILE, stated["dim"], classes, task):
            counts += label_counts(labels, classes)
            rows += len(labels)
        same = counts.tolist() == stated["class_counts"] and rows == stated["rows"]
        require(same, f"{DATA_FILE} holds other rows than bundle.json counts")

    def check_rows(self, quick: bool, watch: Watch) -> None:
        """Whether every row, or a sample, is what the generator draws; notes what a sample would miss."""
        # a set that is not the generator's own is in order where the bundle says so itself, and promises nothing
        if any(FOREIGN in reason for reason in self.json("bundle.json")["not_private_because"]):
            return
        if quick:
            self.missed_share = check_sampled_rows(self.bundle, watch)
        else:
            check_every_row(self.bundle, watch)

    def check_descriptions(self) -> None:
        """Whether what people read first follows from the rest, to the letter: it is written again and compared."""
        stated = self.json("bundle.json")
        check_title(stated["name"], stated["license"])
        same = date.fromisoformat(stated["date"]).isoformat() == stated["date"]
        require(same, "bundle.json has another form of date")
        for name, text in self.described().items():
            found = (self._folder / name).read_text(encoding="utf-8")
            require(found == text, f"{name} says other than follows from the rest of the bundle, or more")

    def described(self) -> dict[str, str]:
        """The descriptions as they have to be, and the other JSON files in their one form, by name."""
        stated, audit = self.json("bundle.json"), self.json("audit.json")
        bundle, data = load_bundle(self._folder), self._folder / DATA_FILE
        facts = Facts(
            bundle=bundle,
            data=Written(stated["rows"], tuple(stated["class_counts"]), data.stat().st_size, sha256_of(data)),
            statement=self.json(STATEMENT),
            audits=audit["audits"],
            why_none=audit["why_none"],
            not_private_because=stated["not_private_because"],
            name=stated["name"],
            license=stated["license"],
            signed_by=stated["signed_by"],
            date=stated["date"],
        )
        due = audit_file(bundle.context, facts.audits, facts.why_none, facts.not_private_because)
        return {
            "audit.json": json_text(due),
            "bundle.json": json_text(bundle_json(facts)),
            "croissant.json": json_text(croissant(facts)),
            "README.md": card(facts),
            **{name: json_text(self.json(name)) for name in (STATEMENT, "ledgers.json")},
        }

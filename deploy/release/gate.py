"""The gate before a release: what would have to be true, and is not.

A run is published with a promise only if it completed, if its statement is complete and comes out the same when it is
computed again, if every site's ledger verifies, if the run was private end to end, if the set is what its generator
draws, and, last, if an audit of its configuration does not contradict the claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.assurance.audit import AuditResult
from common.assurance.audit_run import AuditSize, Watch
from common.assurance.statement import check_statement
from common.errors import ConfigError, DataError, FedHypeVAEError
from common.generator.row_sets import ROWS_FORMAT
from common.names import STATUS
from common.privacy.events import PrivacyEvent
from common.publishing.bundle import Bundle, load_bundle
from common.texts import object_or_empty
from deploy.release.audits import audit_published, in_json, objections
from deploy.release.ledgers import SiteLedger, checked_sites
from deploy.release.promises import empty_statement, faults_of, largest_epsilon
from deploy.release.redraw import check_every_row


@dataclass(frozen=True)
class Inspection:
    """What the gate found.

    Attributes:
        bundle: the run.
        statement: the run's own, or an empty one where it left none that can be used.
        ledgers: those that were found and verify, by site.
        audits: results. why_none: why there is none.
        refusals: why the run may not be published with a promise, in words; empty where it may.
    """

    bundle: Bundle
    statement: Mapping[str, Any]
    ledgers: Mapping[str, SiteLedger]
    audits: Sequence[AuditResult]
    why_none: str
    refusals: tuple[str, ...]

    @property
    def audits_in_json(self) -> list[dict[str, Any]]:
        """The audits as audit.json has them."""
        return [in_json(result) for result in self.audits]


def inspect_run(run: Path, ledgers: Path | None, size: AuditSize, watch: Watch) -> Inspection:
    """Hold a run's output folder against every condition of a release.

    Args:
        run: the folder.
        ledgers: folder with the sites' ledgers or their exports (`SITE.json`), beside those of a simulation.
        size: of the audit.
        watch: called now and then with (what is done, done, in all).

    Raises:
        ConfigError: the run's method publishes nothing that a set can be drawn from. DataError: generator or set are
            missing or damaged. These no --force helps.
    """
    bundle = load_bundle(run)
    if not run.is_dir():
        raise ConfigError(f"{run} is a file: name the run's output folder, with its statement and synthetic set")
    if not bundle.can_sample:
        raise ConfigError(
            f"method {bundle.config.method} publishes a {bundle.artifact.kind} and no synthetic set: there is nothing "
            "to release; take a run of fedhypevae, dp_gauss, dp_cvae or dp_cgan"
        )
    if not bundle.published_files():
        raise DataError(f"no synthetic set in {run}: name the output folder of a completed run")
    if bundle.rows_format != ROWS_FORMAT:
        raise ConfigError(
            f"the set in {run} was drawn by another version of this program, in a way that this one can't draw again: "
            "release it with that version, or run the federation again"
        )
    if (run / "SHA256SUMS").exists():
        raise ConfigError(f"{run} is a bundle already: name the output folder of the run")
    watch("checking the privacy statement", 0, 1)
    refusals = [] if object_or_empty(run / STATUS).get("status") == "completed" else ["the run did not complete"]
    statement, faults = _statement(bundle)
    refusals += [f"the privacy statement is incomplete: {fault}" for fault in faults]
    refusals += [f"the run was not private end to end: {reason}" for reason in bundle.not_private]
    watch("checking the ledgers", 0, 1)
    found, unverified = _ledgers(bundle, statement, run, ledgers)
    refusals += unverified
    try:
        check_every_row(bundle, watch)
    except FedHypeVAEError as error:
        refusals.append(str(error))
    audits: list[AuditResult] = []
    why_none = "the gate refused before: there is no promise to audit"
    if not refusals:
        audits, why_none = audit_published(bundle.context, size, watch)
        refusals += objections([in_json(result) for result in audits], why_none, largest_epsilon(statement))
    return Inspection(bundle, statement, found, audits, why_none, tuple(refusals))


def _statement(bundle: Bundle) -> tuple[Mapping[str, Any], list[str]]:
    """The run's statement with its faults; an empty one in its place where it can't be used at all."""
    if bundle.statement is None:
        return empty_statement(bundle.context), ["there is none"]
    try:
        check_statement(bundle.statement)
        for site in bundle.statement["sites"].values():
            for event in site["events"]:
                PrivacyEvent(**event)
    except FedHypeVAEError as error:
        return empty_statement(bundle.context), [str(error)]
    return bundle.statement, faults_of(bundle.statement, bundle.context)


def _ledgers(
    bundle: Bundle, statement: Mapping[str, Any], run: Path, ledgers: Path | None
) -> tuple[dict[str, SiteLedger], list[str]]:
    """Ledgers of a simulation lie in the run's folder, and must be there; a site's own stays there, or is exported."""
    places = [folder for folder in (run / "sites",) if folder.is_dir()]
    if ledgers is not None:
        places.append(ledgers)
    return checked_sites(statement["sites"], statement["run"], places, bool(places), bundle.context)

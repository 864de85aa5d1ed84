"""A run's privacy statement: what is promised to whom, what was released and charged, and what is not covered.

Machine-readable, with the fields that NIST SP 800-226 and Ponomareva et al. (2023) ask for. Built from the run's public
context and from what the sites' own ledgers charged; validated against the schema beside this file. Whatever has no
guarantee says so: an ε that is not finite is written as null, never left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from common.assurance.shared_noise import shared_noise_facts
from common.config.privacy import PrivacyConfig
from common.errors import FedHypeVAEError
from common.methods import get_method
from common.methods.base import RunContext
from common.privacy.clipping import NEIGHBOURING
from common.privacy.composition import epsilon_pld, epsilon_prv, epsilon_rdp
from common.privacy.events import PrivacyEvent
from common.wire.allow_list import SCORE_NAMES, Kind
from common.wire.reply_fields import REPLY_FIELDS

_SECAGG: tuple[Kind, ...] = ("secagg_keys", "secagg_shares", "secagg_check", "secagg_masked", "secagg_unmask")
FORMAT = "fedhypevae-privacy-statement/1"
SCHEMA_PATH = Path(__file__).with_name("privacy_statement.schema.json")

_TRUST = {
    "local": "Each site adds the whole noise to whatever it sends: its units are protected from the server, from other "
    "sites and from anybody who gets the results. The server may be curious; it is not trusted to add noise.",
    "secagg": "Each site adds a share of the noise and the server sees the sum alone: protection from the server rests "
    "on the number of honest sites that the run assumes.",
}
_SAMPLING = (
    "Poisson: in every local step each unit is drawn by itself with the public rate, from the operating system's "
    "entropy; an empty batch is noised, released and charged like any other."
)
_NOT_COVERED = (
    "The encoder's pre-training: records that were in its training data are not protected by this run.",
    "Choices made by people who looked at these records before the run: hyperparameters, classes, inclusion.",
    "Evaluation at a site with its own validation and test records; its scores must stay there unless its data is "
    "public.",
    "Whether a site's file could be used at all: a site that can't read it says so with a code before a run.",
    "A split into training, validation, test rows that came with a site's file, if one unit's presence moves others.",
    "Times of messages (their sizes are the same for every site). How long a step takes depends on the machine, its "
    "load and the number of records. A site that sets reply_seconds in site.toml above what its steps take answers on "
    "a fixed schedule; with 0, the default, the time that its replies take tells something of that number.",
    "That a site fell silent: a process that is killed or a disk that fails in mid-round leaves a charged round and no "
    "reply.",
    "Correlated units: relatives, or one person under two identifiers, are protected as separate units.",
)
_GENERATOR = {
    "secure": "AES-128 in counter mode with 256 bits of operating-system entropy for every process{exact}. The "
    "run's seed never reaches the noise.",
    "test": "A generator with a known seed: anybody who knows it can remove the noise. Not private.",
}
_FLOATING_POINT = (
    "Noise is added in float64 and the noisy value is rounded to a public grid: this mitigates floating-point attacks "
    "(Mironov 2012), it does not exclude them. What one unit adds to a sum of gradients is at most the clip norm with "
    "its own rounding; the sum over units is rounded too, so one unit more may move the sum of the others, for which "
    "no margin is charged: by 4e-4 of the clip norm at up to 100,000 units as measured where all point one way, by "
    "5e-3 of it at 4,096 units whose gradient has parts that cancel, and by n * min(n, 4096) * 2**-23 of it at most "
    "for n units, times 16 p where a unit's gradient of a layer has p parts, p > 1."
)
_HOSPITAL = (
    "That a hospital took part is not protected, nor that it was absent in a round. Replacing one unit by another "
    "costs at most twice the epsilon stated (at delta times 1 + e^epsilon)."
)
_ADAPTIVITY = (
    "Within the run, whose events were declared to the sites' ledgers in advance, privacy loss distributions compose; "
    "over all runs of a site, a Renyi filter bounds the lifetime's total whatever was chosen after seeing results."
)


@dataclass(frozen=True)
class SiteCharge:
    """What a site's own ledger said.

    Attributes:
        events: what it charged for this run, interrupted attempts included.
        rounds: rounds of which its release was used.
        receipt: head of its ledger after its last release; empty where nothing was charged.
        lifetime: ε and δ of everything its ledger ever charged, where the site chose to tell; else None.
    """

    events: Sequence[PrivacyEvent]
    rounds: int
    receipt: str = ""
    lifetime: Mapping[str, float] | None = None


@dataclass(frozen=True)
class StatementFacts:
    """What is known of a run beside its context.

    Attributes:
        run: its lasting name.
        charges: by site.
        data_is_public: whether every site's policy declares its data public.
        audit: an audit's outcome (kind, bound, claim, confidence, power), or None if none was made.
    """

    run: str
    charges: Mapping[str, SiteCharge]
    data_is_public: bool
    audit: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def why_not_private(context: RunContext) -> list[str]:
    """Reasons why a run has no end-to-end guarantee; empty where it has one."""
    privacy = context.config.privacy
    found = {
        "the method has no differential privacy": not get_method(context.config.method).private,
        "epsilon is infinite: no noise was drawn": not math.isfinite(privacy.epsilon),
        "noise came from a test source with a known seed": privacy.noise == "test",
        "encoder and code were trained on records without clipping or noise": privacy.encoder_training == "unprotected",
    }
    return [reason for reason, applies in found.items() if applies]


def build_statement(context: RunContext, facts: StatementFacts) -> dict[str, Any]:
    """The statement of a run, JSON-ready and valid by the schema.

    Args:
        context: the run's public context; its plan is what was declared to the ledgers.
        facts: what the sites charged, and what else is known.

    Returns:
        All fields of the schema. Every ε is for adding or removing one unit, at the run's δ, and null if infinite.

    Raises:
        FedHypeVAEError: the statement does not fit its schema, which is a fault of the program.

    Source: NIST SP 800-226 (2025); Ponomareva et al. 2023, section 5.3.2.
    """
    privacy, plan = context.config.privacy, context.plan
    reasons = why_not_private(context)
    statement = {
        "format": FORMAT,
        "run": facts.run,
        "method": context.config.method,
        "software": {name: _version(name) for name in ("fedhypevae", "torch", "randomgen", "opendp", "flwr")},
        "guarantee": {
            "end_to_end": not reasons,
            "why_not": reasons,
            "definition": "(epsilon, delta)-differential privacy",
            "trust_model": privacy.trust,
            "trust_model_in_words": _TRUST[privacy.trust],
            "unit": privacy.unit,
            "max_records_per_unit_and_step": privacy.records_per_unit,
            "neighbouring": NEIGHBOURING,
            "epsilon_target": _finite(privacy.epsilon),
            "epsilon_declared": None if reasons else _finite(epsilon_pld(plan.all_events, privacy.delta)),
            "delta": privacy.delta,
            "data_is_public": facts.data_is_public,
            "membership_of_a_site_is_protected": False,
            "in_words": _HOSPITAL,
        },
        "accountant": {
            "name": "privacy loss distributions, pessimistic",
            "library": "dp-accounting",
            "version": _version("dp-accounting"),
            "cross_checks": [{"name": name, "library": "opacus", "version": _version("opacus")} for name in _CHECKS],
            "composition": _ADAPTIVITY,
        },
        "mechanism": _mechanism(context),
        "sites": {name: _site(charge, privacy.delta, bool(reasons)) for name, charge in sorted(facts.charges.items())},
        "released": _released(context, facts.data_is_public),
        "not_covered": [*_NOT_COVERED, *facts.notes],
        "caveats": {"generator": _generator(privacy), "floating_point": _FLOATING_POINT},
        "audit": dict(facts.audit) if facts.audit is not None else None,
    }
    shared = shared_noise_facts(context)
    if shared is not None:
        statement["secure_aggregation"] = shared
    check_statement(statement)
    return statement


def check_statement(statement: Mapping[str, Any]) -> None:
    """Validate a statement against the schema. Raises FedHypeVAEError with the first field that does not fit."""
    import jsonschema

    try:
        jsonschema.validate(statement, _schema(), cls=jsonschema.Draft202012Validator)
    except jsonschema.ValidationError as error:
        where = "/".join(str(part) for part in error.absolute_path) or "the whole"
        raise FedHypeVAEError(f"the privacy statement is not valid at {where}: {error.message:.200}") from None


_CHECKS = {"prv": epsilon_prv, "rdp": epsilon_rdp}


@lru_cache(maxsize=1)
def _schema() -> Any:
    return json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))


def _mechanism(context: RunContext) -> dict[str, Any]:
    privacy, plan = context.config.privacy, context.plan
    mechanism: dict[str, Any] = {
        "name": "Gaussian noise on sums of clipped contributions",
        "clip_norm": _finite(privacy.clip_norm),
        "noise_multiplier_training": plan.training_noise,
        "noise_multiplier_statistics": plan.statistics_noise,
        "sampling_rate": plan.sampling_rate,
        "steps_per_round": plan.steps_per_round,
        "rounds_declared": plan.num_rounds,
        "spare_rounds_declared": plan.spare_rounds,
        "steps_declared": (plan.num_rounds + plan.spare_rounds) * plan.steps_per_round,
        "encoder_training": privacy.encoder_training,
        "sampling_assumed": "poisson",
        "sampling_done": _SAMPLING,
    }
    if context.problem.findings:
        present, unknown = context.finding_caps
        whole = f"a record with up to {present} findings present and {unknown} unknown; one with more is scaled down"
        mechanism["findings"] = {"task": context.problem.task, "statistics_keep_whole": whole}
    return mechanism


def _site(charge: SiteCharge, delta: float, unprotected: bool) -> dict[str, Any]:
    epsilon, checks = _epsilons(tuple(charge.events), delta)
    if unprotected:
        epsilon, checks = None, dict.fromkeys(_CHECKS)
    return {
        "epsilon": epsilon,
        "delta": delta,
        "epsilon_cross_checks": checks,
        "events": [asdict(event) for event in charge.events],
        "rounds_used": charge.rounds,
        "ledger_receipt": charge.receipt or None,
        "lifetime": dict(charge.lifetime) if charge.lifetime is not None else None,
        "lifetime_in_words": "The site's own ledger holds the total over all its runs and bounds it: "
        "`fedhypevae ledger show` at the site; the receipt proves which state of the ledger this run left.",
    }


@lru_cache(maxsize=64)
def _epsilons(events: tuple[PrivacyEvent, ...], delta: float) -> tuple[float | None, dict[str, float | None]]:
    checks = {name: _finite(accountant(events, delta)) for name, accountant in _CHECKS.items()}
    return _finite(epsilon_pld(events, delta)), checks


def _released(context: RunContext, public: bool) -> list[dict[str, Any]]:
    """Everything that leaves a site in the run, and what protects it."""
    method, plan = get_method(context.config.method), context.plan
    facts = "public: says nothing of records"
    released = [_release("facts", "before the run", sorted(REPLY_FIELDS["hello"]), facts)]
    shared = context.config.privacy.trust == "secagg"
    masked = "masked, the sum over the sites alone known; " if shared else ""
    if shared:
        names = sorted({field for kind in _SECAGG for field in REPLY_FIELDS[kind]} - REPLY_FIELDS["train"])
        what, when = "keys, sealed shares, signatures, shares of masks", "with each sum, five messages a site"
        released.append(_release(what, when, names, "random or encrypted: hide each site's vector in the sum"))
    spec = method.statistics(context)
    if spec is not None:
        values = sum(math.prod(shape) for shape in spec.shapes.values())
        protection = f"{masked}noised and charged" if plan.statistics_noise else "none"
        released.append(_release("statistics", "once, before training", sorted(spec.shapes), protection, values))
    if plan.num_rounds:
        shapes = method.shapes_from(context, 0)
        values = sum(math.prod(shape) for shape in shapes.values())
        protection = f"{masked}clipped, noised and charged" if method.private and plan.training_noise else "none"
        when = f"once in each of {plan.num_rounds} rounds, all rounds released"
        released.append(_release("sums of gradients", when, sorted(shapes), protection, values))
    receipts = "public: follows from what was asked; a receipt is a salted digest, a seal its MAC under the site's key"
    released.append(_release("charges and receipts", "with each release", sorted(REPLY_FIELDS["train"]), receipts))
    errors = "a code and a reference; no text"
    released.append(_release("errors", "where a site refuses or fails", ["error", "reference"], errors))
    if public:
        released.append(_release("scores", "once", list(SCORE_NAMES), "data declared public; not charged"))
    return released


def _generator(privacy: PrivacyConfig) -> str:
    exact = "; an exact discrete Gaussian sampler for the one-shot statistics" if privacy.trust == "local" else ""
    return _GENERATOR[privacy.noise].format(exact=exact)


def _release(what: str, when: str, names: Sequence[str], protection: str, values: int | None = None) -> dict[str, Any]:
    return {"what": what, "when": when, "names": list(names), "values": values, "protection": protection}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"

"""A commented `policy.toml` for a site's people to read and change."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from client_app.policy.policy import SitePolicy
from common.errors import ConfigError


def policy_template(
    cohort_id: str,
    *,
    lifetime_epsilon: float = 3.0,
    lifetime_delta: float = 1e-5,
    run_epsilon: float = 3.0,
    **others: str | float | bool | tuple[str, ...],
) -> str:
    """A commented policy file for a person to read and change.

    Args:
        cohort_id: permanent name of the group of people the data is about.
        lifetime_epsilon: ε of everything ever released, positive.
        lifetime_delta: its δ; well below one over the number of units.
        run_epsilon: ε of one run, at most `lifetime_epsilon`.
        others: other fields of `SitePolicy`.

    Returns:
        Text that `load_policy` reads.

    Raises:
        ConfigError: a value that no policy may have.
    """
    given = {
        "cohort_id": cohort_id,
        "lifetime_epsilon": lifetime_epsilon,
        "lifetime_delta": lifetime_delta,
        "run_epsilon": run_epsilon,
        **others,
    }
    try:
        policy = SitePolicy.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"no policy may say this: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
    lines = [
        "# What this site allows a server to ask for, checked before the data is opened.",
        "# Lines that are left out take the value that protects most; unknown lines are refused.",
    ]
    for name, comment in _COMMENTS.items():
        value = getattr(policy, name)
        lines.append("")
        lines.extend(f"# {line}" for line in comment)
        lines.append(f"# {name} = 4" if value is None else f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


_COMMENTS: dict[str, tuple[str, ...]] = {
    "cohort_id": ("Permanent name of the people the data is about. The ledger belongs to it for ever.",),
    "lifetime_epsilon": (
        "Privacy budget of everything ever released about them, over all runs, for adding or removing one unit.",
    ),
    "lifetime_delta": ("The delta at which both epsilons are counted; far below one over the number of units.",),
    "run_epsilon": (
        "Budget of one run. A little above what runs ask for leaves room to repeat a round after a crash.",
    ),
    "unit": ('Whom one unit stands for: "record", or "patient" where the data names each record\'s patient.',),
    "max_records_per_patient": ('How many records of one patient may be used; needed with unit = "patient".',),
    "min_clip_norm": ("Smallest clipping norm C: below 1e-6 float32 could no longer hold contributions to it.",),
    "max_clip_norm": ("Largest clipping norm C.",),
    "max_sampling_rate": ("Largest share of the units in one step.",),
    "min_noise_multiplier": ("Smallest noise multiplier sigma of any release.",),
    "max_num_steps": ("Most private steps in one run.",),
    "allowed_methods": ("Methods whose code the site trusts.",),
    "allowed_encoder_training": (
        'How the site\'s encoder may be trained: "sleep" and "joint" are covered by the guarantee,',
        '"unprotected" is not, and makes everything that leaves say so.',
    ),
    "allowed_trust": (
        '"local": this site\'s own noise protects it from the server. "secagg": the server sees the sum of all sites',
        "alone, and each site adds a share of the noise; needs peers.json with the other sites' public keys.",
    ),
    "least_colluders": (
        "Under secagg, how many other sites may work with the server, at least; if a run assumes fewer, this site",
        "is charged for the noise that would be left.",
    ),
    "data_is_public": ("True only for public data (simulations, demos): then runs without noise are allowed.",),
    "metrics_may_leave": ("Whether scores on the site's data may leave; only for public data.",),
    "allow_test_noise": ("Whether noise from a known seed is allowed; only for public data.",),
    "approved_app_digests": (
        "SHA-256 of the app packages that the site read and approved, one for each app. None: none may run.",
    ),
    "close_idle_runs_after_hours": (
        "A run silent for so long is ended for good when another needs what it did not use.",
    ),
    "ledger": ("The privacy ledger, on a local disk; a relative name counts from this file's folder.",),
    "witness": (
        "A second place, best on another disk or machine, that shows when an old ledger was put back. It shows nothing",
        "where both are put back: keep it out of the ledger's backups. Empty: none, and the server's receipts are all.",
    ),
}


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(part) for part in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in TOML

"""A commented `policy.toml` for a site's people to read and change."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from client_app.policy.policy import SitePolicy
from common.errors import ConfigError
from common.templates import fill


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
    return fill(Path(__file__).with_name("policy.toml.j2"), {"policy": policy})

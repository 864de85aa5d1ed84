"""When a reply that depends on records may leave: at public times alone, whatever its records made a step take."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from common.errors import ConfigError
from common.wire.allow_list import Kind

# What depends on records, and what waits for the same run's lock: its reply would show when a step beside it ends.
_SCHEDULED: frozenset[Kind] = frozenset(
    {"consent", "statistics", "train", "secagg_keys", "secagg_shares", "secagg_check", "secagg_masked", "secagg_unmask"}
)
_LONGEST_S = 3600.0


def reply_seconds(node_config: Mapping[str, object], kind: Kind) -> float:
    """The schedule's step for a kind of message: `reply_seconds` of site.toml; 0 where replies go at once.

    Raises:
        ConfigError: what the site was started with is no such number.
    """
    seconds = node_config.get("reply-seconds", 0.0)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0.0 <= seconds <= _LONGEST_S:
        raise ConfigError(f"reply_seconds in site.toml must lie between 0 and {_LONGEST_S:g}, found {seconds!r:.80}")
    return float(seconds) if kind in _SCHEDULED else 0.0


def wait_for_turn(arrived: float, step: float) -> None:
    """Sleep until the next whole multiple of a step after a message's arrival.

    Args:
        arrived: by `time.monotonic`.
        step: seconds; 0 does not wait. Longer than a site's own steps ever take, it leaves nothing to be measured.
    """
    if step > 0:
        elapsed = time.monotonic() - arrived
        time.sleep(max(math.ceil(elapsed / step), 1) * step - elapsed)

"""The names of the sites that the coordinator registered, by node: the server's own knowledge of who is who."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.errors import ConfigError

# Where the register lies: set by whatever starts a deployed server; a simulation has none.
REGISTER = "FEDHYPEVAE_REGISTER"
REVOKED = "revoked"


def registered_names() -> dict[int, str] | None:
    """Node id -> name of the sites that are registered now; None where there is no register.

    Flower lets in only nodes that hold a registered key, so a node id stands for the key.

    Raises:
        ConfigError: the register can't be read.
    """
    place = os.environ.get(REGISTER)
    return None if not place else read_names(Path(place))


def read_names(path: Path) -> dict[int, str]:
    """Node id -> name of the sites in a register that are not revoked; empty where nobody was registered yet."""
    try:
        sites = json.loads(path.read_text(encoding="utf-8"))
        return {int(site["node_id"]): str(site["name"]) for site in sites if site["status"] != REVOKED}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} can't be read ({type(error).__name__}): restore it from a copy") from None

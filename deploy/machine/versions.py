"""Versions that all machines of a federation must share."""

from __future__ import annotations

import sys
from importlib import metadata

SAME_RELEASE = ("fedhypevae", "flwr", "torch", "safetensors")


def versions() -> dict[str, str]:
    """Python's and the packages' versions here, as `provision` writes them down for the sites."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in SAME_RELEASE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found

"""Versions that all machines of a federation must share, and those that this program needs."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

SAME_RELEASE = ("fedhypevae", "flwr")


def versions() -> dict[str, str]:
    """The versions here that must be the server's, as `provision` writes them down for the sites."""
    return {name: _version(name) for name in SAME_RELEASE}


def unmet() -> list[str]:
    """What this program needs and this machine lacks, each as pip takes it: `torch>=2.6 (here: 2.4.1)`."""
    needed = [Requirement(line) for line in metadata.requires(SAME_RELEASE[0]) or ()]
    return [
        f"{one.name}{one.specifier} (here: {_version(one.name)})"
        for one in needed
        if (one.marker is None or one.marker.evaluate({"extra": ""}))
        and (_version(one.name) == "none" or not one.specifier.contains(_version(one.name), prereleases=True))
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"

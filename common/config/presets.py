"""Named sets of settings, and how a run's settings come together: default < preset < named keys < `expert`.

Flower lets a run set only what the app's own settings list. They list what most people change; `expert` is one string
with any other key: `expert = "momentum=0.9 hidden-widths=64,128"`. A preset names only what it changes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from common.config.run import RunConfig, Scalar
from common.errors import ConfigError

# The first paper prints no sizes: these are of the DP-CVAE that it compares with, and a trunk as its figure draws one.
PAPER_SIZES: Mapping[str, Scalar] = {
    "hidden-widths": "256",
    "latent-dim": 64,
    "code-dim": 32,
    "trunk-width": 64,
    "prior-width": 64,
    "label-embedding-dim": 16,
    "encoder-width": 256,
}
PRESETS: Mapping[str, Mapping[str, Scalar]] = {
    # What we would advise: the defaults, behind the README's table.
    "table": {},
    # `fedhypevae demo`: 6,000 images, a site's 960 of them to train on, and two minutes. Points are of accuracy and
    # balanced accuracy of the synthetic set, means of three seeds, against the default's value.
    "demo": {
        "alpha": 0.3,  # hospitals see different patients: where they are alike, a set is worth little to any of them
        "trust": "secagg",  # noise shared by all four
        "min-sites": 4,  # a demonstration shows all four
        "num-rounds": 25,  # two minutes: each round is seconds of Flower's, whatever is computed
        "learning-rate": 24.0,  # a quarter of the rounds needs larger steps: 1.0 and 0.9 points
        "generator-rate": 0.02,  # in so few rounds larger steps lose: 0.2 and 0.6 points
        "statistics-share": 0.05,  # fewer records make worse class means: 0.4 and 0.3 points
        "synthetic-rows": 11_000,  # a thousand of each class: a file that opens at once
        "output-dir": "outputs/demo",
    },
    # The first paper's objective and parts, with the promise kept: `encoder-training=unprotected` is as printed.
    "paper": {
        "encoder-training": "joint",  # Eq. 8 on records, certified
        **PAPER_SIZES,
        "elbo-weight": 1.0,  # Eq. 1 alone, without our discriminative term
        "discriminative-weight": 0.0,
        "momentum": 0.0,  # Eq. 10 is a plain step
        "averaging-fraction": 0.0,
        "mmd": "per-example",  # Eq. 6
        "lipschitz-penalty": 0.1,  # Eq. 5
        "covariance-weight": 1.0,  # Eq. 11
        "printed-rows": True,  # Eqs. 12 and 13
        "num-codes": 4,
    },
}


def read_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """Settings from `KEY=VALUE` words; `RunConfig` reads the values by each field's type.

    Raises:
        ConfigError: a word has no key or no `=`.
    """
    parts = {pair: pair.partition("=") for pair in pairs}
    for pair, (key, equals, _) in parts.items():
        if not key or not equals:
            raise ConfigError(f"a setting is KEY=VALUE, found {pair!r:.200}")
    return {key.strip(): value.strip() for key, _, value in parts.values()}


def resolve(named: Mapping[str, Scalar]) -> RunConfig:
    """The configuration of a run from the settings that somebody named, `preset` and `expert` among them.

    Args:
        named: key -> value.

    Raises:
        ConfigError: a setting is unknown, out of range or contradicts another; there is no such preset.
    """
    others = dict(named)
    preset, expert = str(others.pop("preset", "table")), str(others.pop("expert", ""))
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r:.100}: expected one of {', '.join(PRESETS)}")
    try:
        words = shlex.split(expert)
    except ValueError as error:
        raise ConfigError(f"expert is KEY=VALUE words with spaces between, found {expert!r:.200}: {error}") from None
    return RunConfig.from_flat({**PRESETS[preset], **others, **read_pairs(words)})


def resolve_listed(listed: Mapping[str, Scalar]) -> RunConfig:
    """The configuration of a run from all that Flower hands over: a listed key at its default counts as not named.

    So a preset's value stands against a default that somebody typed; `expert` wins always.
    """
    defaults = RunConfig().to_flat()
    return resolve({key: value for key, value in listed.items() if key not in defaults or value != defaults[key]})


def as_expert(config: RunConfig) -> str:
    """The `expert` that makes a configuration, whatever else the app's own settings say."""
    return shlex.join(f"{key}={value}" for key, value in config.to_flat().items())

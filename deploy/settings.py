"""How every command makes a run's configuration, and hands it to Flower."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.config.presets import as_expert, read_pairs, resolve
from common.config.run import RunConfig, Scalar
from common.methods import method_of


def run_config(pairs: Sequence[str] | None = None, preset: str = "table", **options: Scalar | None) -> RunConfig:
    """The configuration of a run: default < preset < the command's options < `--set`.

    Args:
        pairs: what `--set` gave, each KEY=VALUE.
        preset: whose differences hold where nothing else is named.
        options: settings that a command has options for (`num_rounds=3`); None where the option was not used.

    Raises:
        ConfigError: a setting is unknown, out of range or contradicts another; no method carries them out.
    """
    used = {key.replace("_", "-"): value for key, value in options.items() if value is not None}
    config = resolve({"preset": preset, **used, **read_pairs(pairs or [])})
    method_of(config)
    return config


@contextmanager
def settings_file(config: RunConfig) -> Iterator[Path]:
    """A file for `flwr run --run-config` that makes the run's configuration this one; gone afterwards.

    It names every setting, so that what this command has checked is what runs, whatever the app's pyproject.toml says.
    """
    with tempfile.TemporaryDirectory(prefix="fedhypevae-settings-") as folder:
        file = Path(folder) / "settings.toml"
        file.write_text(f"expert = {json.dumps(as_expert(config), ensure_ascii=False)}\n", encoding="utf-8")
        yield file

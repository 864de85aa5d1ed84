"""Text files that are filled in from a template beside the module that writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path


def fill(template: Path, values: Mapping[str, object], filters: Mapping[str, Callable[..., str]] | None = None) -> str:
    """A template's text with its values; a name that is missing is an error of the program.

    Args:
        template: a Jinja file. The filter `json` writes texts, numbers, booleans and lists as JSON, and TOML, do.
        values: what it names; nothing is escaped.
        filters: further filters, by name.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"json": lambda value: json.dumps(value, ensure_ascii=False), **(filters or {})}
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)

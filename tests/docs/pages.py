"""The documentation as a test sees it: its pages, and the commands that stand in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCED = re.compile(r"^( *)```[a-z]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def commands(page: Path) -> list[str]:
    """Each `fedhypevae ...` that a page shows, of blocks and of sentences, in its order and without remarks."""
    text = page.read_text(encoding="utf-8")
    lines = _FENCED.sub(lambda block: "\n".join(f"`{line}`" for line in _lines(block[2])), text)
    found = [" ".join(one.split("  #")[0].split(" #")[0].split()) for one in _INLINE.findall(lines)]
    return [one for one in found if one.startswith("fedhypevae ")]


def _lines(block: str) -> list[str]:
    return [line.strip() for line in re.sub(r"\\\n\s*", " ", block).splitlines() if line.strip() and "`" not in line]

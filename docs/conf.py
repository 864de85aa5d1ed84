"""How Sphinx makes the documentation: `make docs`. Nothing is fetched, and a warning ends the build."""

from importlib import metadata
from typing import Any

project = "FedHypeVAE"
author = "The FedHypeVAE authors"
release = metadata.version("fedhypevae")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a field is described where it is declared, once
napoleon_custom_sections = ["Source", "Departs"]
highlight_language = "none"

html_theme = "furo"
html_title = "FedHypeVAE"
html_show_sourcelink = False
html_static_path = ["_static"]
html_js_files = ["access.js"]


def _bars_are_norms(app: Any, what: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: a bar in them is no substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _bars_are_norms)

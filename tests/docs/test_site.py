"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, and fits a telephone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, axe_source
from tests.docs.pages import PAGES, ROOT

NAMES = [page.stem for page in PAGES if page.parent.name == "docs"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "cache"), str(ROOT / "docs"), str(out / "html")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser.start() as started:
        yield started


@pytest.mark.parametrize("name", NAMES)
def test_page_fits_loads_nothing_from_elsewhere_and_is_accessible(site: Path, browser: Browser, name: str) -> None:
    for width in (1280, 390):
        page = browser.open(site / f"{name}.html", width)
        assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
        assert page.errors == []
        assert page.run("document.documentElement.scrollWidth") <= width
    found = page.run(axe_source() + ";axe.run().then(found => found.violations)")
    assert [(one["id"], one["impact"], [node["html"][:90] for node in one["nodes"]][:2]) for one in found] == []

"""The report pages of a real run: what they say, where they lie, and how a browser shows them."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from client_app.ledger import upkeep
from deploy.report.run import read_run, render_run
from embeddings.quality.quality import inspect
from embeddings.quality.quality_page import render_page
from embeddings.store.file import read_store
from tests.browser import Browser, axe_source
from tests.deploy.release_cases import release, run_federation
from tests.deploy.report_cases import Reported, command, make_reported
from tests.harness import Federation, make_identity, make_set

PAGES = ("run", "site", "quality")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    return make_reported(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser.start() as started:
        yield started


def page_of(reported: Reported, name: str) -> Path:
    if name == "quality":
        path = reported.site.folder / "quality.html"
        if not path.exists():
            data = read_store(reported.site.folder / "site.parquet")
            path.write_text(render_page("x", data, inspect(data, np.random.default_rng(0)), np.random.default_rng(0)))
        return path
    return {"run": reported.run_page, "site": reported.site_page}[name]


def words_of(page: str) -> str:
    """A page's text, without pictures and tags."""
    bare = re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(bare))


def test_run_page_tells_what_was_spent_who_was_missing_and_what_is_not_protected(reported: Reported) -> None:
    words = words_of(reported.run_page.read_text())
    statement = json.loads((reported.run / "privacy_statement.json").read_text())
    for name, site in statement["sites"].items():
        assert f"{name} {site['epsilon']:.2f} of 3" in words
        assert f"{site['epsilon']:.3f}" in words
    assert "Differentially private from end to end" in words
    assert re.search(r"Missing, and why round site why 2 site-3 did not answer in time", words)
    assert all(line in words for line in statement["not_covered"])
    assert all(item["protection"] in words for item in statement["released"])
    scores = json.loads((reported.run / "summary.json").read_text())["scores"]["mixed"]["per_site"]
    assert all(f"{100 * values['balanced_accuracy']:.1f}" in words for values in scores.values())
    assert "By class" in words
    assert "code 1 (" in words


def test_run_page_keeps_a_history_of_epsilon(reported: Reported) -> None:
    summary = json.loads((reported.run / "summary.json").read_text())
    words = words_of(reported.run_page.read_text())
    table = re.search(r"The numbers of “Privacy spent, round by round” (.*?) Who answered", words)
    assert table is not None
    for entry in summary["history"]:
        row = [f"{entry['epsilon'][site]:.3g}" for site in ("site-1", "site-2", "site-3")]
        assert f"{entry['round']} {' '.join(row)}" in table[1]
    assert summary["history"][1]["epsilon"]["site-3"] == summary["history"][0]["epsilon"]["site-3"]  # it missed round 2


def test_run_page_without_scores_says_where_they_are(reported: Reported) -> None:
    facts = read_run(reported.run)
    page = render_run(dataclasses.replace(facts, summary={**facts.summary, "scores": {}, "history": []}))
    assert "Scores stayed at the sites" in page
    assert "kept no history" in page


def test_run_page_of_an_unprotected_run_says_so_first(tmp_path: Path) -> None:
    federation = Federation.create(
        tmp_path, num_sites=2, data_is_public=True, metrics_may_leave=True, allow_test_noise=True
    )
    federation.run(num_rounds=1, noise="test")
    page = words_of(render_run(read_run(federation.output)))
    assert "Not private: do not publish this set" in page
    assert "test source with a known seed" in page
    assert "Differentially private from end to end" not in page


@pytest.mark.parametrize(("method", "figures"), [("fedavg", 3), ("dp_gauss", 2)])
def test_run_page_of_a_method_without_a_generator_or_without_rounds(tmp_path: Path, method: str, figures: int) -> None:
    policy = {"data_is_public": True, "metrics_may_leave": True, "allowed_methods": (method,)}
    federation = Federation.create(tmp_path, num_sites=2, **policy)
    federation.run(num_rounds=1, method=method, public_total=100)
    page = render_run(read_run(federation.output))
    assert page.count("<figure>") <= figures
    words = words_of(page)
    if method == "fedavg":
        assert "Not private" in words
        assert "site-1 not protected" in words
        assert "this run has no guarantee" in words
    else:
        assert "Differentially private from end to end" in words


def test_report_refuses_what_is_no_completed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("report", tmp_path) == 2
    assert "summary.json can't be read" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text("{")
    assert command("report", tmp_path) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "summary.json"]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_one_file_that_loads_nothing(reported: Reported, name: str) -> None:
    page = page_of(reported, name).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert "default-src 'none'" in page
    images = re.findall(r"<img [^>]*>", page)
    assert images
    assert all(re.search(r'alt="[^"]{8,}"', image) for image in images)


def test_site_page_shows_its_images_scores_and_ledger(reported: Reported) -> None:
    page = reported.site_page.read_text()
    words = words_of(page)
    assert page.count("data:image/jpeg;base64,") == 8  # a middling record of each of three classes, and five extremes
    with reported.site.ledger() as ledger:
        spent = upkeep.spent(ledger, 1e-5)
    assert f"{spent.epsilon:.2f} of 8" in words
    assert f"{spent.runs[0].epsilon:.3f}" in words
    assert f"{len(reported.site.releases())} " in words
    assert "own data only" in words
    assert words.count("too few") == 0


def test_site_page_can_be_read_by_its_owner_alone_and_written_nowhere_else(
    reported: Reported, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stat.S_IMODE(reported.site_page.stat().st_mode) == 0o600
    outside = reported.site.folder.parent / "outside.html"
    options = ("--bundle", reported.run, "--no-umap", "--page", "../outside.html")
    assert command("site", "report", reported.site.folder, *options) == 2
    assert "stays there" in capsys.readouterr().err
    assert not outside.exists()


def test_site_report_refuses_a_bundle_of_another_encoder(
    reported: Reported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_identity(dim=make_set(1).dimension)
    records = make_set(60)
    changed = dataclasses.replace(records.metadata, identity=dataclasses.replace(other, weights_digest="1" * 64))
    federation = Federation.create(tmp_path, num_sites=1, sets={0: dataclasses.replace(records, metadata=changed)})
    assert command("site", "report", federation.sites[0].folder, "--bundle", reported.run, "--no-umap") == 2
    assert "weights_digest" in capsys.readouterr().err
    assert not (federation.sites[0].folder / "report.html").exists()


def pictures_of(page: Path) -> list[bytes]:
    """The pictures of a page, whole and as they stand in it: of two charts, parts may be the same, such as a label."""
    return [found.encode() for found in re.findall(r'data:image/(?:png|jpeg);base64,([^"]+)', page.read_text())]


def test_real_embeddings_of_a_site_page_are_in_the_sites_folder_alone(reported: Reported) -> None:
    folder = reported.site.folder
    rows: NDArray[np.float32] = read_store(folder / "site.parquet").embeddings
    pictures = pictures_of(reported.site_page)
    assert len(pictures) > 8
    marks = [row.tobytes()[:16] for row in rows] + pictures + [base64.b64decode(picture) for picture in pictures]
    sent = b"".join(seen.wire for seen in reported.federation.traffic)
    others = [
        path
        for path in reported.federation.home.rglob("*")
        if path.is_file() and folder not in path.parents and reported.images not in path.parents
    ]
    assert reported.run_page in others
    content = {path: path.read_bytes() for path in others}
    table = pq.read_table(reported.run / "synthetic.parquet")
    content[reported.run / "synthetic.parquet"] = np.asarray(table["embedding"].combine_chunks().flatten()).tobytes()
    assert not [mark for mark in marks if mark in sent]
    assert not [path for path, held in content.items() if any(mark in held for mark in marks)]
    content[reported.run_page] += pictures[2]  # the search itself finds what is there
    assert [path for path, held in content.items() if any(mark in held for mark in marks)] == [reported.run_page]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_browser_shows_the_page_whole(reported: Reported, browser: Browser, name: str, width: int) -> None:
    page = browser.open(page_of(reported, name), width)
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.errors == []
    assert page.run("document.documentElement.scrollWidth") <= width
    pixels, boxes = page.screenshot(), page.boxes("figure img")
    assert boxes
    for left, top, right, bottom in boxes:
        assert is_drawn(pixels[top:bottom, left:right]), (name, width, (left, top, right, bottom))


@pytest.mark.parametrize("name", PAGES)
def test_page_has_no_serious_fault_of_accessibility(reported: Reported, browser: Browser, name: str) -> None:
    page = browser.open(page_of(reported, name), 390)
    page.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert faults(page.run(axe_source() + ";axe.run().then(found => found.violations)")) == []


def test_browser_checks_can_fail(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<html><body><p style='color:#ccc'>pale</p><img src='https://example.invalid/x.png'>"
        "<div id=blank style='width:90px;height:90px;background:#eee'></div>"
        "<script>console.error('oh'); missing()</script></body></html>"
    )
    page = browser.open(bad, 390)
    assert "https://example.invalid/x.png" in page.requests
    assert len(page.errors) >= 3
    left, top, right, bottom = page.boxes("#blank")[0]
    assert not is_drawn(page.screenshot()[top:bottom, left:right])
    found = faults(page.run(axe_source() + ";axe.run().then(found => found.violations)"))
    assert {"color-contrast", "image-alt"} <= set(found)


def is_drawn(pixels: NDArray[np.uint8]) -> bool:
    """Whether a part of a page shows more than one flat colour, over more than a speck of it."""
    if min(pixels.shape[:2]) < 40:
        return False
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    return bool((np.abs(pixels - ground).max(axis=2) > 30).mean() > 0.005)


def faults(violations: list[dict[str, object]]) -> list[object]:
    """Identifiers of the serious and critical findings of axe."""
    return [found["id"] for found in violations if found["impact"] in ("serious", "critical")]


def test_report_of_a_bundle_is_made_from_what_is_published_and_leaves_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page of a run without its summary: promises, charges, the set; no rounds and no scores; signed files stay."""
    run, key, bundle = run_federation(tmp_path / "home").output, tmp_path / "key.pem", tmp_path / "bundle"
    assert release(run, bundle, key).exit_code == 0
    before = sorted(path.name for path in bundle.rglob("*"))
    assert command("report", bundle) == 0
    page = (tmp_path / "bundle-report.html").read_text()
    assert "Differentially private from end to end" in page
    assert "A bundle holds no scores" in page
    assert "two-world" in page or "one-run" in page  # its audit
    assert page.count("data:image/") >= 2
    assert "site-1" in page
    assert command("report", bundle, "--out", bundle / "report.html") == 2
    assert "signed" in capsys.readouterr().err
    assert sorted(path.name for path in bundle.rglob("*")) == before

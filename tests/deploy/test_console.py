"""Names from elsewhere, printed and put into pages: no markup, no control character, nothing hidden."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

from client_app.policy.template import policy_template
from common.wire.identity import EncoderIdentity
from deploy.console import console, said, say, working
from deploy.release.describe import plain as markdown
from deploy.report.draw import as_picture, new_figure
from embeddings.quality.page import render
from embeddings.quality.pictures import class_balance
from embeddings.store.sets import EmbeddingSet, SetMetadata
from embeddings.store.writing import write_store
from tests.deploy.site.test_app_guard import ROOT
from tests.deploy.test_embed_command import _run

EVIL = "[red]x[/red][link=http://e]y[/link] :smile: \x1b[2Jz\u202ew\u200b\x07\r\x9b2K[/]"
SHOWN = "[red]x[/red][link=http://e]y[/link] :smile: \\x1b[2Jz\\u202ew\\u200b\\x07\\r\\x9b2K[/]"
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


def test_say_and_tables_show_a_name_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    say(f"{EVIL}\nsecond line")
    say(EVIL, err=True)
    printed = console()
    printed.print(EVIL, soft_wrap=True)
    table = Table("name", EVIL, title=EVIL)
    table.add_row(EVIL, "1")
    console().print(table)
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 5
    assert err.count(SHOWN) == 1
    assert "\nsecond line\n" in out
    assert HIDDEN.search(out + err) is None


def test_status_words_are_no_markup() -> None:
    assert said(EVIL).plain == SHOWN
    assert working(EVIL).renderable.text.plain == SHOWN  # type: ignore[union-attr]


def test_commands_print_by_these_alone() -> None:
    """No command has a console or an echo of its own: a name would be markup there."""
    places = [
        *(ROOT / "deploy").glob("commands/*.py"),
        ROOT / "deploy" / "simulation" / "demonstration.py",
        ROOT / "deploy" / "cli.py",
    ]
    for path in places:
        text = path.read_text()
        assert not re.search(r"typer\.echo\(|[^.\w]print\(|rich\.console|[^.\w]Console\(|rich import print", text), path


def test_data_check_shows_names_of_classes_and_files_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (EVIL.replace("\r", ""), "</td><script>alert(1)</script>")
    identity = EncoderIdentity("enc", "r1", 4, "none", "0" * 64, "float32", names)
    rng = np.random.default_rng(0)
    rows = EmbeddingSet(rng.standard_normal((40, 4)).astype(np.float32), np.arange(40) % 2, SetMetadata(identity))
    store = tmp_path / "a[b]\u202e.parquet"
    write_store(store, dataclasses.replace(rows))
    assert _run(monkeypatch, "data", "check", store) == 0
    out, err = capsys.readouterr()
    assert HIDDEN.search(out.replace("\n", "") + err.replace("\n", "").replace("\r", "")) is None
    assert "a[b]\\u202e.parquet" in out.replace("\n", "")
    page = (tmp_path / (store.name + ".html")).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert HIDDEN.search(page) is None


def test_error_line_shows_a_name_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "data", "check", tmp_path / "none\x1b[2J.parquet") == 2
    assert "none\\x1b[2J.parquet" in capsys.readouterr().err


def test_pages_and_cards_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.html.j2").write_text("{{ name }}")
    assert render(tmp_path / "x.html.j2", name="<b>\u202e\x1b") == "&lt;b&gt;\\u202e\\x1b"
    assert HIDDEN.search(markdown(EVIL)) is None
    assert markdown("a|b\u202e`c`\n# d") == "a\\|b\\\\u202e\\`c\\` \\# d"


def test_ledger_s_cohort_is_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert policy_template("[bold]x[/bold]")
    assert _run(monkeypatch, "ledger", "create", tmp_path / "l.db", "--cohort", "[bold]x[/bold]") == 0
    assert _run(monkeypatch, "ledger", "show", tmp_path / "l.db") == 0
    assert "[bold]x[/bold]" in capsys.readouterr().out


def test_names_in_pictures_are_no_formulas() -> None:
    for name in ("$\\frac{$", "$x$\x1b\u202e"):
        assert class_balance([3, 4], [name, "b"]).startswith(b"\x89PNG")
    figure, axes = new_figure()
    axes.text(0, 0, "$\\frac{$")
    assert as_picture(figure, "t", "c", "a", None).uri.startswith("data:image/svg+xml")

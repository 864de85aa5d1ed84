"""`fedhypevae site pin`: the list that secure aggregation holds keys against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError
from common.secagg.primitives import load_public
from deploy.cli import app
from deploy.machine.keys import make_node_key
from deploy.site.folder import SiteFolder, SiteSettings
from deploy.site.peers import pin_peers, read_pairs


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, SiteFolder]:
    made = {}
    for name in ("anna", "bernard", "clara"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "site.toml").write_text(SiteSettings(name=name, server="server:9092").write())
        make_node_key(folder / "keys" / "node")
        made[name] = SiteFolder(folder)
    return made


def public(site: SiteFolder) -> Path:
    return site.node_key.with_suffix(".pub")


def test_pin_writes_all_names_and_keys(sites: dict[str, SiteFolder]) -> None:
    folder = sites["anna"].path
    words = [f"{name}={public(sites[name])}" for name in ("bernard", "clara")]
    done = CliRunner().invoke(app, ["site", "pin", str(folder), *words])
    assert done.exit_code == 0, done.output
    lines = json.loads((folder / "peers.json").read_text())
    assert sorted(lines) == ["anna", "bernard", "clara"]
    assert all(load_public(line) for line in lines.values())
    assert (folder / "peers.json").stat().st_mode & 0o077 == 0


def test_pin_refuses_wrong_files(sites: dict[str, SiteFolder], tmp_path: Path) -> None:
    anna, bernard = sites["anna"], sites["bernard"]
    bad = [
        {"bernard": bernard.node_key},  # the private half
        {"bernard": tmp_path / "nowhere.pub"},
        {"bernard": public(bernard), "clara": public(bernard)},
        {"bernard": public(anna)},
        {"anna": public(bernard)},
    ]
    for others in bad:
        with pytest.raises(ConfigError):
            pin_peers(anna, others)
    assert not (anna.path / "peers.json").exists()


@pytest.mark.parametrize("words", [["bernard"], ["=x"], ["bernard="], ["a=x", "a=y"]])
def test_pairs_of_another_form_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        read_pairs(words)

"""A real server and four real sites under `trust = "secagg"`; one is killed in the middle of a round, and is borne."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from common.config.presets import resolve
from common.config.run import Scalar
from deploy.coordinator.run import follow, start_run
from tests.integration.federation_cases import Federation, demo_data, running, wait_for

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(1800)]
SITES = 4
SETTINGS: dict[str, Scalar] = {
    "num-rounds": 3,
    "num-sites": SITES,
    "min-sites": 2,
    "round-timeout": 200.0,
    "epsilon": 2.0,
    "synthetic-rows": 500,
    "meta-steps": 20,
    "trust": "secagg",
    "output-dir": "shared",
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with running(Federation(tmp_path_factory.mktemp("shared"), SITES, data=demo_data(SITES, 300))) as made:
        peers = {name: site.node_key.with_suffix(".pub").read_text() for name, site in made.sites.items()}
        for site in made.sites.values():
            (site.path / "peers.json").write_text(json.dumps(peers))
            policy = site.path / "policy.toml"
            policy.write_text(policy.read_text().replace('["local"]', '["local", "secagg"]'))
        made.bring_up()
        yield made


def masked_of(federation: Federation, name: str, round_key: str) -> bool:
    """Whether a site has just sent its masked vector of a round and waits to be asked for shares."""
    for path in (federation.sites[name].path / "state").glob("*/secagg.json"):
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError):  # it is being erased
            continue
        if values["round_key"] == round_key and values["payload_digest"]:
            return True
    return False


def test_site_killed_in_mid_round_is_borne(federation: Federation) -> None:
    run = start_run(federation.server, federation.app, resolve(SETTINGS))
    wait_for("site-4 masks round 2", lambda: masked_of(federation, "site-4", "round-2"), 600, 0.05)
    federation.running.pop("site-4").kill()
    output = follow(federation.server, run, resolve(SETTINGS), print, patience_s=1200)
    summary = json.loads((output / "summary.json").read_text())
    everyone = ["site-1", "site-2", "site-3", "site-4"]
    taken = summary["rounds_taken_part"]
    assert summary["status"] == "completed"
    assert taken[0] == everyone
    assert taken[1] in (everyone, everyone[:3])  # its vector may have reached the server before the kill
    assert taken[2] == everyone[:3]
    for name in everyone[:3]:
        lines = (federation.sites[name].path / "releases.jsonl").read_text().splitlines()
        charged = [release["round_key"] for release in map(json.loads, lines) if release["events"]]
        assert charged == ["statistics", "round-1", "round-2", "round-3"]
        assert not list(federation.sites[name].path.rglob("secagg.json"))

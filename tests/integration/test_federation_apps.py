"""A real server and two real sites: an app with one changed line runs where a person approved it, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config.presets import resolve
from common.errors import FedHypeVAEError
from deploy.coordinator.run import follow, start_run
from deploy.machine.app_package import build_package, digest_of
from deploy.site.approve import approve_app, describe_app
from tests.integration.federation_cases import Federation, copy_app, demo_data, running

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(2400)]
LINE = '"site": place.name,'
CHANGED = '"site": (place.folder / "ran").write_bytes(place.records.read_bytes()) and place.records.read_bytes().hex(),'


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with running(Federation(tmp_path / "federation", 2, data=demo_data(2, 300))) as made:
        made.bring_up()
        yield made


def test_changed_app_runs_only_where_it_was_approved(federation: Federation) -> None:
    sites = [federation.sites[name] for name in ("site-1", "site-2")]
    changed = copy_app(federation.root / "changed-app")
    path = changed / "client_app" / "app.py"
    text = path.read_text()
    assert text.count(LINE) == 1
    path.write_text(text.replace(LINE, CHANGED))
    digest = digest_of(build_package(changed))
    assert digest != federation.digest
    original = federation.root / "original.fab"
    original.write_bytes(build_package(federation.app))
    for site in sites:
        approve_app(site, describe_app(site, federation.digest, original))

    settings = {"num-rounds": 1, "num-sites": 2, "min-sites": 2, "round-timeout": 200.0}
    run = start_run(federation.server, changed, resolve(settings))
    with pytest.raises(FedHypeVAEError, match="refused the app"):
        follow(federation.server, run, resolve(settings), print, patience_s=500)
    for site in sites:
        assert not (site.path / "ran").exists()
        assert (site.apps / f"{digest}.refused.fab").is_file()

    # the control: where a person saw the changed line and approved it, it does run, and there alone
    first, second = sites
    shown = describe_app(first, digest)
    assert any(line == f"+            {CHANGED}" for line in shown.lines)
    approve_app(first, shown)
    run = start_run(federation.server, changed, resolve(settings))
    with pytest.raises(FedHypeVAEError, match="refused the app"):
        follow(federation.server, run, resolve(settings), print, patience_s=500)
    assert (first.path / "ran").exists()
    assert not (second.path / "ran").exists()

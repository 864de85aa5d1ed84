"""A run that a site joined after its statistics is published like any other: each was charged for its own rounds."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Message

from tests.deploy.release_cases import invoke, read, release
from tests.harness import Federation, Handler, HarnessSite


def test_run_that_a_site_joined_in_mid_run_is_released_and_verifies(tmp_path: Path) -> None:
    federation = Federation.create(
        tmp_path / "home", 3, data_is_public=True, metrics_may_leave=True, allow_test_noise=True
    )
    late = federation.site("site-3").node
    federation.absent.add(late)

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if message.metadata.group_id == "round-1":
            federation.absent.discard(late)
        return handler()

    summary = federation.run(num_rounds=2, num_sites=2, tamper=tamper)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"], ["site-1", "site-2", "site-3"]]
    done = release(federation.output, tmp_path / "bundle", tmp_path / "key.pem")
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    sites = read(tmp_path / "bundle" / "privacy_statement.json")["sites"]
    assert [sum(event["count"] for event in sites[name]["events"]) for name in sorted(sites)] == [3, 3, 1]
    checked = invoke("release", "verify", tmp_path / "bundle", "--quick")
    assert checked.exit_code == 0, checked.output

"""Sites that come, leave, or come back as another node while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from common.methods import get_method
from tests.harness import Federation, make_set

BOTH, ALL = ["site-1", "site-2"], ["site-1", "site-2", "site-3"]


def at_round(number: int, change: Callable[[], object]) -> Any:
    """A network on which something happens when a round's first message is sent."""
    happened = []

    def tamper(site: Any, message: Any, handler: Any) -> Any:
        if message.metadata.group_id == f"round-{number}" and not happened:
            happened.append(site.name)
            change()
        return handler()

    return tamper


def charges(federation: Federation, name: str) -> int:
    """Events that a site's ledger holds against its one run."""
    (run,) = federation.site(name).runs().values()
    return sum(event.count for event in run.charged)


def test_site_that_comes_late_takes_part_from_the_next_round_and_pays_for_no_other(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=3)
    federation.absent.add(federation.site("site-3").node)
    summary = federation.run(num_rounds=4, num_sites=2, tamper=at_round(2, federation.absent.clear))
    assert summary["rounds_taken_part"] == [BOTH, BOTH, ALL, ALL]
    assert summary["rounds_missing"] == [{}] * 4
    assert charges(federation, "site-1") == 1 + 4
    assert charges(federation, "site-3") == 2  # two rounds, and no statistics
    spent = summary["privacy"]["epsilon_spent_per_site"]
    assert 0 < spent["site-3"] < spent["site-1"]


def test_site_that_leaves_is_missing_from_then_on_and_the_run_says_so(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=3)
    gone = federation.site("site-2").node
    summary = federation.run(num_rounds=3, tamper=at_round(2, lambda: federation.absent.add(gone)))
    assert summary["rounds_taken_part"] == [ALL, ["site-1", "site-3"], ["site-1", "site-3"]]
    assert summary["rounds_missing"] == [{}, {"site-2": "left the federation"}, {"site-2": "left the federation"}]
    assert charges(federation, "site-2") == 1 + 1


def test_site_that_comes_back_as_another_node_keeps_its_index_and_ledger(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=3)
    old = federation.site("site-2")
    federation.sites.append(replace(old, node=999))  # a new key: another node, the same folder
    federation.absent.add(999)
    asked: list[tuple[int, int]] = []

    def swap() -> None:
        federation.absent.symmetric_difference_update({old.node, 999})

    change = at_round(2, swap)

    def tamper(site: Any, message: Any, handler: Any) -> Any:
        if site.name == "site-2" and message.metadata.message_type == "train":
            asked.append((site.node, int(message.content.config_records["words"]["index"])))
        return change(site, message, handler)

    summary = federation.run(num_rounds=3, num_sites=3, tamper=tamper)
    assert summary["rounds_taken_part"] == [ALL, ["site-1", "site-3"], ALL]
    assert asked == [(old.node, 1), (999, 1)]
    assert charges(federation, "site-2") == 1 + 2


def test_run_whose_noise_or_model_is_shared_out_takes_nobody_in() -> None:
    assert get_method("fedhypevae").takes_newcomers("local")
    assert not get_method("fedhypevae").takes_newcomers("secagg")
    assert not get_method("mh_pfedhn").takes_newcomers("local")


@pytest.mark.parametrize("why", ["another width", "a name that is taken"])
def test_newcomer_that_does_not_fit_is_told_of_and_charged_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    sets = {2: make_set(60, dim=9)} if why == "another width" else {}
    federation = Federation.create(tmp_path, num_sites=3, sets=sets)
    if why == "a name that is taken":
        federation.sites[2] = replace(federation.sites[2], name="site-1")
    late = federation.sites[2]
    federation.absent.add(late.node)
    summary = federation.run(num_rounds=3, num_sites=2, tamper=at_round(1, federation.absent.clear))
    assert summary["rounds_taken_part"] == [BOTH] * 3
    assert f"{late.name} came and is not taken in" in capsys.readouterr().out
    assert late.entries() == 1


def test_newcomer_that_hangs_or_talks_nonsense_does_not_stop_a_run(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=4)
    silent, odd = federation.site("site-3").node, federation.site("site-4").node
    federation.absent |= {silent, odd}
    appear = at_round(1, federation.absent.clear)

    def tamper(site: Any, message: Any, handler: Any) -> Any:
        if site.node == silent:
            return None
        if site.node == odd:
            return Message(RecordDict({"words": ConfigRecord({"site": "x", "position": "?"})}), reply_to=message)
        return appear(site, message, handler)

    summary = federation.run(num_rounds=4, num_sites=2, round_timeout=0.5, tamper=tamper)
    assert summary["rounds_taken_part"] == [BOTH] * 4
    assert summary["rounds_missing"] == [{}] * 4


def test_resumed_run_goes_on_with_who_came_late_and_without_who_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_app.meeting._RETURN_S", 0.2)
    federation = Federation.create(tmp_path, num_sites=3)
    first, last = federation.site("site-1").node, federation.site("site-3").node
    federation.absent.add(first)

    def die() -> None:
        raise SystemExit(137)

    come, stop = at_round(1, federation.absent.clear), at_round(3, die)

    def tamper(site: Any, message: Any, handler: Any) -> Any:
        come(site, message, lambda: None)
        return stop(site, message, handler)

    with pytest.raises(SystemExit):
        federation.run(num_rounds=4, num_sites=2, tamper=tamper)
    federation.absent.add(last)
    indices: set[tuple[str, int]] = set()

    def listen(site: Any, message: Any, handler: Any) -> Any:
        words = message.content.config_records["words"]
        if "index" in words:
            indices.add((site.name, int(words["index"])))
        return handler()

    summary = federation.run(num_rounds=4, num_sites=2, resume=True, run_id=2, tamper=listen)
    assert summary["rounds_taken_part"] == [["site-2", "site-3"], ALL, BOTH, BOTH]
    assert indices == {("site-2", 0), ("site-1", 2)}  # by name, though site-1 now sorts before the others
    assert charges(federation, "site-2") == 1 + 4

"""Whole runs under `trust = "secagg"`: sites that fall silent anywhere, ledgers, what the server ever sees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from scipy import stats

from client_app.records import load_records, split_data
from common.config.run import RunConfig
from common.loop import run_loop
from common.privacy.composition import epsilon_pld
from common.wire.reply_fields import REPLY_FIELDS
from tests.harness import CLASSES, SMALL, Federation, Handler, HarnessSite, Killed, words_of
from tests.secagg_cases import PHASES, ROUNDS_ONLY, SHARED, keyed_federation, phase_of, silent

PUBLIC = {"data_is_public": True, "metrics_may_leave": True, "allow_test_noise": True}
QUICK: dict[str, Any] = {**SHARED, "round_timeout": 0.5, "num_rounds": 3}
BARE: dict[str, Any] = {**QUICK, **ROUNDS_ONLY}


def events_of(site: HarnessSite) -> dict[str, int]:
    (run,) = site.runs().values()
    found: dict[str, int] = {}
    for event in run.charged:
        found[event.label] = found.get(event.label, 0) + event.count
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, dict[str, Any]]:
    federation = keyed_federation(tmp_path_factory.mktemp("ran"))
    return federation, federation.run(**SHARED)


def test_run_completes_and_every_ledger_holds_what_was_released(ran: tuple[Federation, dict[str, Any]]) -> None:
    federation, summary = ran
    assert summary["status"] == "completed"
    assert summary["privacy"]["trust"] == "secagg"
    assert summary["rounds_taken_part"] == [["site-1", "site-2", "site-3", "site-4"]] * 2
    for site in federation.sites:
        assert events_of(site) == {"statistics": 1, "training": 2}
        (run,) = site.runs().values()
        assert all(known.payload_digest is not None for known in run.rounds.values())
        assert [release.round_key for release in site.releases()] == ["statistics", "round-1", "round-2"]
        assert {release.payload_digest for release in site.releases()} == {
            known.payload_digest for known in run.rounds.values()
        }


def test_nothing_of_a_session_is_left_at_the_sites(ran: tuple[Federation, dict[str, Any]]) -> None:
    for site in ran[0].sites:
        assert not list(site.folder.rglob("secagg*"))


def test_server_sees_masked_vectors_keys_and_shares_alone(ran: tuple[Federation, dict[str, Any]]) -> None:
    federation, _ = ran
    kinds = {seen.kind for seen in federation.sent()}
    assert kinds == {"query.hello", "query.consent", *(f"query.{phase}" for phase in PHASES)}
    seen_bytes = []
    for seen in federation.sent():
        content, kind = seen.message.content, phase_of(seen.message)
        assert set(content.config_records["words"]) <= REPLY_FIELDS[kind]  # type: ignore[index]
        arrays = dict(content.array_records.get("tensors", {}))
        assert set(arrays) == ({"masked"} if kind == "secagg_masked" else set())
        assert not content.metric_records
        for array in arrays.values():
            values = array.numpy().astype(float)
            seen_bytes.append(values.astype(int))
            halves = values[: len(values) // 2 * 2].reshape(-1, 2)
            assert abs(np.corrcoef(halves.T)[0, 1]) < 6 / math.sqrt(len(halves))
    assert stats.chisquare(np.bincount(np.concatenate(seen_bytes), minlength=256)).pvalue > 1e-6


def test_flower_and_loop_give_the_same_parameters(tmp_path: Path) -> None:
    """Masks cancel to the last bit: with test noise the server's steps are those of the plain loop."""
    federation = keyed_federation(tmp_path, **PUBLIC)
    federation.run(**SHARED, noise="test")
    published = load_file(federation.output / "generator.safetensors")
    config = RunConfig.from_flat(
        {**SMALL, "num-sites": 4, "min-sites": 1, "noise": "test", "trust": "secagg", "num-rounds": 2}
    )
    sites = [
        split_data(load_records(site.folder / "site.parquet", tmp_path), "train", "record") for site in federation.sites
    ]
    alone = run_loop(config, sites, CLASSES).artifact.tensors
    assert published.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(published[name], value, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("phase", PHASES)
def test_one_site_silent_in_each_phase_is_borne(tmp_path: Path, phase: str) -> None:
    """d = 1: once in the statistics, once in a round; another site each time."""
    federation = keyed_federation(tmp_path)
    gone = {("site-2", "statistics", phase), ("site-3", "round-2", phase)}
    summary = federation.run(**{**QUICK, "num_rounds": 2}, tamper=silent(gone))
    in_sum = phase == "secagg_unmask"  # then its vector is in the sum, and it only did not help to unmask
    taken = ["site-1", "site-2", "site-3", "site-4"]
    assert summary["rounds_taken_part"][1] == (taken if in_sum else ["site-1", "site-2", "site-4"])
    assert summary["rounds_taken_part"][0] == taken
    # silent() swallows the message: the site never saw it, so it is charged only for what it was asked before
    missed = 0 if in_sum else 1
    assert events_of(federation.site("site-3"))["training"] == 2 - missed
    assert events_of(federation.site("site-1")) == {"statistics": 1, "training": 2}
    assert events_of(federation.site("site-2")).get("statistics", 0) == 1 - missed


@pytest.mark.parametrize("phase", PHASES[1:])
def test_two_silent_sites_abort_and_a_resumed_run_completes(tmp_path: Path, phase: str) -> None:
    federation = keyed_federation(tmp_path)
    gone = {("site-2", "round-2", phase), ("site-3", "round-2", phase)}
    with pytest.raises(SystemExit):
        federation.run(**BARE, tamper=silent(gone))
    line = federation.status()["error"]
    assert "round-2: 2 of 4 sites are left" in line
    assert "nothing was unmasked" in line
    summary = federation.run(**BARE, resume=True)
    assert summary["rounds_taken_part"] == [["site-1", "site-2", "site-3", "site-4"]] * 3
    # charged again for the second attempt, where the first had come to reading the records
    assert events_of(federation.site("site-1"))["training"] == (4 if phase in PHASES[-2:] else 3)
    assert events_of(federation.site("site-2"))["training"] == (4 if phase == "secagg_unmask" else 3)


def kill_at(monkeypatch: pytest.MonkeyPatch, target: str, what: str, phase: str) -> Any:
    """Kills site-1 at a place of its code, in one message."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        words = message.content.config_records["words"]
        if site.name != "site-1" or words.get("what") != what or phase_of(message) != phase:
            return handler()
        with monkeypatch.context() as patch:
            patch.setattr(target, die)
            return handler()

    return tamper


PLACES = {
    "before the charge": ("client_app.ledger.ledger.Ledger.reserve", "secagg_masked", 2),
    "while computing": ("client_app.release.last_resort.training_data", "secagg_masked", 3),
    "before the answer": ("client_app.answers.secure_sum.site.sign_masked", "secagg_masked", 3),
    "before the commit": ("client_app.ledger.ledger.Ledger.commit", "secagg_unmask", 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_site_is_charged_if_its_records_were_read(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, phase, charged = PLACES[place]
    federation = keyed_federation(tmp_path)
    summary = federation.run(**BARE, tamper=kill_at(monkeypatch, target, "round-2", phase))
    everyone = ["site-1", "site-2", "site-3", "site-4"]
    in_sum = phase == "secagg_unmask"
    assert summary["rounds_taken_part"][1] == (everyone if in_sum else everyone[1:])
    assert summary["rounds_taken_part"][2] == everyone
    assert events_of(federation.sites[0])["training"] == charged
    assert not list(federation.sites[0].folder.rglob("secagg*"))


@pytest.mark.parametrize("place", [place for place, (_, phase, _) in PLACES.items() if phase == "secagg_masked"])
def test_vector_that_was_asked_for_is_never_asked_for_again(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill in the answer the keys still lie there: a second vector under the same masks would be bare."""
    federation, again, spent = keyed_federation(tmp_path), [], []
    kill = kill_at(monkeypatch, PLACES[place][0], "round-2", "secagg_masked")

    def ask_twice(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        try:
            return kill(site, message, handler)
        except Killed:
            before = events_of(site)
            again.append(words_of(handler()))
            spent.append((before, events_of(site)))
            raise

    federation.run(**BARE, tamper=ask_twice)
    assert [words["error"] for words in again] == ["protocol"]
    assert spent[0][0] == spent[0][1]


def test_server_killed_after_unmasking_repeats_the_round_as_a_new_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum went up in smoke with the server: the sites draw anew, and are charged anew from the spare rounds."""
    federation = keyed_federation(tmp_path)

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("server_app.strategy.mean_uploads", die)
        with pytest.raises(Killed):
            federation.run(**QUICK)
    summary = federation.run(**QUICK, resume=True)
    assert summary["status"] == "completed"
    site = federation.sites[0]
    assert events_of(site) == {"statistics": 1, "training": 4}
    keys = [release.round_key for release in site.releases()]
    assert keys == ["statistics", "round-1", "round-1-again-1", "round-2", "round-3"]
    masked = [
        seen.message.content.array_records["tensors"]["masked"].numpy()
        for seen in federation.sent("site-1", "query.secagg_masked")
    ]
    assert len({row.tobytes() for row in masked}) == len(masked)


def test_site_that_insists_on_local_refuses_and_is_not_charged(tmp_path: Path) -> None:
    federation = keyed_federation(tmp_path)
    for site in federation.sites[:2]:
        site.set_policy(allowed_trust=("local",))
    with pytest.raises(SystemExit):
        federation.run(**QUICK)
    assert "policy:allowed_trust" in federation.status()["error"]
    assert all(site.entries() == 1 for site in federation.sites)


def test_site_that_fears_more_colluders_is_charged_more(tmp_path: Path) -> None:
    federation = keyed_federation(tmp_path, 6, run_epsilon=8.0)
    federation.sites[1].set_policy(allowed_trust=("secagg",), least_colluders=3, run_epsilon=8.0)
    summary = federation.run(**SHARED)
    spent = summary["privacy"]["epsilon_spent_per_site"]
    (run,) = federation.sites[1].runs().values()
    assert spent["site-2"] == pytest.approx(epsilon_pld(run.charged, 1e-5))
    assert spent["site-2"] > 1.2 * spent["site-1"]
    # of the four shares that the run counts on, two are left when three of six collude and one is missing
    other = next(iter(federation.sites[0].runs().values()))
    ratio = run.charged[0].noise_multiplier / other.charged[0].noise_multiplier
    assert ratio == pytest.approx(math.sqrt(2 / 4))
    federation.sites[2].set_policy(allowed_trust=("secagg",), least_colluders=3)
    with pytest.raises(SystemExit):  # what it would be charged is beyond its limit: it refuses, and d = 0 bears none
        federation.run(**{**SHARED, "dropouts": 0}, run_id=2)
    assert "policy:run_epsilon" in federation.status()["error"]


def test_trust_secagg_needs_enough_sites_and_a_method_that_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = keyed_federation(tmp_path, 3)
    for settings, told in (({}, "at least 4 sites"), ({"method": "dp_cvae", "dropouts": 0}, "can't run under trust")):
        with pytest.raises(SystemExit):
            federation.run(**{**SHARED, **settings})
        assert told in capsys.readouterr().out
    assert federation.run(**SHARED, dropouts=0, colluders=1)["status"] == "completed"
    statement = json.loads((federation.output / "privacy_statement.json").read_text())
    assert statement["guarantee"]["trust_model"] == "secagg"
    shared = statement["secure_aggregation"]
    assert (shared["sites"], shared["sites_needed"], shared["honest_shares"]) == (3, 3, 2)
    declared = statement["guarantee"]["epsilon_declared"]
    assert declared <= 3.0
    assert declared * 1.3 < shared["epsilon_of_own_share"]
    assert "exact" not in statement["caveats"]["generator"]
    protections = [entry["protection"] for entry in statement["released"] if entry["what"] == "sums of gradients"]
    assert protections == ["masked, the sum over the sites alone known; clipped, noised and charged"]

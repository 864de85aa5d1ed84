"""An old ledger put back: found by the receipt that the server brings back, before anything is charged."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from client_app.ledger import upkeep
from client_app.ledger.chain import Head
from client_app.ledger.ledger import Ledger
from client_app.ledger.receipts import key_path, make_key
from client_app.policy.policy import load_policy
from client_app.policy.template import policy_template
from common.errors import LedgerError
from embeddings.store.file import read_metadata
from server_app.receipts import move_receipt
from tests.harness import POLICY, Federation, Handler, HarnessSite, changed, deliver, words_of
from tests.secagg_cases import SHARED, keyed_federation, phase_of

RELEASES = ("query.statistics", "train")


def copy_of(site: HarnessSite, place: Path) -> Path:
    """The whole folder as a backup of the machine keeps it: ledger, witness, log, state and key."""
    return Path(shutil.copytree(site.folder, place))


def put_back(site: HarnessSite, copy: Path, *files: str) -> None:
    """Put back certain files of a copy; with none named, the whole folder."""
    if not files:
        shutil.rmtree(site.folder)
        shutil.copytree(copy, site.folder)
    for name in files:
        for leftover in site.folder.glob(f"{name}*"):
            leftover.unlink()
        shutil.copy(copy / name, site.folder / name)


def arrays_of(federation: Federation, site: str) -> int:
    """How often something about records left a site."""
    return sum(bool(seen.message.content.array_records) for seen in federation.sent(site) if seen.kind in RELEASES)


@pytest.mark.parametrize("files", [(), ("ledger.db",), ("ledger.db", "releases.jsonl")])
def test_old_ledger_put_back_between_rounds_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    """With all that lies beside it, the server's receipt is all there is. Others go on; the summary names the site."""
    federation = Federation.create(tmp_path, 3)
    copy = tmp_path / "copy"

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if site.name == "site-2" and message.metadata.message_type == "train":
            number = int(str(message.content.config_records["words"]["round"]))
            if number == 0:
                copy_of(site, copy)
            if number == 1:
                put_back(site, copy, *files)
        return handler()

    summary = federation.run(num_rounds=3, tamper=tamper)
    assert summary["rounds_taken_part"] == [["site-1", "site-2", "site-3"], *[["site-1", "site-3"]] * 2]
    for missing in summary["rounds_missing"][1:]:
        assert list(missing) == ["site-2"]
        assert missing["site-2"].startswith("refused: ledger (reference ")
        assert "its own log says what to do" in missing["site-2"]
    site = federation.site("site-2")
    assert arrays_of(federation, "site-2") == 2  # the statistics and the first round
    assert "was rolled back" in site.log()
    assert "put the newest copy back" in site.log()
    (run,) = site.runs().values()
    assert sorted(run.rounds) == ["statistics"]  # nothing was charged to the old one


@pytest.mark.parametrize("witness", ["", "kept/witness.json"])
@pytest.mark.parametrize("code", ["ledger", "receipt"])
def test_old_ledger_put_back_between_runs_is_refused(tmp_path: Path, witness: str, code: str) -> None:
    """The server's receipts outlive its runs: a copy of the whole site, of before the first run, is found."""
    federation = Federation.create(tmp_path, 2, witness=witness)
    site = federation.site("site-1")
    if code == "ledger":
        make_key(site.folder)  # as `site init` does; otherwise the copy is of before there was one
    empty = copy_of(site, tmp_path / "empty")
    federation.run(num_rounds=1)
    newest, sent = copy_of(site, tmp_path / "newest"), arrays_of(federation, "site-1")
    put_back(site, empty)
    summary = federation.run(num_rounds=1, num_sites=1, run_id=2)
    assert summary["rounds_taken_part"] == [["site-2"]]
    assert f"refused: {code}" in summary["rounds_missing"][0]["site-1"]
    assert arrays_of(federation, "site-1") == sent
    assert site.entries() == 1  # not even a run was declared
    put_back(site, newest)
    summary = federation.run(num_rounds=1, run_id=3)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]]


def test_old_ledger_beside_a_newer_log_is_refused(tmp_path: Path) -> None:
    """No witness and no receipt: the site's own log lists what the ledger forgot."""
    federation = Federation.create(tmp_path, 1)
    site = federation.site("site-1")
    empty = copy_of(site, tmp_path / "empty")
    federation.run(num_rounds=1)
    sent = arrays_of(federation, "site-1")
    put_back(site, empty, "ledger.db")
    (tmp_path / "receipts.json").unlink()
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1, run_id=2)
    assert "site-1 refused: ledger" in federation.status()["error"]
    assert "is older than the site's own log" in site.log()
    assert arrays_of(federation, "site-1") == sent
    assert site.entries() == 1


def test_release_of_another_message_in_between_is_no_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs at once: what one logs after the other has opened the ledger is not held against that one."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=2)
    site, opened = federation.site("site-1"), Ledger.open
    waiting = [changed(federation.asked("query.statistics", "site-1"), run="another")]

    def open_slowly(*words: Any, **options: Any) -> Ledger:
        ledger = opened(*words, **options)
        if waiting:
            assert "error" not in words_of(deliver(site, waiting.pop()))
        return ledger

    monkeypatch.setattr(Ledger, "open", open_slowly)
    assert "error" not in words_of(deliver(site, federation.asked("train", "site-1")))
    assert len(site.releases()) == 4


def test_missing_witness_is_refused_even_at_a_ledger_that_was_never_used(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1, witness="kept/witness.json")
    site = federation.site("site-1")
    (site.folder / "kept" / "witness.json").unlink()
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1)
    assert "is missing" in site.log()
    assert site.entries() == 1


def test_ledger_begun_again_is_refused(tmp_path: Path) -> None:
    """A new and empty ledger for the same people is an old one, too."""
    federation = Federation.create(tmp_path, 2)
    site = federation.site("site-1")
    federation.run(num_rounds=1)
    sent = arrays_of(federation, "site-1")
    for path in site.folder.glob("ledger.db*"):
        path.unlink()
    shutil.rmtree(site.folder / "state")
    (site.folder / "releases.jsonl").unlink()
    Ledger.create(site.folder / "ledger.db", "cohort/site-1").close()
    summary = federation.run(num_rounds=1, run_id=2, num_sites=1)
    assert summary["rounds_taken_part"] == [["site-2"]]
    assert arrays_of(federation, "site-1") == sent
    assert site.entries() == 1


def test_resumed_run_brings_the_receipts_back(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 2)
    site, copy = federation.site("site-1"), tmp_path / "copy"

    def cut(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if message.metadata.message_type == "train" and site.name == "site-1" and not copy.exists():
            copy_of(site, copy)
        return None if message.metadata.group_id == "round-2" else handler()

    with pytest.raises(SystemExit):
        federation.run(num_rounds=2, tamper=cut, round_timeout=1.0)
    put_back(site, copy)
    summary = federation.run(num_rounds=2, run_id=2, resume=True)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"], ["site-2"]]
    assert "refused: ledger" in summary["rounds_missing"][1]["site-1"]


@pytest.mark.parametrize(
    "forged",
    [
        {"receipt": "1:" + "0" * 64, "seal": "0" * 64},
        {"receipt": "99:" + "ab" * 32, "seal": ""},
        {"receipt": "no receipt", "seal": "é"},
        {"receipt": "", "seal": "0" * 64},
        {"receipt": "another"},
    ],
)
def test_forged_receipt_costs_that_site_the_round_alone(tmp_path: Path, forged: dict[str, str]) -> None:
    """Whatever the server brings in place of what the site gave: refused, named, uncharged; the others go on."""
    federation = Federation.create(tmp_path, 3)
    before: dict[str, int] = {}

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if site.name != "site-2" or message.metadata.group_id != "round-1":
            return handler()
        before["entries"] = site.entries()
        words: dict[str, Any] = dict(forged)
        if forged["receipt"] == "another":  # another site's own, in good form
            other = words_of(federation.sent("site-1", "query.statistics")[-1].message)
            words = {"receipt": other["receipt"], "seal": other["seal"]}
        reply = deliver(site, changed(message, **words))
        assert site.entries() == before["entries"]
        reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
        return reply

    summary = federation.run(num_rounds=2, tamper=tamper)
    assert summary["rounds_taken_part"] == [["site-1", "site-3"], ["site-1", "site-2", "site-3"]]
    assert "refused: receipt" in summary["rounds_missing"][0]["site-2"]
    log = federation.site("site-2").log()
    assert "this site never gave" in log
    assert "rolled back" not in log


@pytest.mark.parametrize("phase", ["secagg_keys", "secagg_masked", "secagg_unmask"])
def test_secure_sum_goes_on_without_a_site_whose_ledger_is_old(tmp_path: Path, phase: str) -> None:
    """Found with the first message, before anybody is charged; and later, where it was put back in between."""
    federation, copy = keyed_federation(tmp_path), tmp_path / "copy"

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        what = str(message.content.config_records["words"].get("what", ""))
        if site.name == "site-2" and what == "round-1" and phase_of(message) == "secagg_keys":
            copy_of(site, copy)
        if site.name == "site-2" and what == "round-2" and phase_of(message) == phase:
            put_back(site, copy, "ledger.db", "releases.jsonl")
        return handler()

    summary = federation.run(**SHARED, tamper=tamper)
    others = ["site-1", "site-3", "site-4"]
    in_sum = phase == "secagg_unmask"  # then its vector is in the sum, and it only did not help to unmask
    assert summary["rounds_taken_part"] == [sorted([*others, "site-2"]), sorted([*others, *["site-2"] * in_sum])]
    if not in_sum:
        assert "refused: ledger" in summary["rounds_missing"][1]["site-2"]
    site = federation.site("site-2")
    assert "was rolled back" in site.log()
    (run,) = site.runs().values()
    assert sorted(run.rounds) == ["statistics"]
    told = [phase_of(seen.message) for seen in federation.sent("site-2") if "error" in words_of(seen.message)]
    assert told == [phase]


@pytest.mark.parametrize("phase", ["secagg_keys", "secagg_masked"])
def test_forged_receipt_costs_that_site_the_sum_alone(tmp_path: Path, phase: str) -> None:
    federation = keyed_federation(tmp_path)

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        what = str(message.content.config_records["words"].get("what", ""))
        if (site.name, what, phase_of(message)) != ("site-2", "round-1", phase):
            return handler()
        reply = deliver(site, changed(message, receipt="9:" + "0" * 64))
        reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
        return reply

    summary = federation.run(**SHARED, tamper=tamper)
    others = ["site-1", "site-3", "site-4"]
    assert summary["rounds_taken_part"] == [others, sorted([*others, "site-2"])]
    assert "refused: receipt" in summary["rounds_missing"][0]["site-2"]
    (run,) = federation.site("site-2").runs().values()
    assert sorted(run.rounds) == ["round-2", "statistics"]


def test_lost_or_exchanged_key_is_a_refusal(tmp_path: Path) -> None:
    """Who puts the old ledger back can't get around the receipt by taking the key."""
    federation = Federation.create(tmp_path, 2)
    site = federation.site("site-1")
    federation.run(num_rounds=1)
    key_path(site.folder).unlink()
    summary = federation.run(num_rounds=1, run_id=2, num_sites=1)
    assert "refused: receipt" in summary["rounds_missing"][0]["site-1"]
    assert summary["rounds_taken_part"] == [["site-2"]]
    key_path(site.folder).write_bytes(b"short")
    summary = federation.run(num_rounds=1, run_id=3, num_sites=1)
    assert "refused: ledger" in summary["rounds_missing"][0]["site-1"]


def test_ledger_of_another_cohort_needs_the_coordinators_word(tmp_path: Path) -> None:
    """New people, a new ledger: the server forgets the old receipt, and the site moves its log away."""
    federation = Federation.create(tmp_path, 2)
    site = federation.site("site-1")
    federation.run(num_rounds=1)
    site.folder.joinpath("policy.toml").write_text(policy_template("another/cohort", **{**POLICY, "ledger": "new.db"}))
    Ledger.create(site.folder / "new.db", "another/cohort").close()
    summary = federation.run(num_rounds=1, run_id=2, num_sites=1)
    assert "refused: receipt" in summary["rounds_missing"][0]["site-1"]
    assert "server rotate --forget" in site.log()
    move_receipt(tmp_path / "receipts.json", str(site.node), None)
    summary = federation.run(num_rounds=1, run_id=3, num_sites=1)
    assert "refused: ledger" in summary["rounds_missing"][0]["site-1"]
    assert "move that log away" in site.log()
    site.folder.joinpath("releases.jsonl").rename(site.folder / "releases-of-before.jsonl")
    assert federation.run(num_rounds=1, run_id=4)["rounds_taken_part"] == [["site-1", "site-2"]]


def test_any_earlier_receipt_will_do(tmp_path: Path) -> None:
    """A server whose last reply was lost brings an older one: the ledger holds that, too."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=2)
    first = words_of(federation.sent("site-1", "query.statistics")[0].message)
    site, message = federation.site("site-1"), federation.asked("train", "site-1")
    assert Head.parse(first["receipt"]).seq < site.entries()
    reply = deliver(site, changed(message, receipt=first["receipt"], seal=first["seal"]))
    assert "error" not in words_of(reply)


def test_seal_tells_nothing_and_the_key_is_the_owners(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=2)
    words = [words_of(seen.message) for seen in federation.sent("site-1") if seen.kind in RELEASES]
    assert len({one["seal"] for one in words}) == len({one["receipt"] for one in words}) == len(words)
    path = key_path(federation.site("site-1").folder)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "receipts.json").stat().st_mode & 0o777 == 0o600
    published = (federation.output / "privacy_statement.json").read_text()
    assert not any(one["seal"] in published for one in words)


def test_first_contact_and_another_server_bring_nothing(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=1)
    (tmp_path / "receipts.json").unlink()
    summary = federation.run(num_rounds=1, run_id=2)
    assert summary["rounds_taken_part"] == [["site-1"]]


def test_unreadable_receipts_end_the_run_before_a_site_is_asked(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1)
    (tmp_path / "receipts.json").write_text("[]")
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1)
    assert "receipts.json" in federation.status()["error"]
    assert federation.site("site-1").entries() == 1


def test_run_name_is_held_to_its_settings_without_the_state_folder(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=2, run_name="spring")
    site = federation.site("site-1")
    entries = site.entries()
    shutil.rmtree(site.folder / "state")
    first = next(seen.message for seen in federation.traffic if seen.kind == "train" and not seen.to_server)
    asked = changed(first, {"config": {"learning-rate": 0.5}})
    assert words_of(deliver(site, asked))["error"] == "policy:run_name"
    assert "was declared on" in site.log()
    assert site.entries() == entries


def test_read_receipt_is_checked_by_ledger(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db", "cohort") as ledger:
        ledger.check(ledger.head)
        for wrong in (Head(1, "0" * 64), Head(2, ledger.head.digest), Head(0, ledger.head.digest)):
            with pytest.raises(LedgerError):
                ledger.check(wrong)


def test_exported_ledger_holds_no_fingerprint_that_records_could_be_tried_against(tmp_path: Path) -> None:
    """Of an imported set the fingerprint is a plain digest of its records; with the site's key nobody can try any."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=2)
    site = federation.site("site-1")
    with site.ledger() as ledger:
        told = json.dumps(upkeep.export(ledger))
        marks = {
            entry["body"]["fingerprint"] for entry in upkeep.export(ledger)["entries"] if "fingerprint" in entry["body"]
        }
    plain = read_metadata(site.folder / "site.parquet").fingerprint
    words = json.dumps(["data set", load_policy(site.folder / "policy.toml").cohort_id, plain])
    assert marks == {hmac.new(key_path(site.folder).read_bytes(), words.encode(), hashlib.sha256).hexdigest()}
    assert plain not in told
    assert plain not in (site.folder / "releases.jsonl").read_text()
    assert not [seen for seen in federation.sent() if plain in str(seen.message.content)]

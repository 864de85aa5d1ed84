"""Every message that leaves a site in a whole run, recorded as bytes: allow-listed names, shapes and types, no more."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from client_app.answers import training as work
from client_app.state.private_state import PrivateState
from common.config.generator import MMD_FEATURES
from common.methods import get_method
from common.methods.base import SiteState
from common.wire.allow_list import load_context
from embeddings.store.file import read_metadata, read_store
from tests.harness import CLASSES, DIM, Exchanged, Federation, Handler, HarnessSite, charged_in, words_of

WORDS = {
    "query.hello": {"site", "position", "identity", "canary", "public", "task"},
    "query.consent": set(),
    "query.statistics": {"receipt", "seal", "charged"},
    "train": {"receipt", "seal", "charged"},
}
STATISTICS = {"class_counts": (len(CLASSES),), "class_sums": (len(CLASSES), DIM), "total_sum": (DIM,)}
ROUNDS = 3


class Recorded:
    """A run with unequal sites, and every private state that its sites ever had."""

    def __init__(self, home: Path) -> None:
        from tests.harness import make_set

        self.federation = Federation.create(home, 3, sets={0: make_set(37), 1: make_set(61, seed=1)})
        self.states: list[np.ndarray[Any, Any]] = []

        def watch(site: HarnessSite, message: Message, handler: Handler) -> Message:
            reply = handler()
            words = message.content.config_records["words"]
            if message.metadata.message_type == "train":
                private = PrivateState(site.folder / "state", str(words["run"]))
                for index in private.rounds():
                    self.states += [np.asarray(value) for value in private.load(index).values()]
            return reply

        self.summary = self.federation.run(num_rounds=ROUNDS, tamper=watch)
        asked = self.federation.asked("train", "site-1").content.config_records["words"]
        self.context = load_context(str(asked["context"]))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("recorded"))


def arrays(sent: Exchanged) -> dict[str, np.ndarray[Any, Any]]:
    records = sent.message.content.array_records
    return {name: array.numpy() for record in records.values() for name, array in record.items()}


def test_run_sends_nothing_but_the_messages_of_the_protocol(recorded: Recorded) -> None:
    for site in recorded.federation.sites:
        kinds = [sent.kind for sent in recorded.federation.sent(site.name)]
        assert kinds == ["query.hello", "query.consent", "query.statistics"] + ["train"] * ROUNDS


def test_words_are_the_allowed_ones_and_tell_nothing_of_records(recorded: Recorded) -> None:
    identity = read_metadata(recorded.federation.sites[0].folder / "site.parquet").identity
    events = [*recorded.context.plan.statistics_events, *recorded.context.plan.round_events * ROUNDS]
    for sent in recorded.federation.sent():
        words = words_of(sent.message)
        assert set(words) == WORDS[sent.kind]
        assert not sent.message.content.metric_records
        assert set(sent.message.content.config_records) == {"words"}
        if sent.kind == "query.hello":
            assert words == {
                "site": sent.site,
                "position": -1,
                "identity": json.dumps(identity.to_json()),
                "canary": "",
                "public": False,
                "task": "multiclass",
            }
        elif sent.kind != "query.consent":
            assert re.fullmatch(r"\d+:[0-9a-f]{64}", words["receipt"])
            charged = charged_in(sent.message)
            assert charged == [event.to_json() for event in events[: len(charged)]]


def test_tensors_are_the_declared_ones(recorded: Recorded) -> None:
    method = get_method(recorded.context.config.method)
    uploads = {name: tuple(shape) for name, shape in method.upload_shapes(recorded.context).items()}
    assert not any(name.startswith(("code", "encoder")) for name in uploads)
    for sent in recorded.federation.sent():
        declared = {"query.hello": {}, "query.consent": {}, "query.statistics": STATISTICS, "train": uploads}[sent.kind]
        found = arrays(sent)
        assert {name: value.shape for name, value in found.items()} == declared
        assert all(value.dtype == np.float32 for value in found.values())


def test_no_message_holds_code_or_encoder(recorded: Recorded) -> None:
    """The very bytes of every private tensor at any time, row by row, are nowhere in what was sent."""
    wire = b"".join(sent.wire for sent in recorded.federation.sent())
    rows = [row.tobytes() for value in recorded.states for row in np.atleast_2d(value) if np.any(row != 0)]
    # every site's code and encoder, twice a round: two rounds' states are kept
    assert len(rows) > 100
    assert not [row for row in rows if len(row) >= 8 and row in wire]


def test_no_message_holds_a_record(recorded: Recorded) -> None:
    wire = b"".join(sent.wire for sent in recorded.federation.sent())
    for site in recorded.federation.sites:
        records = read_store(site.folder / "site.parquet")
        on_sphere = records.embeddings / np.linalg.norm(records.embeddings, axis=1, keepdims=True)
        for values in (records.embeddings, on_sphere):
            assert not any(row[:2].tobytes() in wire for row in values)
        metadata = read_metadata(site.folder / "site.parquet")
        assert metadata.fingerprint.encode() not in wire


def test_no_message_holds_a_raw_count(recorded: Recorded) -> None:
    """Counts are noised: nobody's are told, neither as words nor as a tensor."""
    for site in recorded.federation.sites:
        records = read_store(site.folder / "site.parquet")
        counts = np.bincount(records.labels, minlength=len(CLASSES))
        (sent,) = recorded.federation.sent(site.name, "query.statistics")
        release = arrays(sent)
        # without a relative part, which would take a noised one in two hundred for a whole number
        assert not np.any(np.isclose(release["class_counts"], np.round(release["class_counts"]), rtol=0, atol=1e-6))
        assert not np.allclose(release["class_counts"], counts, atol=0.05)


def test_size_of_a_message_tells_nothing_of_a_site(recorded: Recorded) -> None:
    sizes = [[len(sent.wire) for sent in recorded.federation.sent(site.name)] for site in recorded.federation.sites]
    assert sizes[0] == sizes[1] == sizes[2]


def test_log_of_releases_is_what_left(recorded: Recorded) -> None:
    """The site's own log names each release once, in order, and the ledger committed each of them."""
    for site in recorded.federation.sites:
        names = [release.round_key for release in site.releases()]
        assert names == ["statistics", *(f"round-{number}" for number in range(1, ROUNDS + 1))]
        (run,) = site.runs().values()
        committed = {known.payload_digest for known in run.rounds.values()}
        assert {release.payload_digest for release in site.releases()} == committed


def test_summary_and_bundle_hold_no_private_state(recorded: Recorded) -> None:
    published = b"".join(path.read_bytes() for path in recorded.federation.output.iterdir() if path.is_file())
    rows = [row.tobytes() for value in recorded.states for row in np.atleast_2d(value) if np.any(row != 0)]
    assert not [row for row in rows if len(row) >= 8 and row in published]


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A method that sends more than it declares: the broken versions that the allow-list must stop."""
    name, secret = request.param
    original = work.get_method

    def broken(method_name: str) -> Any:
        method = original(method_name)

        def step(context: Any, step_input: Any) -> tuple[SiteState, dict[str, torch.Tensor]]:
            after, uploads = method.client_step(context, step_input)
            return after, {**uploads, name: secret(step_input, uploads)}

        return replace(method, client_step=step)

    monkeypatch.setattr(work, "get_method", broken)


LEAKS = {
    "the code": ("code", lambda given, _: given.site.tensors["code"]),
    "the encoder": ("encoder.0.weight", lambda given, _: given.site.tensors["encoder.0.weight"]),
    "a loss": ("loss", lambda given, _: given.data.embeddings.norm()),
    "the number of records": ("num_examples", lambda given, _: torch.tensor(float(len(given.data.labels)))),
    "label counts": ("label_counts", lambda given, _: torch.bincount(given.data.labels).float()),
    "a gradient of another shape": ("class_bias.weight", lambda given, _: given.data.embeddings),
    "a gradient in float64": ("class_bias.weight", lambda _, uploads: uploads["class_bias.weight"].double()),
    "a gradient that is not finite": ("class_bias.weight", lambda _, uploads: uploads["class_bias.weight"] / 0.0),
}


@pytest.mark.parametrize("leaking", LEAKS.values(), ids=LEAKS.keys(), indirect=True)
def test_site_sends_nothing_of_a_method_that_leaks(leaking: None, tmp_path: Path) -> None:
    del leaking
    federation = Federation.create(tmp_path, 1)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1)
    assert "refused: wire" in federation.status()["error"]
    (sent,) = federation.sent("site-1", "train")
    assert set(words_of(sent.message)) == {"error", "reference"}
    assert not sent.message.content.array_records
    assert [release.round_key for release in federation.sites[0].releases()] == ["statistics"]


def test_run_writes_a_valid_privacy_statement(recorded: Recorded) -> None:
    from common.assurance.statement import check_statement

    statement = recorded.federation.read("privacy_statement.json")
    check_statement(statement)
    assert {site: found["epsilon"] for site, found in statement["sites"].items()} == recorded.summary["privacy"][
        "epsilon_spent_per_site"
    ]
    for site in recorded.federation.sites:
        with site.ledger() as ledger:
            assert statement["sites"][site.name]["ledger_receipt"] == str(ledger.head)
            (run,) = ledger.runs.values()
        charged: dict[tuple[str, float], int] = {}
        for event in run.charged:
            mechanism = event.label, event.noise_multiplier
            charged[mechanism] = charged.get(mechanism, 0) + event.count
        told = statement["sites"][site.name]["events"]
        assert {(event["label"], event["noise_multiplier"]): event["count"] for event in told} == charged


def test_features_for_mmd_leave_as_declared(tmp_path: Path) -> None:
    """With MMD against a release, noised features join the one-shot statistics, and nothing else is added."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=1, mmd="released", mmd_weight=0.5)
    (sent,) = federation.sent("site-1", "query.statistics")
    declared = {**STATISTICS, "class_features": (len(CLASSES), MMD_FEATURES)}
    assert {name: value.shape for name, value in arrays(sent).items()} == declared
    assert [seen.kind for seen in federation.sent()] == ["query.hello", "query.consent", "query.statistics", "train"]

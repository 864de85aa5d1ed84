"""A server that asks for what no site allows: refused by every site, before any charge, and the others go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from tests.harness import Federation, changed, charged_in, deliver, words_of


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Message]:
    """Messages of an honest server, to be spoiled."""
    federation = Federation.create(tmp_path_factory.mktemp("honest"), 1)
    federation.run()  # whole parameters in every message: a site needs no earlier one
    return {kind: federation.asked(kind, "site-1") for kind in ("query.statistics", "train")}


def config(**settings: Any) -> dict[str, Any]:
    return {"config": {name.replace("_", "-"): value for name, value in settings.items()}}


def plan(**fields: Any) -> dict[str, Any]:
    return {"plan": fields}


NO_NOISE = {"plan": {"training_noise": 0.0, "statistics_noise": 0.0}}
OUT_OF_POLICY: dict[str, tuple[dict[str, Any], str]] = {
    "no noise in training": (plan(training_noise=0.0), "policy:min_noise_multiplier"),
    "no noise at all": (NO_NOISE, "policy:min_noise_multiplier"),
    "little noise, honestly charged": (plan(training_noise=0.35), "policy:run_epsilon"),
    "noise that is no number": (plan(training_noise="much"), "config"),
    "noise that is not finite": (plan(training_noise=float("nan")), "config"),
    "negative noise": (plan(training_noise=-1.7), "config"),
    "huge clipping norm": (config(clip_norm=1e5), "policy:max_clip_norm"),
    "infinite clipping norm": (config(clip_norm=float("inf")), "config"),
    "a million steps": (config(num_rounds=100_000) | plan(num_rounds=100_000), "policy:max_num_steps"),
    "a million steps told in the plan alone": (plan(num_rounds=90_000), "policy:request"),
    "more rounds than the plan charges": (config(num_rounds=50), "policy:request"),
    "more local steps than the plan charges": (config(local_steps=5), "policy:request"),
    "sampling told smaller than done": (plan(sampling_rate=0.01), "policy:request"),
    "sampling done larger than told": (config(sampling_rate=1.0), "policy:request"),
    "delta told larger": (plan(delta=1e-2), "policy:request"),
    "many spare rounds": (config(spare_rounds=900) | plan(spare_rounds=900), "policy:run_epsilon"),
    "spare rounds told in the plan alone": (plan(spare_rounds=900), "policy:request"),
    "negative spare rounds": (plan(spare_rounds=-1), "config"),
    "rounds that are no whole number": (plan(num_rounds=2.0), "config"),
    "an unknown method": (config(method="exfiltrate"), "config"),
    "a method that the site did not allow": (config(method="dp_fedsgd"), "policy:allowed_methods"),
    "a method without protection": (config(method="fedavg"), "policy:allowed_methods"),
    "infinite epsilon at a private site": (config(epsilon=float("inf")) | NO_NOISE, "policy:data_is_public"),
    "infinite epsilon with noise": (config(epsilon=float("inf")), "policy:data_is_public"),
    "a smaller epsilon claimed than spent": (config(epsilon=0.01), "policy:epsilon"),
    "noise from a known seed": (config(noise="test"), "policy:allow_test_noise"),
    "an unprotected encoder": (config(encoder_training="unprotected"), "policy:allowed_encoder_training"),
    "a joint encoder": (config(encoder_training="joint"), "policy:allowed_encoder_training"),
    "another unit": (config(unit="patient"), "policy:unit"),
    "a trust that the site does not know": (config(trust="none"), "config"),
    "a setting that does not exist": (config(exfiltrate=True), "config"),
    "no plan of training at all": (plan(training_noise=None), "policy:request"),
}


@pytest.mark.parametrize(("rate", "steps"), [(0.01, 1), (1.0, 5), (1.0, 1)])
def test_method_that_reads_all_records_at_once_is_charged_for_no_sample(
    tmp_path: Path, asked: dict[str, Message], rate: float, steps: int
) -> None:
    """Charged as a sample of 1 in 100, one noised change of all records would seem to cost next to nothing."""
    method = "mh_pfedhn_gd_dp"
    site = Federation.create(tmp_path, 1, allowed_methods=(method,)).sites[0]
    settings = config(method=method, sampling_rate=rate, local_steps=steps)
    told = plan(sampling_rate=rate, steps_per_round=steps, training_noise=20.0, statistics_noise=20.0)
    words = words_of(deliver(site, changed(asked["query.statistics"], settings | told)))
    if (rate, steps) == (1.0, 1):
        assert "charged" in words
    else:
        assert words["error"] == "config"
        assert (site.entries(), site.runs(), site.releases()) == (1, {}, ())


@pytest.mark.parametrize("kind", ["query.statistics", "train"])
@pytest.mark.parametrize("case", OUT_OF_POLICY)
def test_site_refuses_out_of_policy_server(tmp_path: Path, asked: dict[str, Message], case: str, kind: str) -> None:
    context, code = OUT_OF_POLICY[case]
    site = Federation.create(tmp_path, 1).sites[0]
    before = site.entries()
    reply = deliver(site, changed(asked[kind], context))
    assert words_of(reply)["error"] == code
    assert set(words_of(reply)) == {"error", "reference"}
    assert not reply.content.array_records
    assert (site.entries(), site.runs(), site.releases()) == (before, {}, ())


@pytest.mark.parametrize("kind", ["query.statistics", "train"])
def test_site_answers_the_honest_message(tmp_path: Path, asked: dict[str, Message], kind: str) -> None:
    """The positive control of the refusals: the very message that they spoil is answered and charged."""
    site = Federation.create(tmp_path, 1).sites[0]
    reply = deliver(site, asked[kind])
    assert set(words_of(reply)) == {"receipt", "seal", "charged"}
    assert len(site.releases()) == 1


@pytest.mark.parametrize("round_number", [-1, 2, 3, 10**9])
def test_site_refuses_rounds_outside_the_plan(tmp_path: Path, asked: dict[str, Message], round_number: int) -> None:
    """A spare round pays for one that is repeated; it is not one more round."""
    site = Federation.create(tmp_path, 1).sites[0]
    reply = deliver(site, changed(asked["train"], round=round_number))
    assert words_of(reply)["error"] == "policy:request"
    assert site.entries() == 1


def test_site_refuses_a_policy_breach_before_the_records_are_opened(
    tmp_path: Path, asked: dict[str, Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        raise RuntimeError("the records were opened")

    site = Federation.create(tmp_path, 1).sites[0]
    monkeypatch.setattr("client_app.records.load_records", opened)
    monkeypatch.setattr("embeddings.store.file.read_head", opened)
    monkeypatch.setattr("client_app.ledger.ledger.Ledger.open", opened)
    reply = deliver(site, changed(asked["train"], config(clip_norm=1e5)))
    assert words_of(reply)["error"] == "policy:max_clip_norm"


def test_public_site_sends_no_score_where_its_policy_says_no(tmp_path: Path) -> None:
    """Public data alone is not enough: the policy has a word of its own on scores."""
    allowed = Federation.create(tmp_path / "allowed", 1, data_is_public=True, metrics_may_leave=True)
    allowed.run(num_rounds=1)
    site = Federation.create(tmp_path / "not", 1, data_is_public=True, metrics_may_leave=False).sites[0]
    reply = deliver(site, allowed.asked("evaluate", "site-1"))
    assert words_of(reply)["error"] == "policy:metrics_may_leave"
    assert not reply.content.metric_records
    assert not reply.content.array_records
    assert site.releases() == ()


def test_policy_made_stricter_holds_for_a_run_that_was_granted_before(
    tmp_path: Path, asked: dict[str, Message]
) -> None:
    """The ledger knows the run and its limits: the rules that it does not know are held in every message."""
    site = Federation.create(tmp_path, 1).sites[0]
    assert "receipt" in words_of(deliver(site, asked["train"]))
    before = site.entries()
    site.set_policy(max_clip_norm=0.01)
    assert words_of(deliver(site, asked["query.statistics"]))["error"] == "policy:max_clip_norm"
    assert site.entries() == before


def test_private_site_refuses_metrics(tmp_path: Path, asked: dict[str, Message]) -> None:
    site = Federation.create(tmp_path, 1).sites[0]
    message = changed(asked["query.statistics"], mixing=0.5)
    message.metadata.__dict__["_message_type"] = "evaluate"
    reply = deliver(site, message)
    assert words_of(reply)["error"] == "policy:metrics_may_leave"
    assert not reply.content.array_records
    assert not reply.content.metric_records
    assert site.releases() == ()


def test_site_refuses_what_another_run_may_not_spend(tmp_path: Path, asked: dict[str, Message]) -> None:
    """The lifetime's budget, over runs of ε = 3 each: what no longer fits is refused, uncharged."""
    site = Federation.create(tmp_path, 1, lifetime_epsilon=4.0).sites[0]
    codes = []
    for number in range(4):
        words = words_of(deliver(site, changed(asked["query.statistics"], run=f"run-{number}")))
        codes.append(words.get("error", "charged"))
    assert codes[:1] == ["charged"]
    assert codes[-1] == "budget"
    charged = site.runs()
    assert len(charged) == codes.count("charged")
    assert len(site.releases()) == codes.count("charged")


def test_message_for_other_records_is_refused_without_charge(tmp_path: Path, asked: dict[str, Message]) -> None:
    site = Federation.create(tmp_path, 1).sites[0]
    for context in ({"problem": {"dim": 13}}, {"problem": {"class_names": ["a", "b", "c"]}}):
        assert words_of(deliver(site, changed(asked["train"], context)))["error"] == "data"
    assert site.entries() == 1


def test_nobody_is_charged_where_one_refuses_and_the_run_wants_all(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 3)
    federation.sites[1].set_policy(max_clip_norm=0.01)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=2)
    line = federation.status()["error"]
    assert "site-2 refused: policy:max_clip_norm" in line
    assert "2 sites are left of num-sites 3, and nobody was charged" in line
    assert [site.entries() for site in federation.sites] == [1, 1, 1]
    assert {seen.kind for seen in federation.sent()} == {"query.hello", "query.consent"}
    federation.sites[1].set_policy()
    summary = federation.run(num_rounds=2, resume=True)  # it is mended: the same run goes on
    assert summary["rounds_taken_part"] == [["site-1", "site-2", "site-3"]] * 2


def test_consent_looks_at_the_budget_and_leaves_ledger_and_records_alone(
    tmp_path: Path, asked: dict[str, Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Federation.create(tmp_path / "ran", 1)
    ran.run(num_rounds=2)
    consent = ran.asked("query.consent", "site-1")
    site = Federation.create(tmp_path / "fresh", 1).sites[0]
    before = (site.folder / "ledger.db").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("client_app.records.load_records", None)
        assert words_of(deliver(site, consent)) == {}
    assert (site.folder / "ledger.db").read_bytes() == before
    assert site.runs() == {}
    deliver(site, changed(asked["query.statistics"], run="another"))  # all that its lifetime holds is promised to it
    site.set_policy(lifetime_epsilon=3.2)
    entries = site.entries()
    assert words_of(deliver(site, consent))["error"] == "budget"
    assert site.entries() == entries
    assert set(site.runs()) == {"another"}


def test_other_sites_go_on_when_one_refuses_that_the_run_can_do_without(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 3)
    federation.sites[1].set_policy(max_clip_norm=0.01)
    summary = federation.run(num_rounds=2, num_sites=2)
    assert summary["status"] == "completed"
    assert summary["rounds_taken_part"] == [["site-1", "site-3"]] * 2
    assert all("policy:max_clip_norm" in reasons["site-2"] for reasons in summary["rounds_missing"])
    assert federation.sites[1].entries() == 1
    assert "site-2" not in summary["privacy"]["epsilon_spent_per_site"]
    assert federation.sites[0].releases() != ()
    # the refusal's reference leads the site's own people to the reason
    reference = words_of(federation.sent("site-2", "train")[0].message)["reference"]
    assert reference in federation.sites[1].log()
    assert "0.03" in federation.sites[1].log()


def test_ledger_is_charged_exactly_the_events_of_the_run(tmp_path: Path) -> None:
    """What the server is told, what the ledger holds and what the plan says are the same."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=2)
    (run,) = federation.sites[0].runs().values()
    told = charged_in(federation.sent("site-1", "train")[-1].message)
    assert [event.to_json() for event in run.charged] == told
    assert [event.label for event in run.charged] == ["statistics", "training", "training"]

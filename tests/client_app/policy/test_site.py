"""The site's policy: each rule refuses under its name, before any data is opened; nonsense is refused too."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.ledger.ledger import Ledger
from client_app.policy.policy import SitePolicy, load_policy
from client_app.policy.request import RunRequest
from client_app.policy.template import policy_template
from common.errors import ConfigError, PolicyRefusal
from common.privacy.events import gaussian, sampled_gaussian

MANDATORY: dict[str, Any] = {
    "cohort_id": "cohort-1",
    "lifetime_epsilon": 3.0,
    "lifetime_delta": 1e-5,
    "run_epsilon": 1.0,
}
POLICY = SitePolicy(**MANDATORY)
PATIENTS = SitePolicy(**MANDATORY, unit="patient", max_records_per_patient=4)
PUBLIC = SitePolicy(**MANDATORY, data_is_public=True, metrics_may_leave=True, allow_test_noise=True)


def make_request(noise: float = 3.0, steps: int = 50, rate: float = 0.08, **changes: Any) -> RunRequest:
    """A request that the policy grants (ε = 0.78 at δ = 1e-5), unless it is changed."""
    request = RunRequest(
        method="fedhypevae",
        epsilon=0.8,
        delta=1e-5,
        unit="record",
        clip_norm=1.5,
        noise_multipliers=(20.0, noise),
        sampling_rate=rate,
        num_steps=steps,
        encoder_training="sleep",
        events=(gaussian(20.0, label="statistics"), sampled_gaussian(noise, rate, count=steps, label="step")),
    )
    return replace(request, **changes)


def refused_rule(policy: SitePolicy, request: RunRequest) -> str:
    with pytest.raises(PolicyRefusal) as caught:
        policy.check(request)
    return caught.value.rule


def test_check_grants_what_the_policy_allows() -> None:
    POLICY.check(make_request())
    PATIENTS.check(make_request(unit="patient", max_records_per_patient=4))
    PUBLIC.check(make_request(wants_metrics=True))
    PUBLIC.check(replace(make_request(), noise="test"))


@pytest.mark.parametrize(
    ("rule", "policy", "request_"),
    [
        ("allowed_methods", POLICY, make_request(method="fedavg")),
        ("allowed_encoder_training", POLICY, make_request(encoder_training="unprotected")),
        ("allowed_encoder_training", POLICY, make_request(encoder_training="joint")),
        ("allowed_trust", POLICY, make_request(trust="secagg")),
        ("unit", POLICY, make_request(unit="patient")),
        ("unit", PATIENTS, make_request()),
        ("max_records_per_patient", PATIENTS, make_request(unit="patient", max_records_per_patient=5)),
        ("data_is_public", POLICY, make_request(epsilon=math.inf)),
        ("allow_test_noise", POLICY, replace(make_request(), noise="test")),
        ("metrics_may_leave", POLICY, make_request(wants_metrics=True)),
        ("min_clip_norm", SitePolicy(**MANDATORY, min_clip_norm=0.01), make_request(clip_norm=1e-3)),
        ("max_clip_norm", POLICY, make_request(clip_norm=1e9)),
        ("max_clip_norm", POLICY, make_request(clip_norm=math.inf)),
        ("max_sampling_rate", SitePolicy(**MANDATORY, max_sampling_rate=0.05), make_request()),
        ("min_noise_multiplier", POLICY, make_request(noise=0.0)),
        ("min_noise_multiplier", POLICY, make_request(noise=0.49)),
        ("max_num_steps", POLICY, make_request(steps=1_000_000)),
        ("lifetime_delta", POLICY, make_request(delta=1e-3)),
        ("run_epsilon", POLICY, make_request(noise=1.0)),
        ("run_epsilon", POLICY, make_request(steps=5000)),
        ("epsilon", POLICY, make_request(epsilon=0.5)),
        ("request", POLICY, make_request(clip_norm=math.nan)),
        ("request", POLICY, make_request(clip_norm=-1.0)),
        ("request", POLICY, make_request(epsilon=math.nan)),
        ("request", POLICY, make_request(epsilon=-1.0)),
        ("request", POLICY, make_request(delta=0.0)),
        ("request", POLICY, make_request(sampling_rate=0.0)),
        ("request", POLICY, make_request(sampling_rate=2.0)),
        ("request", POLICY, make_request(noise_multipliers=(-3.0,))),
        ("request", POLICY, make_request(num_steps=51)),
        ("request", POLICY, make_request(num_steps=-1)),
        ("request", POLICY, make_request(events=())),
        ("request", POLICY, make_request(events=(gaussian(3.0),))),
        ("request", POLICY, make_request(noise_multipliers=(20.0,))),
        ("request", POLICY, make_request(method=None)),
        ("request", POLICY, make_request(wants_metrics="yes")),
        ("request", POLICY, replace(make_request(), noise="none")),
    ],
)
def test_check_refuses_under_the_rules_name(rule: str, policy: SitePolicy, request_: RunRequest) -> None:
    assert refused_rule(policy, request_) == rule


def test_check_refusal_leaves_ledger_untouched_and_next_request_goes_on(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db", "cohort-1") as ledger:
        before = ledger.head
        for bad in (make_request(noise=0.0), make_request(clip_norm=1e9), make_request(steps=10**6)):
            refused_rule(POLICY, bad)
        assert ledger.verify() == before
        good = make_request()
        POLICY.check(good)
        ledger.declare_run("run", good.events, POLICY.limits, fingerprint="f")


def test_check_without_recomputing_still_applies_the_other_rules() -> None:
    POLICY.check(make_request(), recompute_epsilon=False)
    for request in (make_request(noise=0.0), make_request(clip_norm=1e9), make_request(delta=1e-3)):
        with pytest.raises(PolicyRefusal):
            POLICY.check(request, recompute_epsilon=False)


def test_public_data_may_be_used_without_noise() -> None:
    plain = make_request(noise=0.0, epsilon=math.inf, clip_norm=math.inf, events=(), noise_multipliers=(0.0,))
    PUBLIC.check(plain)
    assert refused_rule(POLICY, plain) == "data_is_public"


def refusal_of(request: RunRequest) -> PolicyRefusal | None:
    try:
        POLICY.check(request)
    except PolicyRefusal as refusal:
        return refusal
    return None


nonsense = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.just(()),
    st.tuples(st.floats(allow_nan=True)),
    st.lists(st.integers(), max_size=2),
    st.binary(max_size=4),
)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from([field.name for field in fields(RunRequest)]), nonsense, max_size=4))
def test_check_of_nonsense_refuses_or_grants_only_what_is_safe(changes: dict[str, Any]) -> None:
    """Any field may hold anything: the outcome is a refusal with a rule, or a request within every limit."""
    request = replace(make_request(), **changes)
    refusal = refusal_of(request)
    if refusal is not None:
        assert refusal.rule in {"request", "epsilon"} | set(SitePolicy.model_fields)
        assert len(str(refusal)) < 1000
        return
    assert request.method == "fedhypevae"
    assert 0 < request.clip_norm <= POLICY.max_clip_norm
    assert 0 < request.delta <= POLICY.lifetime_delta
    assert 0.78 < request.epsilon < math.inf
    assert min(request.noise_multipliers) >= POLICY.min_noise_multiplier
    assert 0 <= request.num_steps <= 50
    assert request.unit == "record"
    assert request.noise == "secure"
    assert request.wants_metrics is False
    assert request.events == make_request().events


@settings(max_examples=60)
@given(
    noise=st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0]),
    steps=st.sampled_from([1, 50, 1000]),
    rate=st.sampled_from([0.01, 0.08, 1.0]),
    claim=st.sampled_from([1e-3, 0.8, 1.0, 50.0]),
)
def test_check_never_grants_more_than_the_run_budget(noise: float, steps: int, rate: float, claim: float) -> None:
    """By bounds of its own: zCDP without sampling from above, the advantage of one step from below."""
    request = make_request(noise=noise, steps=steps, rate=rate, epsilon=claim)
    granted = refusal_of(request) is None
    rho = (1 / 20.0**2 + steps / noise**2) / 2
    epsilon_without_sampling = rho + 2 * math.sqrt(rho * math.log(1e5))
    if noise >= 0.5 and epsilon_without_sampling <= min(claim, 1.0):
        assert granted
    # One sampled step alone tells the worlds apart with advantage q (2 Φ(1/2σ) - 1).
    advantage = rate * math.erf(1 / (2 * noise * math.sqrt(2)))
    if advantage > (math.e - 1) / (math.e + 1) + 1e-5:
        assert not granted


def test_policy_template_loads_as_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_template('cohort "ü"', unit="patient", max_records_per_patient=4), encoding="utf-8")
    policy = load_policy(path)
    assert (policy.cohort_id, policy.unit, policy.max_records_per_patient) == ('cohort "ü"', "patient", 4)
    path.write_text(policy_template("cohort-1", run_epsilon=1.0), encoding="utf-8")
    assert load_policy(path) == POLICY
    comments = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert len(comments) >= len(SitePolicy.model_fields)
    assert load_policy(path).ledger_path(tmp_path) == tmp_path / "ledger.db"
    assert load_policy(path).witness_path(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("max_clip_nrom = 3.0", "max_clip_nrom"),
        ("max_clip_norm = nan", "max_clip_norm"),
        ("max_clip_norm = inf", "max_clip_norm"),
        ("min_noise_multiplier = 0.0", "min_noise_multiplier"),
        ("min_noise_multiplier = true", "min_noise_multiplier"),
        ('max_num_steps = "many"', "max_num_steps"),
        ('unit = "hospital"', "unit"),
        ('unit = "patient"', "max_records_per_patient"),
        ("metrics_may_leave = true", "data_is_public"),
        ("allow_test_noise = true", "data_is_public"),
        ('approved_app_digests = ["latest"]', "approved_app_digests"),
        ("approved_app_digests = 5", "approved_app_digests"),
        ('allowed_encoder_training = ["any"]', "allowed_encoder_training"),
        ("lifetime_epsilon = 5.0", "can't read policy"),  # the same line twice
        ("this is no TOML", "can't read policy"),
    ],
)
def test_load_policy_refuses_what_it_does_not_understand(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "policy.toml"
    mandatory = 'cohort_id = "c"\nlifetime_epsilon = 3.0\nlifetime_delta = 1e-5\nrun_epsilon = 1.0\n'
    path.write_text(mandatory)
    load_policy(path)
    path.write_text(mandatory + text + "\n")
    with pytest.raises(ConfigError, match=found):
        load_policy(path)


def test_load_policy_needs_a_file_and_a_budget(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no policy at"):
        load_policy(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").write_text('cohort_id = "c"\n')
    with pytest.raises(ConfigError, match="lifetime_epsilon"):
        load_policy(tmp_path / "policy.toml")
    with pytest.raises(ConfigError, match="run_epsilon is larger"):
        policy_template("c", lifetime_epsilon=1.0, run_epsilon=2.0)


def test_site_imports_nothing_heavy() -> None:
    code = (
        "import sys, client_app.policy.policy, client_app.release.log, client_app.state.private_state, "
        "deploy.commands.ledger\nprint({'torch', 'flwr', 'dp_accounting', 'opacus', 'scipy'} & "
        "set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

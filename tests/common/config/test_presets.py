"""How a run's settings come together: default < preset < named keys < expert; removed keys say what holds now."""

from __future__ import annotations

import math

import pytest
import torch

from common.config.presets import PRESETS, as_expert, read_pairs, resolve, resolve_listed
from common.config.removed import REMOVED
from common.config.run import RunConfig, Scalar
from common.errors import ConfigError
from common.loop import run_loop
from common.records import SiteData


def test_precedence_is_default_preset_named_expert() -> None:
    assert resolve({}) == resolve({"preset": "table"}) == RunConfig()
    demo = resolve({"preset": "demo"})
    assert demo.training.num_rounds == PRESETS["demo"]["num-rounds"] != RunConfig().training.num_rounds
    assert resolve({"preset": "demo", "num-rounds": 7}).training.num_rounds == 7
    both = resolve({"preset": "demo", "num-rounds": 7, "expert": "num-rounds=8 momentum=0.9 hidden-widths=64"})
    assert (both.training.num_rounds, both.training.momentum, both.model.widths) == (8, 0.9, (64,))


def test_a_listed_default_is_not_named_so_a_preset_stands_against_it() -> None:
    listed = {**RunConfig().to_flat(), "preset": "demo", "expert": ""}
    assert resolve_listed(listed) == resolve({"preset": "demo"})
    assert resolve_listed({**listed, "num-rounds": 7}).training.num_rounds == 7
    assert resolve_listed({**listed, "expert": "num-rounds=100"}).training.num_rounds == 100


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_only_what_it_changes(preset: str) -> None:
    defaults, changed = RunConfig().to_flat(), resolve({"preset": preset}).to_flat()
    assert {key for key in defaults if defaults[key] != changed[key]} == set(PRESETS[preset])


def test_as_expert_makes_the_same_configuration_whatever_else_is_listed() -> None:
    words = "a \"b\" 'c' = 2"
    settings: dict[str, Scalar] = {"epsilon": math.inf, "run-name": words, "resume": True, "hidden-widths": "64"}
    config = RunConfig.from_flat(settings)
    assert resolve_listed({"preset": "demo", "num-rounds": 3, "expert": as_expert(config)}) == config


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"preset": "dmeo"}, "unknown preset 'dmeo': expected one of table, demo, paper"),
        ({"expert": "momentum"}, "KEY=VALUE"),
        ({"expert": "=1"}, "KEY=VALUE"),
        ({"expert": "run-name='a"}, "No closing quotation"),
        ({"expert": "preset=demo"}, "unknown setting 'preset'"),
        ({"expert": "num-rounds=many"}, "setting num-rounds: "),
        *(({key: 1}, f"there is no setting {key} any more: {words}") for key, words in REMOVED.items()),
    ],
)
def test_resolve_refuses_with_one_line(named: dict[str, Scalar], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(named)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_removed_setting_is_there() -> None:
    assert set(REMOVED).isdisjoint(RunConfig().to_flat())


def test_read_pairs_leaves_types_to_the_fields() -> None:
    pairs = read_pairs(["num-rounds=3", "epsilon=inf", "resume=True", "run-name=2026", "hidden-widths=64"])
    config = RunConfig.from_flat(pairs)
    assert config == RunConfig.from_flat(
        {"num-rounds": 3, "epsilon": math.inf, "resume": True, "run-name": "2026", "hidden-widths": "64"}
    )


OPTIONS = {
    "paper": "",
    "paper as printed": "encoder-training=unprotected",
    "Eq. 2: no code": "code-dim=0",
    "Eq. 5: Lipschitz penalty": "lipschitz-penalty=0.1 lipschitz-bound=0.5",
    "Eq. 6: MMD against a release": "mmd=released",
    "Eq. 6: MMD a term for each record": "mmd=per-example mmd-weight=1",
    "Eq. 8: encoder trained on records": "encoder-training=joint",
    "Eq. 9: a batch": "sampling-rate=0.5 local-steps=2",
    "Eq. 11: covariances": "covariance-weight=1 num-codes=3",
    "Eq. 12: standard latents": "printed-rows=true",
    "Eq. 13: mixed parameters": "printed-rows=true num-codes=3",
    "sizes": "hidden-widths=5,4 trunk-width=3 prior-width=3 label-embedding-dim=2 encoder-width=6",
    "objective": "elbo-weight=1 discriminative-weight=0 code-penalty=0.1 code-radius=1",
    "steps": "momentum=0 averaging-fraction=0 score-noise=0 generator-rate=0.1 code-rate=0.1 encoder-rate=0.01",
    "secagg": "trust=secagg num-sites=4 dropouts=1 colluders=0",
    "second paper": "method=mh_pfedhn local-epochs=1 chunk-size=16 chunk-embedding-dim=4 body-width=8 hyper-rate=1e-3",
    "second paper, architectures": "method=mh_pfedhn architectures=linear,mlp-3 hyper-gradient-norm=1",
    "second paper, distillation": "method=mh_pfedhn_gd teacher-weight=0.5 teacher-temperature=2 local-decay=0",
    "second paper, private": "method=mh_pfedhn_gd_dp local-batch-size=4 local-rate=0.1 local-momentum=0.5",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_the_papers_runs_through_expert(option: str) -> None:
    small = "num-sites=3 num-rounds=2 noise=test meta-steps=3 synthetic-rows=30"
    preset = "paper" if option.startswith("paper") else "table"
    config = resolve({"preset": preset, "expert": f"{small} {OPTIONS[option]}"})
    draws = torch.Generator().manual_seed(3)
    sites = [SiteData(torch.randn(9, 6, generator=draws), torch.arange(9) % 3)] * config.federation.num_sites
    run = run_loop(config, sites, ("a", "b", "c"))
    assert run.artifact.tensors
    assert all(bool(tensor.isfinite().all()) for tensor in run.artifact.tensors.values())

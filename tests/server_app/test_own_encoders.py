"""Sites with encoders of their own under Flower: MH-pFedHN makes each a model of its embeddings' width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client_app.records import load_records, split_data
from common.config.run import RunConfig
from common.errors import ConfigError, MeetingError
from common.loop import run_loop
from common.methods import method_names, method_of
from common.publishing.bundle import load_bundle
from common.wire.agreement import require_agreement
from common.wire.allow_list import SiteFacts
from embeddings.store.writing import write_store
from tests.harness import CLASSES, SMALL, Federation, deliver, make_identity, make_set, words_of

WIDTHS = (12, 20, 12, 8)
OPEN: dict[str, Any] = {"allowed_methods": method_names(), "data_is_public": True, "metrics_may_leave": True}
SETTINGS: dict[str, Any] = {"own-encoders": True, "num-rounds": 3}


def _federation(home: Path, **policy: Any) -> Federation:
    sets = {at: make_set(60, seed=at, dim=width) for at, width in enumerate(WIDTHS)}
    return Federation.create(home, num_sites=len(WIDTHS), sets=sets, **OPEN, **policy)


@pytest.mark.parametrize("method", ["mh_pfedhn", "mh_pfedhn_gd"])
def test_sites_of_other_widths_train_as_in_the_plain_loop_and_score_their_own_models(
    tmp_path: Path, method: str
) -> None:
    federation = _federation(tmp_path)
    settings = {**SETTINGS, "method": method, "local-epochs": 3, "hyper-rate": 1e-3}
    summary = federation.run(**settings)
    assert set(summary["scores"]) == {"local_only", "personal"}
    assert set(summary["scores"]["personal"]["per_site"]) == {f"site-{number}" for number in (1, 2, 3, 4)}
    sites = [
        split_data(load_records(site.folder / "site.parquet", tmp_path), "train", "record") for site in federation.sites
    ]
    config = RunConfig.from_flat({**SMALL, "num-sites": 4, "min-sites": 1, **settings})
    alone = run_loop(config, sites, CLASSES)
    published = load_file(federation.output / "generator.safetensors")
    assert published.keys() == alone.artifact.tensors.keys()
    for name, value in alone.artifact.tensors.items():
        torch.testing.assert_close(published[name], value, atol=1e-5, rtol=0.0)
    assert alone.context.problem.site_dims == WIDTHS
    bundle = load_bundle(federation.output)
    assert bundle.encoder is None
    assert bundle.context.problem.site_dims == WIDTHS


def test_the_private_form_is_charged_and_scored(tmp_path: Path) -> None:
    summary = _federation(tmp_path).run(**SETTINGS, method="mh_pfedhn_gd_dp", sampling_rate=1.0)
    assert summary["privacy"]["end_to_end"]
    assert all(0 < spent <= 3.0 for spent in summary["privacy"]["epsilon_spent_per_site"].values())
    assert "personal" in summary["scores"]


def test_other_encoders_are_refused_unless_asked_for(tmp_path: Path) -> None:
    federation = _federation(tmp_path)
    with pytest.raises(SystemExit):
        federation.run(method="mh_pfedhn")
    assert "site-2: dimension" in str(federation.status())
    with pytest.raises(ConfigError, match="own-encoders needs a method"):
        method_of(RunConfig.from_flat({"own-encoders": True}))
    with pytest.raises(ConfigError, match="name one pool"):
        RunConfig.from_flat({"pool": "a.parquet, b.parquet"})


def test_classes_must_agree_all_the_same() -> None:
    facts = {
        name: SiteFacts(name, -1, make_identity(dim, classes), "", True)
        for name, dim, classes in (("a", 4, CLASSES), ("b", 8, CLASSES), ("c", 4, CLASSES[::-1]))
    }
    require_agreement({name: facts[name] for name in ("a", "b")}, own_encoders=True)
    with pytest.raises(MeetingError, match=r"c: class_names"):
        require_agreement(facts, own_encoders=True)


def test_a_site_whose_width_changed_is_refused_before_it_is_charged(tmp_path: Path) -> None:
    """The run was begun with another width of this site: its index tells which one it must have."""
    federation = _federation(tmp_path)
    federation.run(**SETTINGS, method="mh_pfedhn_gd_dp", sampling_rate=1.0)
    message = federation.asked("train", "site-2")
    before = federation.site("site-2").entries()
    write_store(federation.site("site-2").folder / "site.parquet", make_set(60, seed=1, dim=12))
    assert words_of(deliver(federation.site("site-2"), message))["error"] == "data"
    assert federation.site("site-2").entries() == before

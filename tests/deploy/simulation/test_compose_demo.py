"""The compose demo's folders: every method of the comparison may run there."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app.policy.policy import SitePolicy, load_policy
from client_app.task import request_of
from common.config.run import RunConfig
from common.errors import PolicyRefusal
from common.methods import get_method, method_names
from common.methods.base import Problem, RunContext
from deploy.simulation import compose_demo
from embeddings.simulation.simulated import pool_path
from embeddings.store.writing import write_store
from tests.harness import CLASSES, DIM, make_set


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> SitePolicy:
    folder = tmp_path_factory.mktemp("compose")
    cache, app = folder / "cache", Path(__file__).resolve().parents[3]
    cache.mkdir()
    write_store(pool_path(cache), make_set(120))
    compose_demo.prepare(folder / "volumes", 2, app, cache)
    return load_policy(folder / "volumes" / "site-2" / "policy.toml")


def _context(**settings: str | int | float) -> RunContext:
    config = RunConfig.from_flat({"num-sites": 4, "num-rounds": 2, "epsilon": 3.0, "delta": 1e-5, **settings})
    return RunContext(config, Problem(DIM, CLASSES, 4), get_method(config.method).plan(config))


@pytest.mark.parametrize("method", method_names())
def test_every_method_may_run(policy: SitePolicy, method: str) -> None:
    policy.check(request_of(_context(method=method)))


def test_budget_and_approval_hold_all_the_same(policy: SitePolicy) -> None:
    assert len(policy.approved_app_digests) == 1
    assert policy.allowed_trust == ("local",)  # with secagg a site does not start before its peers are pinned
    with pytest.raises(PolicyRefusal):
        policy.check(request_of(_context(epsilon=20.0)))

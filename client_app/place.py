"""Which site this process speaks for: its folder, its policy, its records.

A deployed site is started with `data-dir` in its node's configuration; its policy and ledger lie there, outside the
app. In a simulation the node's partition number makes the site, whose data is a share of the demonstration's images,
which are public, or of the pool that the run names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_app.policy.policy import SitePolicy, load_policy
from client_app.records import Simulated
from common.config.privacy import PrivacyConfig
from common.config.run import RunConfig
from common.errors import DataError

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Place:
    """A site, as its own machine knows it.

    Attributes:
        name: what it calls itself.
        position: its partition in a simulation; -1 elsewhere.
        folder: everything it keeps.
        policy: what it allows.
        records: where its embeddings are.
        cache_dir: cache of a simulation's pool.
        device: where it wants to compute; empty leaves it to the run.
        new_ledger: whether a missing ledger may be made (simulations), or means that one was lost.
    """

    name: str
    position: int
    folder: Path
    policy: SitePolicy
    records: Path | Simulated
    cache_dir: Path
    new_ledger: bool
    device: str = ""


def find_place(node_config: Mapping[str, Scalar], config: RunConfig) -> Place:
    """The site of this node.

    Args:
        node_config: of the SuperNode: `data-dir` and optionally `site-name`, `data-file` and `device`; or a
            simulation's `partition-id` and `num-partitions`.
        config: of the run: what a simulated site is made of, and the ε and unit that its policy is made to allow. A
            deployed site uses none of it.

    Raises:
        DataError: the node's configuration names no site. ConfigError: its policy is missing or wrong.
    """
    if "data-dir" in node_config:
        folder = Path(str(node_config["data-dir"]))
        records = folder / str(node_config.get("data-file", "site.parquet"))
        name = str(node_config.get("site-name", folder.name))
        policy, device = load_policy(folder / "policy.toml"), str(node_config.get("device", ""))
        return Place(name, -1, folder, policy, records, folder, new_ledger=False, device=device)
    if "partition-id" not in node_config:
        raise DataError("the node names no site: start it with --node-config 'data-dir=\"/srv/site\"'")
    from embeddings.simulation.simulated import cache_folder  # a deployed site needs nothing of simulations

    index, count = int(node_config["partition-id"]), int(node_config["num-partitions"])
    home = Path(os.environ.get("FEDHYPEVAE_HOME", "")).resolve()
    federation, sites = config.federation, home / config.operation.output_dir / "sites"
    name = f"site-{index + 1}"
    pools = federation.pools
    pool = home / pools[index % len(pools)] if pools else None
    simulated = Simulated(index, count, federation.alpha, federation.seed, pool)
    policy = simulated_policy(name, config.privacy, public=pool is None or federation.data_is_public)
    return Place(name, index, sites / name, policy, simulated, cache_folder(home), new_ledger=True)


def open_policy(*, public: bool) -> dict[str, Any]:
    """Lines of a policy, beside its budget, that refuses no setting which makes sense: for simulations and demos.

    Args:
        public: whether the data is: only then scores may leave, and runs without a guarantee are allowed.
    """
    from common.methods import method_names

    return {
        "max_clip_norm": 1e6,
        "min_noise_multiplier": 1e-3,
        "allowed_methods": method_names(),
        "allowed_encoder_training": ("sleep", "joint", "unprotected") if public else ("sleep", "joint"),
        "allowed_trust": ("local", "secagg"),
        "data_is_public": public,
        "metrics_may_leave": public,
        "allow_test_noise": public,
    }


def simulated_policy(name: str, privacy: PrivacyConfig, *, public: bool = True) -> SitePolicy:
    """The policy of a simulated site: where its data is public it allows every setting that makes sense.

    Where it is not, scores stay at the site and runs without a guarantee are refused, as at a real one. The budget
    holds either way: `run_epsilon` is the run's own ε, and the ledger is real.
    """
    epsilon = min(privacy.epsilon, 100.0)
    return SitePolicy(
        cohort_id=f"demo/{name}",
        lifetime_epsilon=100.0,
        lifetime_delta=min(privacy.delta, 1e-2),
        run_epsilon=epsilon,
        unit=privacy.unit,
        max_records_per_patient=privacy.max_records_per_patient,
        **open_policy(public=public),
    )

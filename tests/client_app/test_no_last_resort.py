"""No record, unit or set of parameters within the public bounds brings the last resort about.

It carries no guarantee by itself: whether it was reached would depend on the records. Counted by the site's own log.
"""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.ledger.ledger import Ledger
from client_app.policy.policy import load_policy
from client_app.release.last_resort import LOGGED
from common.bounds import LARGEST_NORM
from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import PrivacyPlan, Problem, RunContext
from common.wire.allow_list import dump_context
from embeddings.store.writing import write_store
from tests.harness import CLASSES, HarnessSite, deliver, make_set, words_of

DIM = 3
VALUES = [0.0, 1.0, -1.0, 1e-45, -1e-40, 1e-38, 1e-20, 1e20, 1e38, -3.4028235e38, np.inf, -np.inf, np.nan]
ROWS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(VALUES) | st.floats(width=32), min_size=DIM, max_size=DIM),
        st.integers(0, 2) | st.sampled_from([-1, 3, 2**63 - 1, -(2**63)]),
        st.integers(0, 2) | st.sampled_from([-(2**63), 2**63 - 1]),
    ),
    max_size=12,
)
BASE: dict[str, str | int | float | bool] = {
    "epsilon": 3.0, "delta": 1e-5, "num-rounds": 1, "spare-rounds": 0, "num-sites": 1, "min-sites": 1,
    "encoder-width": 4, "prior-width": 2, "sleep-steps": 1, "cvae-width": 4, "gan-width": 4, "noise-dim": 2,
    "architectures": "mlp-3",
}  # fmt: skip
# One step's noise takes the parameters of the next far beyond what a server may send.
STEEP: dict[str, str | int | float | bool] = {
    "local-steps": 4, "learning-rate": 1e6, "generator-rate": 1e6, "score-noise": 0.0, "hidden-widths": "3",
}  # fmt: skip
CASES: dict[str, dict[str, str | int | float | bool]] = {
    "default": {},
    "patients": {"unit": "patient", "max-records-per-patient": 2},
    "wide features": {"feature-norm": 1e4},
    "tiny radii": {"feature-norm": 1e-3, "code-radius": 1e-3},
    "large factors": {"elbo-weight": 1e6, "code-radius": 1e4, "class-bias-scale": 1e3},
    "least factors": {"elbo-weight": 1e-6, "residual-energy": 1e-6, "class-bias-scale": 1e-3, "clip-norm": 1e-6},
    "six layers": {"hidden-widths": "3,3,3,3,3,3", "encoder-training": "joint", "trunk-width": 2},
    "all of one kind": {"latent-dim": 0, "code-dim": 0, "elbo-weight": 0.0, "clip-norm": 1e6},
    "mmd by record": {"mmd": "per-example", "mmd-weight": 1.0},
    "mmd by release": {"mmd": "released", "mmd-weight": 1.0},
    "a second moment": {"covariance-weight": 1.0, "local-steps": 3},
    "rates without end": {**STEEP, "mmd": "released", "mmd-weight": 1e6},
    "rates without end, and a penalty": {**STEEP, "lipschitz-penalty": 1.0, "encoder-training": "joint"},
    "dp_fedsgd": {"method": "dp_fedsgd"},
    "dp_cvae": {"method": "dp_cvae"},
    "dp_cgan": {"method": "dp_cgan"},
    "dp_cgan with a rate without end": {"method": "dp_cgan", "local-steps": 4, "adam-rate": 1e6, "gan-width": 64},
    "dp_gauss": {"method": "dp_gauss"},
    "mh_pfedhn_gd_dp": {"method": "mh_pfedhn_gd_dp", "teacher-temperature": 1e-6},
    "mh_pfedhn_gd_dp, rates without end": {"method": "mh_pfedhn_gd_dp", "local-rate": 1e6, "local-epochs": 3},
}


@cache
def context_of(case: str) -> RunContext:
    config = RunConfig.from_flat(BASE | CASES[case])
    rounds = 0 if config.method == "dp_gauss" else 1
    plan = PrivacyPlan(4.0, 4.0 if rounds else None, 1.0, config.training.local_steps, rounds, 1e-5, 0)
    return RunContext(config, Problem(DIM, CLASSES, 1), plan)


def write_rows(path: Path, rows: list[tuple[list[float], int, int]]) -> None:
    """A store of any rows at all, with the schema and the metadata of an honest one."""
    write_store(path, dataclasses.replace(make_set(3, dim=DIM, patients=True)))
    schema = pq.read_schema(path)
    values = pa.array(np.array([row for row, _, _ in rows], dtype=np.float32).ravel(), type=pa.float32())
    columns: dict[str, Any] = {
        "embedding": pa.FixedSizeListArray.from_arrays(values, DIM),
        "label": pa.array([label for _, label, _ in rows], type=pa.int64()),
        "patient": pa.array([patient for _, _, patient in rows], type=pa.int64()),
    }
    table = pa.Table.from_arrays([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)
    pq.write_table(table, path)


def make_site(folder: Path, rows: list[tuple[list[float], int, int]], unit: str) -> HarnessSite:
    site = HarnessSite("site-1", 101, folder)
    methods = tuple(sorted({str(case.get("method", "fedhypevae")) for case in CASES.values()}))
    site.set_policy(
        lifetime_epsilon=100.0,
        run_epsilon=100.0,
        unit=unit,
        max_records_per_patient=4 if unit == "patient" else None,
        max_clip_norm=1e6,
        allowed_methods=methods,
        allowed_encoder_training=("sleep", "joint"),
    )
    policy = load_policy(folder / "policy.toml")
    Ledger.create(policy.ledger_path(folder), policy.cohort_id, policy.witness_path(folder)).close()
    write_rows(folder / "site.parquet", rows)
    return site


def parameters(context: RunContext, size: float, seed: int) -> dict[str, torch.Tensor]:
    """What a server may send at most: every tensor of the norm that its bound allows, times `size`."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, shape in get_method(context.config.method).received_by(context, 0).items():
        value = torch.randn(shape, generator=generator)
        largest = 1.99 if name == "constant.centre" else LARGEST_NORM * 0.99
        made[name] = value * (size * largest / max(float(value.norm()), 1e-6))
        if name == "constant.total":
            made[name] = torch.tensor(1e12 * size)
        elif name == "constant.class_offsets":
            made[name] = value.clamp(-1, 1) * 31.0 * size
    return made


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=6)
@given(rows=ROWS, size=st.sampled_from([0.0, 1e-3, 1.0]), seed=st.integers(0, 2**20))
def test_no_record_unit_or_parameter_brings_it_about(
    case: str, rows: list[tuple[list[float], int, int]], size: float, seed: int
) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    context = context_of(case)
    kinds = ["query.statistics"] * (get_method(context.config.method).statistics(context) is not None)
    kinds += ["train"] * (context.plan.num_rounds > 0)
    with tempfile.TemporaryDirectory() as folder:
        site = make_site(Path(folder), rows, context.config.privacy.unit)
        for kind in kinds:
            words: dict[str, str | int] = {"context": dump_context(context), "run": "run", "index": 0}
            content = RecordDict({"words": ConfigRecord(words | ({"round": 0} if kind == "train" else {}))})
            sent = parameters(context, size, seed) if kind == "train" else {}
            content["tensors"] = ArrayRecord(sent)
            reply = deliver(site, Message(content, dst_node_id=site.node, message_type=kind))
            assert LOGGED not in site.log()
            assert "error" not in words_of(reply), site.log()
            tensors = reply.content.array_records["tensors"].to_torch_state_dict()
            assert all(bool(torch.isfinite(value).all()) for value in tensors.values())

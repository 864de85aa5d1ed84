"""One training message in a fresh process, as Flower starts one: the child of `benchmarks.round`, and what it needs."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

DIM, CLASSES, RECORDS = 768, 11, 1_613
NAMES = tuple(f"class-{index}" for index in range(CLASSES))
SETTINGS: dict[str, str | int | float | bool] = {
    "num-rounds": 25,
    "epsilon": 3.0,
    "meta-steps": 0,
    "synthetic-rows": 110,
}
_RUN = "benchmark"


def make_sites(home: Path, count: int) -> list[Path]:
    """Sites' folders as hospitals have them: policy, ledger, records; the run declared and its first round charged."""
    import numpy as np

    from client_app.ledger.ledger import Ledger
    from client_app.policy.policy import load_policy
    from client_app.policy.template import policy_template
    from common.wire.identity import EncoderIdentity
    from embeddings.store.sets import EmbeddingSet, SetMetadata
    from embeddings.store.writing import write_store

    identity = EncoderIdentity("made-up", "1", DIM, "none", "0" * 64, "float32", NAMES)
    folders = []
    for index in range(count):
        folder = home / f"site-{index + 1}"
        folder.mkdir(parents=True)
        text = policy_template(
            f"benchmark/{folder.name}",
            lifetime_epsilon=20.0,
            run_epsilon=3.5,
            min_noise_multiplier=0.01,
        )
        (folder / "policy.toml").write_text(text, encoding="utf-8")
        rng = np.random.default_rng(index)
        rows = rng.normal(size=(RECORDS, DIM)).astype(np.float32)
        labels = rng.integers(CLASSES, size=RECORDS).astype(np.int64)
        write_store(folder / "site.parquet", EmbeddingSet(rows, labels, SetMetadata(identity)))
        policy = load_policy(folder / "policy.toml")
        Ledger.create(policy.ledger_path(folder), policy.cohort_id, policy.witness_path(folder)).close()
        folders.append(folder)
    return folders


def make_messages(folder: Path) -> tuple[Path, Path]:
    """The messages of statistics and of the first round, default model, as bytes in two files."""
    import torch
    from flwr.common.serde import message_to_proto

    from common.config.run import RunConfig
    from common.methods import get_method
    from common.methods.base import Problem, RunContext
    from common.wire.allow_list import dump_context
    from server_app.exchange import build_messages

    _pose_as_task()
    config = RunConfig.from_flat({**SETTINGS, "num-sites": 10})
    method = get_method(config.method)
    context = RunContext(config, Problem(DIM, NAMES, 10), method.plan(config))
    # as after the statistics, whose values do not matter here
    released = {name: torch.ones(shape) for name, shape in method.received_by(context, 0).items()}
    params = {**released, **method.init(context).params}
    words: dict[str, str | int | float] = {"context": dump_context(context), "run": _RUN, "index": 0}
    paths = []
    first = build_messages("statistics", [7], lambda _: words, lambda _: {}, "statistics", 600.0)
    told = {**words, "round": 0}
    second = build_messages("train", [7], lambda _: told, lambda _: params, "round-1", 600.0)
    for name, (message,) in (("statistics", first), ("train", second)):
        message.metadata.__dict__["_message_id"] = "0" * 32
        paths.append(folder / f"{name}.bin")
        paths[-1].write_bytes(message_to_proto(message).SerializeToString())
    return paths[0], paths[1]


def declare(statistics: Path, sites: list[Path]) -> None:
    """Let each site answer the first message of the run, after which its ledger knows the run."""
    from flwr.app import Context, RecordDict
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as Proto

    from client_app.app import app

    for site in sites:
        message = message_from_proto(Proto.FromString(statistics.read_bytes()))
        reply = app(message, Context(1, 7, {"data-dir": str(site), "site-name": site.name}, RecordDict(), {}))
        _check(reply, site)


def _check(reply: Any, site: Path) -> None:
    words = reply.content.config_records.get("words", {})
    if "error" in words:
        raise RuntimeError(f"the site refused: {dict(words)}; see {site}/site.log")


def _pose_as_task() -> None:
    """What Flower's own starter of an app's process sets."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def answer(app: str, path: Path, site: Path) -> dict[str, float]:
    """Import an app, read the message, answer it, and pack the answer: processor seconds of each part, and of all."""
    marks = [("start", time.process_time())]

    def mark(name: str) -> None:
        marks.append((name, time.process_time()))

    import torch

    handler: Callable[[Any, Any], Any]
    if app == "floor":
        from flwr.app import ArrayRecord, Context, Message, RecordDict

        def handler(message: Any, context: Any) -> Any:
            received = message.content.array_records["tensors"].to_torch_state_dict()
            sent = {name: torch.ones_like(value) for name, value in received.items()}
            return Message(RecordDict({"tensors": ArrayRecord(sent)}), reply_to=message)
    else:
        from flwr.app import Context, RecordDict

        mark("imports of the floor")
        from client_app.app import app as handler

    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.message_pb2 import Message as Proto

    _pose_as_task()
    mark("imports")
    message = message_from_proto(Proto.FromString(path.read_bytes()))
    mark("reading")
    config = {"data-dir": str(site), "site-name": site.name}
    with _watched() if app == "ours" else nullcontext(dict[str, float]()) as spent:
        reply = handler(message, Context(1, 7, config, RecordDict(), {}))
    mark("handler")
    _check(reply, site)
    reply.metadata.__dict__["_message_id"] = "1" * 32
    message_to_proto(reply).SerializeToString()
    mark("packing")
    found = {name: now - before for (_, before), (name, now) in itertools.pairwise(marks)}
    found |= {f"handler: {name}": seconds for name, seconds in spent.items()}
    return {**found, "whole": time.process_time()}


@contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """What the handler calls is timed by part while this lasts; the numbers come as it runs."""
    from client_app.ledger.ledger import Ledger
    from common.methods import get_method

    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - start

        return call

    with ExitStack() as undone:

        def watch(home: object, name: str, part: str) -> None:
            undone.enter_context(mock.patch.object(home, name, timed(part, getattr(home, name))))

        for module, name, part in (
            (sys.modules["client_app.app"], "find_place", "policy"),
            (sys.modules["client_app.policy.asked"], "load_context", "context"),
            (sys.modules["client_app.records"], "load_records", "records"),
        ):
            if hasattr(module, name):
                watch(module, name, part)
        for name in ("open", "declare_run", "reserve", "commit"):
            watch(Ledger, name, "ledger")
        method = get_method("fedhypevae")
        step = method.client_step
        # a frozen method: set as its own constructor sets it, and put back
        object.__setattr__(method, "client_step", timed("client step", step))
        undone.callback(object.__setattr__, method, "client_step", step)
        yield spent


def main() -> None:
    """Print the parts as JSON."""
    app, path, site = sys.argv[1:4]
    print(json.dumps(answer(app, Path(path), Path(site))))


if __name__ == "__main__":
    main()

"""Both directions of a round: the error of one message is made up for in the next, and releases are packed noised."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import WireError
from common.loop import run_loop
from common.methods import get_method
from common.methods.base import Method, PrivacyPlan, Problem, RunContext, ServerState, seeded
from common.privacy.noise import TestNoise
from common.records import SiteData
from common.wire import versions as transfer
from common.wire.allow_list import PACKED
from common.wire.compression import pack, packed_size
from common.wire.versions import Held, apply_change, from_wire, next_held, to_wire, version_of, wire_shapes

ROOT = Path(__file__).resolve().parents[3]
DIM, CLASSES = 24, ("a", "b", "c")


def context_of(bits: int = 8, **changes: Any) -> tuple[RunContext, Method]:
    config = RunConfig().replace(wire_bits=bits, num_sites=2, **changes)
    plan = PrivacyPlan(1.0, 1.0, 1.0, 1, 10, 1e-5)
    return RunContext(config, Problem(DIM, CLASSES, 2), plan), get_method(config.method)


def walk(
    bits: int, step: Callable[[RunContext, Method, ServerState, Held | None], Held], rounds: int = 40
) -> list[float]:
    """Largest distance of what sites hold from the server's own parameters, in steps of 1, while these move."""
    context, method = context_of(bits)
    state = method.init(context)
    held, distances = None, []
    for number in range(rounds):
        held = step(context, method, replace(state, round=number), held)
        distances.append(max(float((held.tensors[n] - v).abs().max()) for n, v in state.params.items()))
        moves = {n: torch.randn(v.shape, generator=seeded(n, number)) for n, v in state.params.items()}
        state = replace(state, params={n: v + moves[n] for n, v in state.params.items()})
    return distances


def right(context: RunContext, method: Method, state: ServerState, held: Held | None) -> Held:
    return next_held(context, method, state, 0, held)


def without_feedback() -> Callable[[RunContext, Method, ServerState, Held | None], Held]:
    """Each message tells how the server moved since the last one, not what the site lacks: errors add up."""
    last: list[dict[str, Tensor]] = []

    def step(context: RunContext, method: Method, state: ServerState, held: Held | None) -> Held:
        if held is None:
            last.append(dict(state.params))
            return next_held(context, method, state, 0, None)
        moved = {name: value - last[-1][name] for name, value in state.params.items()}
        last.append(dict(state.params))
        tensors = apply_change(held.tensors, pack(moved, 6, leave_out_zeros=True), 6)
        return Held(state.round, tensors, version_of(tensors))

    return step


def test_rounding_down_never_adds_up() -> None:
    """Moves of at most about 4 a round, 31 codes each way: within half a step of what there is to make up for."""
    distances = walk(6, right)
    assert distances[0] == 0.0  # the first is whole
    assert max(distances) < 0.5 * (5.0 / 31) * 1.2
    assert max(distances[30:]) < 1.5 * max(distances[1:10])


def test_rounding_without_feedback_adds_up() -> None:
    distances = walk(6, without_feedback())
    assert max(distances) > 0.5 * (5.0 / 31) * 1.2
    assert max(distances[30:]) > 1.5 * max(distances[1:10])


def test_server_that_stands_still_is_reached() -> None:
    """What rounding left over is sent later: after a few messages nothing is left, and nothing more is sent."""
    context, method = context_of(8)
    state = method.init(context)
    held = next_held(context, method, state, 0, None)
    target = {name: value + torch.randn(value.shape, generator=seeded(name)) for name, value in state.params.items()}
    sizes = []
    for number in range(1, 8):
        held = next_held(context, method, replace(state, round=number, params=target), 0, held)
        assert held.change is not None
        sizes.append(held.change.numel())
    torch.testing.assert_close(dict(held.tensors), target, atol=1e-6, rtol=1e-6)
    assert sizes[0] == packed_size({name: tuple(value.shape) for name, value in target.items()}, 8)
    assert sizes[-1] < sizes[0]


def test_same_round_makes_the_same_version_once() -> None:
    context, method = context_of(8)
    state = method.init(context)
    held = next_held(context, method, state, 0, None)
    assert next_held(context, method, state, 0, held) is held


def test_version_sees_names_types_shapes_and_the_last_bit() -> None:
    base = {"a": torch.ones(2, 3)}
    others = [{"b": base["a"]}, {"a": base["a"].double()}, {"a": base["a"].reshape(3, 2)},
              {"a": torch.nextafter(base["a"], torch.tensor(2.0))}, {**base, "c": torch.zeros(0)}]  # fmt: skip
    assert len({version_of(one) for one in (base, *others)}) == 6
    assert version_of({"a": torch.ones(3, 2).T}) == version_of(base)


def test_uploads_of_parameters_are_told_as_differences() -> None:
    """FedAvg's weights near what was received: the error is a step of the difference, not of the weights."""
    received = {"weight": 100.0 + torch.randn(5, 70, generator=seeded("w"))}
    after = {"weight": received["weight"] + 1e-3 * torch.randn(5, 70, generator=seeded("d")), "n": torch.tensor([7.0])}
    shapes = {"weight": (5, 70), "n": (1,)}
    back = from_wire(to_wire(after, 8, received, seeded("r")), shapes, 8, received)
    assert float((back["weight"] - after["weight"]).abs().max()) < 1e-4
    assert float(back["n"]) == pytest.approx(7.0, rel=1e-6)
    with_nothing = from_wire(to_wire(after, 8, {}, seeded("r")), shapes, 8, {})
    assert float((with_nothing["weight"] - after["weight"]).abs().max()) > 0.1


def test_change_of_other_tensors_is_refused() -> None:
    change = pack({"a": torch.ones(100)}, 8, leave_out_zeros=True)
    with pytest.raises(WireError):
        apply_change({"a": torch.zeros(99)}, change, 8)


def test_nothing_to_send_is_nothing() -> None:
    assert to_wire({}, 8, {}, seeded("r")) == {}
    assert from_wire({}, {}, 8, {}) == {}
    assert wire_shapes({}, 8) == {}


# Privacy: the quantiser sees noised values alone.


def sites_of(rows: int, seed: int = 3) -> list[SiteData]:
    generator = torch.Generator().manual_seed(seed)
    return [SiteData(torch.randn(rows, DIM, generator=generator), torch.arange(rows) % len(CLASSES)) for _ in range(2)]


class Watch:
    """Records what noise was added to, and what was packed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, noised_after: bool = False) -> None:
        from common.methods.fedhypevae import site as hypevae_site
        from common.privacy import statistics

        self.noised: list[Tensor] = []
        self.packed: list[Tensor] = []
        add, put = hypevae_site.add_gaussian, transfer.pack

        def noising(tensors: Any, std: float, source: Any) -> Any:
            if noised_after:  # the broken version: packed, read back, and only then noised
                tensors = {n: v.to(tensors[n].dtype) for n, v in _rounded(tensors, seeded("broken")).items()}
            noisy = add(tensors, std, source)
            self.noised += [value.double().flatten() for value in noisy.values()]
            return noisy

        def packing(tensors: Any, *rest: Any, **more: Any) -> Any:
            if not more.get("leave_out_zeros"):
                self.packed += [value.double().flatten() for value in tensors.values()]
            return put(tensors, *rest, **more)

        monkeypatch.setattr(hypevae_site, "add_gaussian", noising)
        monkeypatch.setattr(statistics, "add_gaussian", noising, raising=False)
        monkeypatch.setattr(transfer, "pack", packing)

    def unnoised(self) -> int:
        """How many packed tensors are not, to the last bit, what came out of the noise (as float32, reweighted)."""
        known = {value.float().numpy().tobytes() for value in self.noised}
        return sum(value.float().numpy().tobytes() not in known for value in self.packed)


def _rounded(tensors: Any, draws: torch.Generator) -> dict[str, Tensor]:
    from common.wire.compression import unpack

    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return unpack(transfer.pack(tensors, 8, draws), shapes, 8)


SETTINGS: dict[str, Any] = {
    "num_sites": 2, "num_rounds": 2, "noise": "test", "statistics_share": 0.0, "public_total": 40, "spare_rounds": 0,
    "wire_bits": 8, "sleep_steps": 1, "encoder_width": 4, "meta_steps": 1, "synthetic_rows": 30,
}  # fmt: skip


def test_quantiser_sees_noised_values_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    run_loop(RunConfig().replace(**SETTINGS), sites_of(20), CLASSES)
    assert len(watch.packed) >= 2 * 2 * 10
    assert watch.unnoised() == 0


def test_quantising_before_the_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch, noised_after=True)
    run_loop(RunConfig().replace(**SETTINGS), sites_of(20), CLASSES)
    assert watch.unnoised() >= 2 * 2 * 10


def scales_of(packed: Tensor, size: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(packed.numpy().tobytes()[: 4 * math.ceil(size / 2048)], dtype="<f4")


def scale_tells_the_data(way: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether the scale on the wire tells a site without records from one with many, under ample noise."""
    found = []
    for signal in (0.0, 1.0):
        raw = torch.full((4000,), signal)
        noised = raw + torch.from_numpy(TestNoise(5).gaussian(4000, 1000.0))
        found.append(scales_of(way(raw, noised), 4000))
    return bool(np.abs(found[1] / np.maximum(found[0], 1e-30) - 1.0).max() > 0.1)


def test_scale_is_of_the_noised_values() -> None:
    assert not scale_tells_the_data(lambda _, noised: to_wire({"x": noised}, 8, {}, seeded("r"))[PACKED])


def test_scale_of_the_raw_values_would_tell_them() -> None:
    def from_raw(raw: Tensor, noised: Tensor) -> Tensor:
        packed = to_wire({"x": noised}, 8, {}, seeded("r"))[PACKED].clone()
        packed[:8] = to_wire({"x": raw}, 8, {}, seeded("r"))[PACKED][:8]
        return packed

    assert scale_tells_the_data(from_raw)


def importers(name: str) -> set[str]:
    """Modules of the apps and methods that import a name from `common.wire.compression` or `common.wire.versions`."""
    found = set()
    for folder in ("common", "client_app", "server_app"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    ("common.wire.compression", "common.wire.versions")
                ):
                    found |= {str(path.relative_to(ROOT)) for alias in node.names if alias.name == name}
    return found


def test_releases_are_packed_in_one_place_under_flower_and_one_in_the_loop() -> None:
    assert importers("pack") == {"common/wire/versions.py"}
    assert importers("to_wire") == {"client_app/release/release.py", "common/loop.py"}


def test_quantiser_draws_no_noise_and_knows_no_source() -> None:
    for module in ("compression", "versions"):
        text = (ROOT / "common" / "wire" / f"{module}.py").read_text(encoding="utf-8")
        modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert not modules & {"common.privacy.noise", "common.privacy.clipping", "common.privacy.sampling"}

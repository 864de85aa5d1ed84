"""The choice of a device, and a site's step on one that is not the processor."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client_app import local_step
from client_app.place import Place
from common import devices
from common.config.run import RunConfig
from common.devices import choose_device, computing_on, free_bytes, rows_that_fit
from common.errors import ConfigError
from common.methods import get_method
from common.methods.base import Problem, RunContext, StepInput
from common.methods.site_release import noise_source
from common.records import SiteData

CPU = torch.device("cpu")
METHODS = ("fedhypevae", "dp_cvae", "dp_cgan", "dp_fedsgd", "mh_pfedhn_gd_dp", "fedavg")


def test_auto_takes_the_processor_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=re.escape("found 'cuda:2'; it has 2 GPUs")):
        choose_device("cuda:2")


def test_cuda_without_a_gpu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="set device to auto or cpu") as error:
        choose_device("cuda")
    assert "found 'cuda'; it has 0 GPUs" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["gpu", "cuda:x", "cpu:1", "", "tpu"])
def test_unknown_device_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
        choose_device(word)


def test_setting_refuses_what_is_no_device() -> None:
    assert RunConfig().operation.device == "auto"
    with pytest.raises(ConfigError, match="setting device"):
        RunConfig.from_flat({"device": "quantum"})


def test_batches_are_bounded_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(CPU) > 0
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1000)
    assert rows_that_fit(CPU, 10.0, 128) == 70  # 0.7 of what is free
    assert rows_that_fit(CPU, 10.0, 16) == 16
    assert rows_that_fit(CPU, 10_000.0, 128) == 1  # one row must be tried


def test_draws_are_the_same_on_every_device() -> None:
    def draws() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [torch.randn(2, 3, generator=generator), torch.rand(4, generator=generator)]

    with computing_on(torch.device("meta")):
        made = [*draws(), torch.zeros(3), torch.randint(5, (2,), generator=torch.Generator())]
    assert all(one.device.type == "meta" for one in made)
    seen: list[Tensor] = []
    with devices._SeededDraws(CPU):  # moved from where they were drawn to here: the very same numbers
        seen = draws()
    assert all(torch.equal(left, right) for left, right in zip(seen, draws(), strict=True))


def step_of(name: str, **settings: Any) -> tuple[Any, RunContext, StepInput]:
    """A step of a method on a few made-up records, with seeded noise."""
    config = RunConfig().replace(
        method=name, noise="test", num_rounds=2, num_sites=2, public_total=40,
        sampling_rate=1.0 if name.startswith("mh_") else 0.5, **settings,
    )  # fmt: skip
    method = get_method(name)
    context = RunContext(config, Problem(12, ("a", "b", "c"), 2), method.plan(config))
    state, site = method.init(context), method.init_site(context, 0)
    generator = torch.Generator().manual_seed(1)
    data = SiteData(torch.randn(20, 12, generator=generator), torch.arange(20) % 3)
    params = method.params_for(context, state, 0)
    return method, context, StepInput(params, site, data, 0, 0, noise_source(config, 0, 0))


def place(device: str) -> Place:
    return Place("site-1", -1, Path(), None, Path(), Path(), new_ledger=False, device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_step_is_the_same_whether_the_device_is_chosen_or_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all three words mean the processor: a GPU gives its numbers within rounding only, see below."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = []
    for device in ("", "cpu", "auto"):
        method, context, step = step_of(name)
        results.append(local_step.client_step(place(device), method, context, step)[1])
    assert all(torch.equal(results[0][key], other[key]) for other in results for key in results[0])


def test_site_without_the_wanted_gpu_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    method, context, step = step_of("fedhypevae", device="cuda")
    with pytest.raises(ConfigError, match="expected one that this machine has"):
        local_step.client_step(place(""), method, context, step)
    after, uploads = local_step.client_step(place("cpu"), method, context, step)  # the site's own word goes first
    assert uploads
    assert after.tensors


def test_auto_leaves_a_gpu_alone_that_is_too_full(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    monkeypatch.setattr(local_step, "choose_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(local_step, "moved", lambda tensors, device: used.append(device.type) or dict(tensors))
    monkeypatch.setattr(local_step, "free_bytes", lambda _: 10)
    method, context, step = step_of("fedhypevae")
    local_step.client_step(place("auto"), method, context, step)
    assert used == []


def test_products_of_float32_stay_so_on_a_gpu() -> None:
    """TensorFloat-32 keeps 10 bits: norms would err by far more than the clip factor pays for."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with computing_on(torch.device("meta")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def on_meta(step: StepInput) -> StepInput:
    """The step's input on torch's `meta` device: it stands for a GPU, holds no numbers, and can't be asked for any."""
    meta = torch.device("meta")
    return replace(
        step,
        params=devices.moved(step.params, meta),
        site=replace(step.site, tensors=devices.moved(step.site.tensors, meta)),
        data=replace(step.data, embeddings=step.data.embeddings.to(meta), labels=step.data.labels.to(meta)),
    )


@pytest.mark.parametrize("name", METHODS)
def test_step_leaves_no_tensor_on_the_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it wait for the device, but to see whether labels are of known classes, and at its end sums finite."""
    asked: list[str] = []

    def answer(value: object) -> Any:
        return lambda _: asked.append(sys._getframe(1).f_code.co_name) or value

    monkeypatch.setattr(torch.Tensor, "__bool__", answer(True))
    monkeypatch.setattr(torch.Tensor, "__float__", answer(0.5))
    method, context, step = step_of(name)
    meta = torch.device("meta")
    with computing_on(meta):
        after, uploads = method.client_step(context, on_meta(step))
    tensors = {**after.tensors, **uploads}
    assert all(value.device == meta for key, value in tensors.items() if not key.endswith("adam.steps"))
    asked = [place for place in asked if place != "adam_step"]  # of a number that lies on the processor
    assert asked in (["of_known_class", "_add_on_device"], ["_add_on_device"], ["of_known_class"], [])


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_gpu_gives_the_processors_numbers(name: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        method, context, step = step_of(name)
        results.append(local_step.client_step(place(device), method, context, step))
    (state, uploads), (gpu_state, gpu_uploads) = results
    # Adam divides by a root of squared gradients: where they are small, another rounding of sums moves its steps more
    tolerances = {"rtol": 1e-3, "atol": 1e-5} if name in ("dp_cgan", "dp_cvae") else {"rtol": 1e-4, "atol": 1e-6}
    for key, value in {**uploads, **state.tensors}.items():
        torch.testing.assert_close({**gpu_uploads, **gpu_state.tensors}[key], value, **tolerances)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fedhypevae", "dp_cvae", "dp_fedsgd"])
def test_a_step_on_a_gpu_waits_for_it_once_it_is_under_way_only_at_the_end(name: str) -> None:
    method, context, step = step_of(name)
    cuda = torch.device("cuda")
    there = replace(
        step,
        params=devices.moved(step.params, cuda),
        site=replace(step.site, tensors=devices.moved(step.site.tensors, cuda)),
        data=replace(step.data, embeddings=step.data.embeddings.to(cuda), labels=step.data.labels.to(cuda)),
    )
    with computing_on(cuda):
        method.client_step(context, there)  # what is made once is made
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                method.client_step(context, there)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    places = {Path(one.filename).name for one in waits if "synchroniz" in str(one.message)}
    assert places <= {"records.py", "mechanism.py"}  # labels of known classes, finite sums

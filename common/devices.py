"""Where tensors are computed: the processor, or a GPU that gives the same numbers within rounding.

Code that computes names no device. `computing_on` makes new tensors on the one that was chosen, and moves the draws of
a seeded generator there after they were drawn on the processor, so that every device gets the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.errors import ConfigError

# of what is free now, the share that one job may plan with: others compute too, and fragments are lost
_SHARE = 0.7
_DRAWS: frozenset[Callable[..., Any]] = frozenset({torch.randn, torch.rand, torch.randint, torch.randperm})
_KINDS = ("cpu", "cuda")


def choose_device(wanted: str) -> torch.device:
    """The device of a setting.

    Args:
        wanted: `auto` (a GPU where there is one, else the processor), `cpu`, `cuda`, or `cuda:1` and so on.

    Returns:
        The device, which is there.

    Raises:
        ConfigError: "device: expected ..., found ...": no such device, or this machine has none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, number = wanted.partition(":")
    if kind not in _KINDS or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, found {wanted!r}")
    if kind == "cuda" and int(number or 0) >= count:
        has = f"{count} GPU{'s' if count != 1 else ''} that torch can use"
        raise ConfigError(
            f"device: expected one that this machine has, found {wanted!r}; it has {has}: set device to auto or cpu, "
            "or install the GPU's driver and torch's build for it (`fedhypevae doctor`)"
        )
    return torch.device(wanted)


def free_bytes(device: torch.device) -> int:
    """Memory that a device has free now, in bytes; of the processor, what the system has without swapping."""
    if device.type == "cuda":  # torch keeps what it freed, and hands it out again
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a system that does not tell
        return 2**31


def rows_that_fit(device: torch.device, bytes_per_row: float, most: int) -> int:
    """How many rows to compute at once: at most `most`, at least one, and no more than the free memory holds.

    Args:
        device: where.
        bytes_per_row: memory that one row takes while it is computed.
        most: more is not faster.
    """
    if bytes_per_row <= 0:
        return most
    return max(1, min(most, int(_SHARE * free_bytes(device) / bytes_per_row)))


def bytes_of(device: torch.device, run: Callable[[], object], guess: float) -> float:
    """Memory that a computation takes: measured on a GPU, by running it once; `guess` on the processor."""
    if device.type != "cuda":
        return guess
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return float(max(torch.cuda.max_memory_allocated(device) - before, 1))


def moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors by name, on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def sent_to(device: torch.device, values: Tensor) -> Tensor:
    """A tensor of the processor on a device, without waiting for what the device still computes."""
    if device.type == "cuda":
        values = values.pin_memory()  # from other memory a copy waits
    return values.to(device, non_blocking=True)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Make tensors on a device while this lasts; nothing changes where it is the processor.

    Products of float32 stay products of float32: what clipping says of its rounding is not true of TensorFloat-32,
    which some vendors' containers switch on.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with device, _SeededDraws(device):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class _SeededDraws(TorchFunctionMode):
    """Draws with a generator of the processor are made there, and moved: a GPU's own generator gives other numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _DRAWS and given.get("generator") is not None and given.get("device") is None:
            return sent_to(self._device, func(*args, **{**given, "device": "cpu"}))
        return func(*args, **given)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread within the block: small matrices gain nothing from more, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

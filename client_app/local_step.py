"""A method's step at a site, on the device that the run or the site chose; what comes back lies on the processor."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from client_app.place import Place
from common.devices import choose_device, computing_on, free_bytes, moved
from common.methods.base import Method, RunContext, SiteState, StepInput

# A step holds the records, what is computed of them, and gradients: some copies of both, measured generously.
_COPIES = 12


def client_step(
    place: Place, method: Method, context: RunContext, step: StepInput
) -> tuple[SiteState, dict[str, Tensor]]:
    """Run `method.client_step` on the chosen device.

    The site's own `device` (site.toml) goes before the run's. Under `auto` a GPU whose free memory would not hold the
    step is left alone.

    Args:
        place: the site.
        method: of the run.
        context: the run.
        step: its input, on the processor.

    Returns:
        What the method returns, on the processor. Noise is drawn there from the same source on every device.

    Raises:
        ConfigError: the device is not there; nothing was computed.
    """
    wanted = place.device or context.config.operation.device
    device = choose_device(wanted)
    if wanted == "auto" and device.type != "cpu" and step_bytes(step) > free_bytes(device):
        device = torch.device("cpu")
    if device.type == "cpu":
        return method.client_step(context, step)
    data = replace(step.data, embeddings=step.data.embeddings.to(device), labels=step.data.labels.to(device))
    there = replace(
        step, params=moved(step.params, device), site=SiteState(moved(step.site.tensors, device)), data=data
    )
    with computing_on(device):
        after, uploads = method.client_step(context, there)
    cpu = torch.device("cpu")
    return SiteState(moved(after.tensors, cpu)), moved(uploads, cpu)


def check_device(place: Place, context: RunContext) -> None:
    """Refuse a device that is not there (ConfigError), before anything is charged."""
    choose_device(place.device or context.config.operation.device)


def step_bytes(step: StepInput) -> int:
    """Memory that a step may need, in bytes."""
    held = [step.data.embeddings, *step.params.values(), *step.site.tensors.values()]
    return _COPIES * sum(tensor.numel() * tensor.element_size() for tensor in held)

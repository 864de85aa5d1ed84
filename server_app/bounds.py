"""How large an honest site's sum can be: what is larger is refused before it is added up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from common.errors import WireError
from common.methods.base import Method, RunContext, ServerState

# L2 norm of whole models: those of honest sites are a thousand times smaller.
LARGEST_PARAMETERS = 1e6


def largest_norm(context: RunContext, method: Method, state: ServerState, indices: Iterable[int]) -> float:
    """A norm that no honest site's upload of one round exceeds, with ten-fold room.

    Each step's sum is at most C times the units of one site, which are fewer than all sites' together; the noise
    has standard deviation sigma C in every coordinate. Where terms that
    read no record are added unclipped, or parameters are sent and no sums, a norm that no sensible parameters have must
    do: it keeps the next parameters finite.

    Args:
        context: the run.
        method: what is trained.
        state: the server's; the released total of units is in it.
        indices: the sites.
    """
    plan, privacy, training = context.plan, context.config.privacy, context.config.training
    if not method.private or not method.uploads_sums or plan.training_noise is None:
        return LARGEST_PARAMETERS
    if training.mmd != "off" or training.lipschitz_penalty > 0:
        return LARGEST_PARAMETERS
    statistics = state.statistics
    units = context.config.federation.public_total if statistics is None else statistics.total
    if not units > 0:
        return LARGEST_PARAMETERS
    size = sum(math.prod(shape) for index in indices for shape in method.shapes_from(context, index).values())
    noise = plan.training_noise * math.sqrt(size)
    return 10.0 * plan.steps_per_round * privacy.clip_norm * (units + noise)


def check_norm(tensors: Mapping[str, Tensor], largest: float) -> None:
    """Refuse a reply that is larger than any honest one (WireError)."""
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    if not norm <= largest:
        raise WireError(f"sent tensors of norm {norm:.3g}, more than the {largest:.3g} that an honest site's can have")

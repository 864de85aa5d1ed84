"""Whether the files of a bundle hold what they are for, and nothing beside it.

A column, a tensor or a note that no reader of the set looks at could hold records.
"""

from __future__ import annotations

import torch

from common.bundle import FORCED, ROWS, Bundle
from common.errors import DataError
from common.methods import get_method
from common.statistics import ReleasedStatistics

_METADATA = {"kind", "method", "context", "settings", "private", "encoder", FORCED, ROWS}


def check_generator_layout(bundle: Bundle) -> None:
    """Refuse a generator with metadata, or with tensors by name and shape, that its method does not publish.

    Raises:
        DataError: names what is too much, or of another shape or type.
    """
    from safetensors import safe_open

    with safe_open(bundle.generator_file, framework="pt") as content:
        notes = set(content.metadata() or {})
    if notes - _METADATA:
        raise DataError(f"the generator's metadata holds {', '.join(sorted(notes - _METADATA))}, which it never has")
    published = _published_shapes(bundle)
    for name, value in bundle.artifact.tensors.items():
        found = tuple(value.shape), value.dtype
        if found != (published.get(name), torch.float32):
            raise DataError(
                f"the generator holds the tensor {name:.80} of shape {found[0]} and {found[1]}; method "
                f"{bundle.config.method} publishes {published.get(name, 'none of that name')} of torch.float32"
            )


def _published_shapes(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """What the run's method publishes, with statistics and without: by publishing a generator that learned nothing."""
    context, method = bundle.context, get_method(bundle.config.method)
    untrained = type(context)(context.config.replace(meta_steps=0), context.problem, context.plan)
    classes, dim = context.problem.num_classes, context.problem.dim
    means, noise = torch.zeros(classes, dim), {"class_counts": 1.0, "class_sums": 1.0}
    made_up = ReleasedStatistics(
        1.0, torch.zeros(dim), torch.ones(classes), means, torch.eye(dim), None, noise, class_offsets=means
    )
    state = method.init(untrained)
    states = [state] if method.statistics(untrained) is None else [state, method.prepare(untrained, state, made_up)]
    published = [method.finish(untrained, one).tensors for one in states]
    return {name: tuple(value.shape) for tensors in published for name, value in tensors.items()}

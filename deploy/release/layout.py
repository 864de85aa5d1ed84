"""Whether the files of a bundle hold what they are for, and nothing beside it.

A column, a tensor or a note that no reader of the set looks at could hold records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from common.errors import DataError
from common.methods import get_method
from common.privacy.combined import ReleasedStatistics
from common.publishing.bundle import Bundle
from common.publishing.generator_file import generator_metadata
from common.tensor_file import read_tensors


def check_generator_layout(bundle: Bundle, forced: Sequence[str]) -> None:
    """Refuse a generator with metadata, or with tensors by name and shape, that its method does not publish.

    Args:
        bundle: with the generator.
        forced: why the bundle was released against its gate.

    Raises:
        DataError: names what is too much, or of another shape or type.
    """
    notes, _ = read_tensors(bundle.generator_file)
    due = generator_metadata(bundle.context, bundle.artifact, bundle.encoder, forced)
    # another version may know other settings; those of the file were read one by one, in any case
    due["context"] = json.dumps(json.loads(notes["context"]), sort_keys=True)
    odd = sorted(name for name in {*notes, *due} if notes.get(name) != due.get(name))
    if odd:
        raise DataError(f"the generator's metadata is not as `fedhypevae release` writes it: {', '.join(odd)}")
    published, settings = _published(bundle)
    if bundle.artifact.settings != settings:
        raise DataError("the generator's settings are not those that its method publishes")
    for name, value in bundle.artifact.tensors.items():
        found = tuple(value.shape), value.dtype
        if found != (published.get(name), torch.float32):
            raise DataError(
                f"the generator holds the tensor {name:.80} of shape {found[0]} and {found[1]}; method "
                f"{bundle.config.method} publishes {published.get(name, 'none of that name')} of torch.float32"
            )


def _published(bundle: Bundle) -> tuple[dict[str, tuple[int, ...]], Mapping[str, Any]]:
    """What the run's method publishes, with statistics and without: by publishing a generator that learned nothing."""
    context, method = bundle.context, get_method(bundle.config.method)
    untrained = type(context)(context.config.replace(meta_steps=0), context.problem, context.plan)
    classes, dim = context.problem.num_classes, context.problem.dim
    means, noise = torch.zeros(classes, dim), {"class_counts": 1.0, "class_sums": 1.0}
    made_up = ReleasedStatistics(
        1.0, torch.zeros(dim), torch.ones(classes), means, torch.eye(dim), None, noise, class_offsets=means
    )
    if context.problem.findings:
        known, pairs = torch.ones(classes), torch.zeros(classes, classes)
        noise = {**noise, "pair_counts": 1.0}
        made_up = replace(made_up, noise_std=noise, known_counts=known, pair_counts=pairs)
    state = method.init(untrained)
    states = [state] if method.statistics(untrained) is None else [state, method.prepare(untrained, state, made_up)]
    published = [method.finish(untrained, one) for one in states]
    shapes = {name: tuple(value.shape) for one in published for name, value in one.tensors.items()}
    return shapes, published[0].settings

"""Whether a loaded network is a function: all weights are there, and a picture's row depends on the picture alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError

_SHOWN = 3
_SIDES = ((64, 64), (64, 128), (128, 64))
_LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.99, "float16": 0.999}


def prepared_trial(name: str, prepare: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> NDArray[np.float32]:
    """Pictures of noise, square and not, as the processor prepares them: (3, 3, h, w).

    Raises:
        ConfigError: the processor fails, or gives pictures of different sizes, which no batch can hold.
    """
    rng = np.random.default_rng(0)
    try:
        made = [prepare(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)) for sides in _SIDES]
    except Exception as error:  # a processor of another library may raise anything
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"encoder {name}: its processor can't prepare a picture ({type(error).__name__}: {reason})"
        ) from None
    if len({one.shape for one in made}) > 1:
        raise ConfigError(
            f"encoder {name}: its processor gives pictures of different sizes, {made[0].shape} and {made[1].shape}: "
            "set crop_size (and do_center_crop) in its preprocessor_config.json"
        )
    return np.stack(made)


def unused_weights(
    name: str, missing: Iterable[str], state: Mapping[str, Any], features: Callable[[], NDArray[np.float32]]
) -> set[int]:
    """Weights that the checkpoint lacks and the features do not depend on: each is changed, and the features stay.

    Args:
        name: of the encoder, for messages.
        missing: names of weights that the checkpoint lacks, or has in another shape; the library drew them at random.
        state: the network's tensors by name.
        features: of a fixed picture.

    Returns:
        The addresses of these tensors, such as those of a pooler that nobody asks.

    Raises:
        ConfigError: the features depend on a missing weight; names the first three.
    """
    import torch

    unused, needed = set(), []
    before = features()
    for key in sorted(missing):
        tensor = state.get(key)
        if tensor is None or not tensor.is_floating_point():
            continue
        kept = tensor.clone()
        with torch.no_grad():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor))
        same = np.array_equal(before, features())
        with torch.no_grad():
            tensor.copy_(kept)
        if same:
            unused.add(tensor.data_ptr())
        else:
            needed.append(key)
        if len(needed) == _SHOWN:
            break
    if needed:
        raise ConfigError(
            f"encoder {name}: its checkpoint lacks weights that the embeddings need, or has them in another shape "
            f"({', '.join(needed)}{', ...' if len(needed) == _SHOWN else ''}): they would be random. Are its keys "
            "named as the model's?"
        )
    return unused


def check_rows(
    name: str, precision: str, forward: Callable[[NDArray[Any]], NDArray[np.float32]], trial: NDArray[np.float32]
) -> None:
    """Refuse (ConfigError) an encoder whose row of a picture differs from call to call, or with its neighbours."""
    alone = np.concatenate([forward(trial[row : row + 1]) for row in range(len(trial))]).astype(np.float64)
    for again in (forward(trial), forward(trial[::-1])[::-1], forward(trial)):
        norms = np.linalg.norm(alone, axis=1) * np.linalg.norm(again.astype(np.float64), axis=1)
        same = (alone == again).all(axis=1)
        cosine = np.where(norms > 0, (alone * again).sum(axis=1) / np.where(norms > 0, norms, 1.0), same)
        if not (cosine >= _LEAST_COSINE[precision]).all():
            raise ConfigError(
                f"encoder {name}: the same picture gives another row each time, or beside other pictures (cosine "
                f"{cosine.min():.5f}): it masks or mixes pictures at random, and can't be used"
            )


def prefix_tokens(
    named: int, hidden: tuple[int, ...], sides: tuple[int, int], patch: Any, *, pooled_first: bool
) -> int | None:
    """How many tokens stand before the patches.

    Args:
        named: class, distillation and register tokens by the names of the weights and settings.
        hidden: shape (b, tokens, d) of the last hidden state.
        sides: height and width of the network's input.
        patch: the configuration's patch size, where it is a number.
        pooled_first: the first token is the pooled output.

    Returns:
        The number; None where what is left is no grid of patches.
    """
    grid = (sides[0] // patch) * (sides[1] // patch) if isinstance(patch, int) and patch > 0 else -1
    for count in (named, 1) if pooled_first else (named,):
        patches = hidden[1] - count
        square = sides[0] == sides[1] and patches > 0 and math.isqrt(patches) ** 2 == patches
        if patches == grid or square:
            return count
    return None

"""What a backbone's features are made of: the parameters that they depend on, and the tokens that are patches."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from common.errors import ConfigError

_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
# What a checkpoint may hold beyond the model: masks of the training, and what a model makes by itself.
_MADE = frozenset(
    {"mask_token", "position_ids", "relative_position_index", "attn_mask", "inv_freq", "num_batches_tracked"}
)
_HEADS = frozenset({"head", "head_dist", "fc", "fc_norm", "classifier", "pooler"})
_STAGES = 8  # halvings of the grid of patches that are tried


def parameters_used(network: Any, features: Any) -> set[str]:
    """Find the parameters and buffers that features depend on, by the graph of their computation.

    Args:
        network: a torch module.
        features: its output, computed with gradients.

    Returns:
        Names as in `network.state_dict()`. A buffer belongs to the parameters of its module; one of a module
        without parameters counts as used.
    """
    found, seen, pending = set(), set(), [features.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            pending += [before for before, _ in node.next_functions]
    used = {name for name, value in network.named_parameters(remove_duplicate=False) if id(value) in found}
    owners = {_owner(name) for name, _ in network.named_parameters(remove_duplicate=False)}
    owners -= {_owner(name) for name in used}
    buffers = {name for name, _ in network.named_buffers() if _owner(name) not in owners}
    return used | (buffers & network.state_dict().keys())


def check_loaded(name: str, whole: Any, info: Mapping[str, Any], used: Collection[str], network: Any) -> bool:
    """Refuse a checkpoint that is not the model's on the way to the features; spoil the other weights that it lacks.

    Weights that no feature depends on become NaN where they would be random: if one had a part in a feature
    after all, no row would be finite, and none is accepted.

    Args:
        name: the encoder, for the message.
        whole: the model that was loaded.
        info: its `output_loading_info`.
        used: names in `network` that the features depend on.
        network: the part of the model that is run.

    Returns:
        Whether a weight of `network` was random at loading.

    Raises:
        ConfigError: a weight is missing, has another shape than the model's, or is of a part that the model lacks.
    """
    import torch

    there = network.state_dict(keep_vars=True)
    on_the_way = {id(there[key]) for key in used}
    # Whole numbers are counters and indices, which a model makes by itself.
    values = {key: value for key, value in whole.state_dict(keep_vars=True).items() if value.is_floating_point()}
    needed = {key for key, value in values.items() if id(value) in on_the_way}
    random = dict.fromkeys(info["missing_keys"], "missing")
    random |= {key: f"{tuple(found)} for {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]}
    wrong = [f"{key} ({random[key]})" for key in values if key in random and key in needed]
    wrong += [f"{key} (not of the model)" for key in sorted(_left_out(whole, info["unexpected_keys"], needed))]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"encoder {name}: expected a checkpoint of the very weights that the features depend on, found "
            f"{', '.join(wrong[:3])}{more}; give the config.json of this checkpoint (of timm: with the model_args that "
            "its page names), and take a wrapper's prefix off the keys"
        )
    spoiled = [values[key] for key in random.keys() & values.keys()]
    for value in spoiled:
        with torch.no_grad():
            value.fill_(torch.nan)
    return not {id(value) for value in spoiled}.isdisjoint(id(value) for value in there.values())


def _left_out(whole: Any, unexpected: Iterable[str], needed: Collection[str]) -> list[str]:
    """Weights of a checkpoint that a model of the same parts would have used: of a block, or beside used ones.

    Heads and decoders are modules of their own, which the model lacks or leaves empty.
    """
    prefix = f"{whole.base_model_prefix}."
    modules = {key.removeprefix(prefix): module for key, module in whole.named_modules()}
    known = {key.removeprefix(prefix) for key in needed}
    owners, stacks = {_owner(key) for key in known}, {_stack(key) for key in known} - {""}
    found = []
    for key in unexpected:
        name = key.removeprefix(prefix)
        owner, _, leaf = name.rpartition(".")
        # timm leaves an empty module where a model has no such part
        empty = owner in modules and not list(modules[owner].parameters()) and owner.rpartition(".")[2] not in _HEADS
        if leaf not in _MADE and (owner in owners or empty or _stack(name) in stacks):
            found.append(key)
    return found


def _stack(key: str) -> str:
    """The name of the list of blocks that a weight is in: `encoder.layer` of `encoder.layer.3.norm.bias`."""
    before = re.match(r"(.*?)\.\d+\.", key)
    return before[1] if before else ""


def tokens_before_patches(
    name: str,
    network: Any,
    used: Collection[str],
    hidden: tuple[int, ...],
    size: tuple[int, ...],
    pooling: str,
    pooled_first: bool,
) -> int:
    """Count the tokens before the patches: class, distillation, registers, or a pooled one.

    A timm model says it. Else it is the tokens less the patches, where the grid of patches follows from the
    input's size and the patch size, halved by each stage of a hierarchical model.

    Args:
        name: the encoder, for the message.
        network: a torch module of `transformers`.
        used: names of the parameters that its features depend on; a head's class token is none of theirs.
        hidden: shape of its last hidden state: (b, tokens, d), or (b, ., ., .) of a map without tokens.
        size: height and width of its input, in pixels.
        pooling: what is made of them; the class token alone needs no count.
        pooled_first: the first token is the model's own pooled output.

    Raises:
        ConfigError: tokens and patches contradict what the model has, or it has no class token to pool.
    """
    has_class = len(hidden) == 3 and any(key.endswith(_CLASS_TOKENS) for key in used)
    timm = getattr(network, "timm_model", None)
    if pooling == "cls" and has_class:
        return 1
    if len(hidden) == 4:
        found = 0
    elif timm is not None and hasattr(timm, "num_prefix_tokens"):
        found = int(timm.num_prefix_tokens)
    else:
        found = _tokens_less_patches(name, network, used, hidden[1], size, pooled_first)
        has_class |= found == 1  # pooled, such as that of DINOv3's ConvNeXt
    if pooling != "mean-patch" and not has_class:
        raise ConfigError(f"encoder {name}: it has no class token; expected --pooling mean-patch")
    return found


def _tokens_less_patches(
    name: str, network: Any, used: Collection[str], tokens: int, size: tuple[int, ...], pooled_first: bool
) -> int:
    named = sum(_token_counts(network, used)) + _registers(network)
    patch = getattr(network.config, "patch_size", None) or 1
    patches = (patch, patch) if isinstance(patch, int) else patch
    grids = set()
    for stage in range(_STAGES):  # a model leaves an edge out that is no whole patch, or fills it up
        sides = [(side, step << stage) for side, step in zip(size, patches, strict=True)]
        grids |= {math.prod(side // step for side, step in sides), math.prod(-(-side // step) for side, step in sides)}
    if tokens - named in grids:
        return named
    if named == 0 and pooled_first and tokens - 1 in grids:
        return 1
    raise ConfigError(
        f"encoder {name}: expected {named} tokens before those of the patches, by its weights; found {tokens} tokens "
        f"for an input of {size[0]}x{size[1]}, which does not come out; choose another encoder, or --pooling cls where "
        "there is a class token"
    )


def named_tokens(network: Any) -> int:
    """Count the kinds of tokens before the patches by the names of parameters, as descriptions without a count did."""
    return len(_token_counts(network, network.state_dict())) + _registers(network)


def state_digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 over names, shapes and bytes of parameters, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _token_counts(network: Any, keys: Iterable[str]) -> list[int]:
    """Tokens of each parameter that is named as a class or distillation token: (1, n, d), or (d,) for one."""
    marks = (*_CLASS_TOKENS, "distillation_token")
    state = network.state_dict()
    return [state[key].shape[1] if state[key].ndim == 3 else 1 for key in keys if key.endswith(marks)]


def _registers(network: Any) -> int:
    return int(getattr(network.config, "num_register_tokens", 0) or 0)

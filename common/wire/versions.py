"""Both directions of a round in few bits, the same under Flower and in the plain loop.

*Down.* The server holds two sets of parameters: its own, which its method steps, and the *held* ones, which the sites
hold and train at. Once a round the held ones move towards its own by a packed difference, and server and sites apply
the same bytes to the same numbers: they stay equal to the last bit, which a digest shows. What the rounding left over
is in the next difference again (error feedback), so it never adds up. A site whose version is not the one that the
difference starts from (its disk was lost, it missed a round, it is new) gets the whole of the held ones.

*Up.* A site's noised sums are packed as they are; parameters that a site has trained are packed as their difference
from what it received, which both ends know. See `common.wire.compression` for why neither costs any privacy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.methods.base import Method, RunContext, ServerState, Shapes, Tensors, seeded
from common.wire.allow_list import PACKED
from common.wire.compression import OFF, pack, packed_size, unpack


@dataclass(frozen=True)
class Held:
    """Parameters as the sites hold them.

    Attributes:
        round: the round (from 0) that is trained at them.
        tensors: by name.
        version: their digest.
        base: version that `change` starts from; "" without one.
        change: (bytes,) uint8, what turns that version into this; None where only the whole will do.
    """

    round: int
    tensors: Tensors
    version: str
    base: str = ""
    change: Tensor | None = None

    @property
    def parcel(self) -> Tensors:
        """What a site gets that holds `base`; the whole where there is no such version."""
        return self.tensors if self.change is None else {PACKED: self.change}


def held_key(method: Method, site_index: int) -> str:
    """Whose parameters a site holds: those of all sites, or its own where the method sends each site others."""
    return "all" if method.broadcast is None else f"site-{site_index}"


def next_held(context: RunContext, method: Method, state: ServerState, site_index: int, before: Held | None) -> Held:
    """What a site holds in the round that comes.

    Args:
        context: the run.
        method: what is trained.
        state: the server's own state.
        site_index: the site; all sites of one `held_key` get the same.
        before: what it held in the round before, or in this one already; None at first.

    Returns:
        The server's own parameters in the first round, later the nearest to them that a packed difference reaches:
        off by at most half a step of the difference.
    """
    if before is not None and before.round == state.round:
        return before
    wanted, bits = method.params_for(context, state, site_index), context.config.federation.wire_bits
    if before is None or bits == OFF or _shapes(wanted) != _shapes(before.tensors):
        tensors = dict(wanted)
        return Held(state.round, tensors, version_of(tensors))
    difference = {name: wanted[name].double() - before.tensors[name].double() for name in wanted}
    change = pack(difference, bits, leave_out_zeros=True)
    tensors = apply_change(before.tensors, change, bits)
    return Held(state.round, tensors, version_of(tensors), before.version, change)


def apply_change(before: Tensors, change: Tensor, bits: int) -> dict[str, Tensor]:
    """The next version from the last one: the same numbers at the server and at every site.

    Raises:
        WireError: the change is not one of these tensors.
    """
    steps = unpack(change, _shapes(before), bits, zeros_left_out=True)
    return {name: (value.double() + steps[name]).to(value.dtype) for name, value in before.items()}


def version_of(tensors: Tensors) -> str:
    """Digest of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{len(name)}:{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def upload_reference(method: Method, received: Tensors) -> Tensors:
    """What a method's uploads are told as differences from: nothing for sums, else the parameters received."""
    return {} if method.uploads_sums else received


def rounding(config: RunConfig, site_index: int, round_index: int) -> torch.Generator:
    """Public random numbers for rounding what a site sends; statistics are round -1, a baseline -2. They protect
    nothing, and no noise is drawn from them."""
    return seeded("rounding", config.federation.seed, site_index, round_index)


def to_wire(tensors: Tensors, bits: int, reference: Tensors, draws: torch.Generator) -> dict[str, Tensor]:
    """What a site sends for its noised tensors.

    Args:
        tensors: already noised, by name.
        bits: 32 sends them as they are.
        reference: name -> what to tell the difference from; both ends must have it.
        draws: public random numbers.

    Returns:
        Post-processing of `tensors`: one array of bytes called `PACKED`, or with 32 bits the tensors themselves.

    Raises:
        WireError: a value is not finite.
    """
    if bits == OFF or not tensors:
        return dict(tensors)
    told = {}
    for name, value in tensors.items():
        told[name] = value.double() - reference[name].double() if name in reference else value
    return {PACKED: pack(told, bits, draws)}


def from_wire(received: Tensors, shapes: Shapes, bits: int, reference: Tensors) -> dict[str, Tensor]:
    """The inverse of `to_wire`, but for the rounding.

    Raises:
        WireError: not what `to_wire` makes of tensors of these shapes.
    """
    if bits == OFF or not shapes:
        return dict(received)
    values = unpack(received[PACKED], shapes, bits)
    return {
        name: (value + reference[name].double() if name in reference else value).float()
        for name, value in values.items()
    }


def wire_shapes(shapes: Shapes, bits: int) -> Shapes:
    """Names and shapes of what `to_wire` makes of tensors of these shapes."""
    if bits == OFF or not shapes:
        return shapes
    return {PACKED: (packed_size(shapes, bits),)}


def shapes_bytes(shapes: Shapes) -> int:
    """Bytes of the values of `wire_shapes`."""
    return sum(math.prod(shape) * (1 if name == PACKED else 4) for name, shape in shapes.items())


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the values on the wire, without headers."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}

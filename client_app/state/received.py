"""The parameters that a site holds: its last version on its disk, and the next one made from what the server sent.

Parameters are public to the site and hold nothing of it. In few bits only what changed arrives, and is good for one
version alone; a site that does not hold that one says so before anything is charged, and gets the whole.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from client_app.place import Place
from client_app.state.private_state import PrivateState
from client_app.task import Work, fingerprint_of, request_of
from common.durable import write_atomically
from common.errors import ConfigError, FedHypeVAEError, StaleError, WireError
from common.methods import get_method
from common.methods.base import Tensors
from common.wire.allow_list import PACKED, settings_digest
from common.wire.compression import OFF
from common.wire.received import check_received
from common.wire.versions import apply_change, version_of

_FILE = "held.safetensors"


def with_held(place: Place, work: Work) -> Work:
    """The task with the parameters that its message stands for; no record is read, and nothing is charged.

    Raises:
        StaleError: it is a change of a version that this site does not hold.
        PolicyRefusal: the policy forbids the run: nothing of it is kept.
        DataError: the run is about other records.
        ConfigError: what the site would train at is not what the method sends, or beyond its public bounds.
    """
    place.policy.check(request_of(work.context), recompute_epsilon=False)
    fingerprint_of(place, work)  # a message about other records than this site's claims no run's name here
    private = PrivateState(place.folder / "state", work.run_id)
    with private.locked():
        private.claim(settings_digest(work.context))
        return replace(work, tensors=held_tensors(private, work))


def held_tensors(private: PrivateState, work: Work) -> Tensors:
    """As `with_held`, for a caller that has checked the policy and holds the run's lock."""
    in_few_bits, path = work.context.config.federation.wire_bits != OFF, private.folder / _FILE
    held = _read(path) if in_few_bits else None
    tensors = _next(held, work) if in_few_bits else work.tensors
    check_received(work.context, get_method(work.context.config.method), work.index, tensors)
    if in_few_bits and tensors is not held:
        try:
            write_atomically(path, save_tensors({name: value.contiguous() for name, value in tensors.items()}))
        except OSError as error:
            raise FedHypeVAEError(f"can't write {path} ({error}): free the disk; nothing is sent") from error
    return tensors


def _next(held: Tensors | None, work: Work) -> Tensors:
    """The version that a message names: the held one itself, the whole that was sent, or the held one changed."""
    if not {"version", "base"} <= set(work.words):
        raise ConfigError("parameters in few bits come with the words version and base; nothing was charged")
    version, base = str(work.words["version"]), str(work.words["base"])
    known = "" if held is None else version_of(held)
    if held is not None and known == version:
        return held
    if not base:
        if version_of(work.tensors) != version:
            raise ConfigError("the parameters are not of the version that the message names; nothing was charged")
        return work.tensors
    if held is None or known != base or PACKED not in work.tensors:
        raise StaleError("this site does not hold the version that the change starts from: it needs the whole")
    try:
        tensors = apply_change(held, work.tensors[PACKED], work.context.config.federation.wire_bits)
    except WireError as error:
        raise ConfigError(f"the change of the parameters can't be used: {error}") from None
    if version_of(tensors) != version:
        raise StaleError("the change did not make the server's version here: this site needs the whole")
    return tensors


def _read(path: Path) -> Tensors | None:
    """What lies there; None if there is nothing, or nothing that can be read: the server sends the whole then."""
    try:
        return load_tensors(path.read_bytes())
    except (OSError, SafetensorError):
        return None

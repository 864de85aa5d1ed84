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
from client_app.private_state import PrivateState
from client_app.task import Work, fingerprint_of, request_of
from common.compression import OFF
from common.durable import write_atomically
from common.errors import FedHypeVAEError, StaleError, WireError
from common.methods.base import Tensors
from common.transfer import apply_change, version_of
from common.wire import PACKED, settings_digest

_FILE = "held.safetensors"


def with_held(place: Place, work: Work) -> Work:
    """The task with the parameters that its message stands for; no record is read, and nothing is charged.

    Raises:
        StaleError: it is a change of a version that this site does not hold.
        PolicyRefusal: the policy forbids the run: nothing of it is kept.
        DataError: the run is about other records.
    """
    place.policy.check(request_of(work.context), recompute_epsilon=False)
    fingerprint_of(place, work)  # a message about other records than this site's claims no run's name here
    private = PrivateState(place.folder / "state", work.run_id)
    with private.locked():
        private.claim(settings_digest(work.context))
        return replace(work, tensors=held_tensors(private, work))


def held_tensors(private: PrivateState, work: Work) -> Tensors:
    """As `with_held`, for a caller that has checked the policy and holds the run's lock."""
    bits = work.context.config.federation.wire_bits
    if bits == OFF:
        return work.tensors
    version, base = str(work.words["version"]), str(work.words["base"])
    path = private.folder / _FILE
    held = _read(path)
    known = "" if held is None else version_of(held)
    if held is not None and known == version:
        return held
    if not base:
        tensors: Tensors = work.tensors
    elif held is None or known != base or PACKED not in work.tensors:
        raise StaleError("this site does not hold the version that the change starts from: it needs the whole")
    else:
        tensors = apply_change(held, work.tensors[PACKED], bits)
    if version_of(tensors) != version:
        if base:
            raise StaleError("the change did not make the server's version here: this site needs the whole")
        raise WireError("the parameters are not of the version that the message names")
    try:
        write_atomically(path, save_tensors({name: value.contiguous() for name, value in tensors.items()}))
    except OSError as error:
        raise FedHypeVAEError(f"can't write {path} ({error}): free the disk; nothing is sent") from error
    return tensors


def _read(path: Path) -> Tensors | None:
    """What lies there; None if there is nothing, or nothing that can be read: the server sends the whole then."""
    try:
        return load_tensors(path.read_bytes())
    except (OSError, SafetensorError):
        return None

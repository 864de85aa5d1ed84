"""What a site remembers of a run between two rounds: tensors and payloads that stay on the site's own disk.

A fresh process starts for every message and may be killed at any instant, or live on as an orphan beside its
successor. So: one lock per run, files that appear whole or not at all, the state of each round under that
round's own name, and the round before it kept. A state counts only when the round's payload was committed to
the ledger: the app reads the state of the last *committed* round, whatever else lies there.

The payload is kept as well: when a committed round is asked for again, those very bytes are sent, not new
ones. Safetensors, never pickle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.durable import NOTHING_SENT, lock_file, write_output
from common.errors import DataError, FedHypeVAEError, PolicyRefusal

LOCK_TIMEOUT_S = 30.0
KEPT_ROUNDS = 2
_STATE = "state-{:06d}.safetensors"
_PAYLOAD = "payload-{}-{}.bin"
_FORMAT = "1"
_SETTINGS = "settings.sha256"

Tensors = Mapping[str, ArrayLike]


class PrivateState:
    """The private files of one run, below `folder`/`run_id`: nothing in them may leave the site."""

    def __init__(self, folder: Path, run_id: str, *, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Take the site's private folder, the run, and how many seconds to wait for its lock."""
        self.run_id = run_id
        self.folder = folder / _file_name(run_id)
        self._timeout_s = timeout_s

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this run away; the system frees it when the process dies.

        Raises:
            FedHypeVAEError: another process holds it for longer than the time-out, or the disk refuses.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_file(self.folder / "lock", timeout_s=self._timeout_s))
            except OSError as error:
                raise FedHypeVAEError(f"private state of run {self.run_id} can't be locked: {error}") from error
            yield

    def claim(self, settings: str) -> None:
        """Hold the run's name to the settings that it first came with; the caller holds the lock.

        A name used again with other settings would get the first run's releases and go on from its private state,
        wherever both declare the same events.

        Args:
            settings: digest of the settings, `allow_list.settings_digest`.

        Raises:
            PolicyRefusal: the name is known with other settings; nothing was charged, nothing is sent.
        """
        path = self.folder / _SETTINGS
        try:
            known = path.read_text(encoding="ascii").strip() if path.exists() else ""
        except (OSError, ValueError) as error:
            raise FedHypeVAEError(f"can't read {path} ({error}): nothing is sent") from error
        if not known:
            write_output(path, f"{settings}\n".encode(), cure=NOTHING_SENT)
        elif known != settings:
            raise PolicyRefusal(
                "run_name",
                f"run {self.run_id} came with other settings before: a run with other settings needs another run-name; "
                "nothing was charged",
            )

    def save(self, round_index: int, tensors: Tensors) -> None:
        """Save the state that a round leaves behind; older rounds but one are removed.

        Args:
            round_index: the round, >= 0; 0 for the state before the first.
            tensors: arrays, or tensors on the CPU, of any shape and number type (the code, the encoder, ...).

        Raises:
            FedHypeVAEError: the disk refuses; the states of other rounds are unharmed.
        """
        from safetensors.numpy import save

        metadata = {"format": _FORMAT, "run_id": self.run_id, "round": str(round_index)}
        arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        write_output(self._state_path(round_index), save(arrays, metadata=metadata), cure=NOTHING_SENT)
        kept = [index for index in self.rounds() if index <= round_index][-KEPT_ROUNDS:]
        for index in self.rounds():
            if index < kept[0]:
                self._state_path(index).unlink(missing_ok=True)

    def load(self, round_index: int) -> dict[str, NDArray[np.generic]]:
        """The state that a round left behind.

        Args:
            round_index: the last committed round; 0 for the state before the first.

        Raises:
            DataError: there is none, or the file is damaged or another run's.
        """
        from safetensors import SafetensorError, safe_open

        path = self._state_path(round_index)
        try:
            with safe_open(path, framework="numpy") as stream:
                notes = dict(stream.metadata() or {})
                names = stream.keys()
                tensors = {name: stream.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"private state of run {self.run_id}, round {round_index}, can't be read ({error}); rounds "
                f"there: {self.rounds()}; the site can join again with a new run"
            ) from error
        found = tuple(notes.get(name, "") for name in ("format", "run_id", "round"))
        if found != (_FORMAT, self.run_id, str(round_index)):
            raise DataError(f"{path} belongs to another run, round or format: found {found}")
        return tensors

    def rounds(self) -> list[int]:
        """The rounds whose state is there, ascending."""
        names = (re.fullmatch(r"state-(\d{6,})\.safetensors", path.name) for path in self.folder.glob("state-*"))
        return sorted(int(name.group(1)) for name in names if name is not None)

    def keep_states(self, rounds: Collection[int]) -> None:
        """Remove the states of all rounds but these: those that a round left which was never committed.

        Left there, they would be taken for the newest by a site that goes on without that round, and would push the
        last committed state out of the two that are kept.

        Args:
            rounds: the committed rounds; the state before the first, round 0, is always kept.

        Raises:
            FedHypeVAEError: the disk refuses.
        """
        try:
            for index in self.rounds():
                if index > 0 and index not in rounds:
                    self._state_path(index).unlink(missing_ok=True)
        except OSError as error:
            raise FedHypeVAEError(f"can't tidy {self.folder} ({error}): nothing is sent") from error

    def save_payload(self, round_key: str, payload: bytes) -> str:
        """Keep a round's payload, before it is committed and sent.

        Args:
            round_key: the round, as the ledger names it.
            payload: the bytes that will leave.

        Returns:
            Their SHA-256, hexadecimal: what `Ledger.commit` takes.

        Raises:
            FedHypeVAEError: the disk refuses.
        """
        digest = hashlib.sha256(payload).hexdigest()
        write_output(self._payload_path(round_key, digest), payload, cure=NOTHING_SENT)
        return digest

    def load_payload(self, round_key: str, digest: str) -> bytes:
        """The payload of a committed round, to be sent again.

        Args:
            round_key: the round, as the ledger names it.
            digest: the digest that the ledger committed.

        Raises:
            DataError: it is not there, or not the one that was committed (then nothing may be sent).
        """
        try:
            payload = self._payload_path(round_key, digest).read_bytes()
        except OSError as error:
            raise DataError(f"payload of round {round_key} of run {self.run_id} can't be read ({error})") from error
        if hashlib.sha256(payload).hexdigest() != digest:
            raise DataError(
                f"payload of round {round_key} of run {self.run_id} is not the one that was committed: nothing is sent"
            )
        return payload

    def drop_payloads(self, but: str) -> None:
        """Remove the payloads of all rounds but one, once the server has gone on to that one."""
        for path in self.folder.glob(_PAYLOAD.format("*", "*")):
            if not path.name.startswith(_PAYLOAD.format(_file_name(but), "").removesuffix(".bin")):
                path.unlink(missing_ok=True)

    def _state_path(self, round_index: int) -> Path:
        if isinstance(round_index, bool) or round_index < 0:
            raise DataError(f"a round's index is at least 0, found {round_index}")
        return self.folder / _STATE.format(round_index)

    def _payload_path(self, round_key: str, digest: str) -> Path:
        # The digest in the name keeps an orphan's payload from replacing the committed one.
        return self.folder / _PAYLOAD.format(_file_name(round_key), digest)


def _file_name(text: str) -> str:
    """A name that is safe for a file: itself if harmless, or with a digest."""
    if not text:
        raise DataError("a run or round needs a name, found an empty one")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", text):
        return text
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", text)[:40].strip("-_")
    return f"{stem}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"

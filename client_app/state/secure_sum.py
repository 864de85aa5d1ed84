"""What a site remembers of one secure sum between its five messages: on its disk, its owner's to read, then erased.

A fresh process starts for every message. The file holds the secrets of one attempt; the next attempt replaces it, and
the answer that ends an attempt erases it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from client_app.state.private_state import PrivateState
from common.durable import NOTHING_SENT, erase, write_output
from common.errors import FedHypeVAEError, ProtocolError

Phase = Literal["keys", "shares", "checked", "masked"]
_FILE = "secagg.json"


@dataclass(frozen=True)
class Attempt:
    """One attempt at one secure sum, as far as this site has come.

    Attributes:
        binding: digest of the session that it belongs to.
        phase: the last message that was answered.
        secrets: the site's own, hexadecimal: box key, mask key, seed.
        own_card: the card that was shown, as text.
        cards: the list that was accepted, as text; empty before.
        shares: index -> both shares that this site holds of that site's secrets, as text.
        asked: digest of the task that came with the masked sum.
        round_key, reservation, attempt: of the ledger.
        payload_digest, payload_bytes: of the masked vector that was sent.
    """

    binding: str
    phase: Phase
    secrets: tuple[str, str, str]
    own_card: str
    cards: str = ""
    shares: str = ""
    asked: str = ""
    round_key: str = ""
    reservation: int = 0
    attempt: int = 0
    payload_digest: str = ""
    payload_bytes: int = 0


class AttemptFile:
    """The file of a run's present attempt; to be used under the run's lock."""

    def __init__(self, private: PrivateState) -> None:
        """Take the run's private folder."""
        self._path: Path = private.folder / _FILE

    def load(self, binding: str, phase: Phase) -> Attempt:
        """The attempt of this session, which must have come just so far.

        Raises:
            ProtocolError: there is none, it is of another session, or it has come less far or further: a message that
                comes out of turn or twice is not answered.
        """
        attempt = self._read()
        if attempt is None or attempt.binding != binding:
            raise ProtocolError("this site takes part in no such secure sum, or in another one by now")
        if attempt.phase != phase:
            raise ProtocolError(f"the message is out of turn: this site last answered {attempt.phase!r}")
        return attempt

    def is_new(self, binding: str) -> bool:
        """Whether no attempt of this session lies there."""
        attempt = self._read()
        return attempt is None or attempt.binding != binding

    def save(self, attempt: Attempt) -> None:
        """Replace what is there, on the disk when this returns."""
        write_output(self._path, json.dumps(asdict(attempt)).encode(), cure=NOTHING_SENT)

    def erase(self) -> None:
        """Remove the secrets."""
        try:
            erase(self._path)
        except OSError as error:
            raise FedHypeVAEError(f"can't erase {self._path} ({error}): nothing is sent") from error

    def _read(self) -> Attempt | None:
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            return Attempt(**{**values, "secrets": tuple(values["secrets"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FedHypeVAEError(f"{self._path} can't be read ({type(error).__name__}): remove it") from error

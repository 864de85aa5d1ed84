"""The receipts that sites gave with their releases, brought back with every further request, in later runs too.

A site holds what comes back against its ledger, and refuses if that one is older (`client_app.ledger.receipts`). The
server can't check them and need not: each goes to the node that sent it, and to no other. A deployed server keeps them
in one file for all its runs, by the node id that Flower gave the site's key: a name could be claimed by another site.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from common import durable
from common.errors import ConfigError, FedHypeVAEError

FILE = "receipts.json"  # in the server's work folder

_Known = dict[str, dict[str, str]]


class Receipts:
    """The last receipt of each node; in memory alone where `path` is None (simulations: their nodes are new each time).

    Raises:
        ConfigError: the file can't be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = {} if path is None else _read(path)

    def words(self, node: int) -> dict[str, str]:
        """What a request to a node brings back; nothing for a node that gave no receipt."""
        known = self._known.get(str(node), {})
        return {word: known[word] for word in ("receipt", "seal") if word in known}

    def note(self, given: Mapping[int, tuple[str, str, str]]) -> None:
        """Keep receipts, on the disk when this returns.

        Args:
            given: node -> (name of its site, receipt, seal).

        Raises:
            FedHypeVAEError: the disk refuses.
        """
        new = {
            str(node): {"site": site, "receipt": receipt, "seal": seal} for node, (site, receipt, seal) in given.items()
        }
        self._known |= new
        if self._path is not None and new:
            _change(self._path, lambda known: {**known, **new})


def move_receipt(path: Path, before: str, after: str | None) -> None:
    """Give a node's receipt to the node that its site is from now on; None: forget it.

    Raises:
        ConfigError: the file can't be read. FedHypeVAEError: the disk refuses.
    """

    def moved(known: _Known) -> _Known:
        kept = {node: receipt for node, receipt in known.items() if node != before}
        return kept if after is None or before not in known else {**kept, after: known[before]}

    if path.is_file():
        _change(path, moved)


def _change(path: Path, change: Callable[[_Known], _Known]) -> None:
    """Read, change, write, while no other run does."""
    try:
        with durable.lock_file(path.with_name(f"{FILE}.lock")):
            text = json.dumps(change(_read(path)), indent=2) + "\n"
            durable.write_atomically(path, text.encode(), mode=0o600)
    except OSError as error:
        raise FedHypeVAEError(f"can't write {path} ({error}): free the disk, then resume the run") from error


def _read(path: Path) -> _Known:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read ({type(error).__name__}): restore it, or move it away") from None
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise ConfigError(f"{path} must hold the receipts of nodes: restore it, or move it away")
    return found

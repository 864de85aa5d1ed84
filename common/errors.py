"""Errors of the project: what was expected, what was found, what to do.

Every error carries an `exit_code` (2 for wrong input, 1 for a failure) and a `code`: the one word that may leave a
site. The text of an error stays where it was raised, since it may quote data.
"""

from __future__ import annotations

from collections.abc import Mapping


class FedHypeVAEError(Exception):
    """A failure that a person can act on. Base of all others; exit code 1."""

    exit_code = 1
    code = "failure"


class ConfigError(FedHypeVAEError):
    """A setting is unknown, out of range, or contradicts another."""

    exit_code = 2
    code = "config"


class DataError(FedHypeVAEError):
    """The data at a site, or a file given to a command, can't be used as it is."""

    exit_code = 2
    code = "data"


class PolicyRefusal(FedHypeVAEError):
    """A site's own policy forbids what was asked for. `rule` names the line of the policy; nothing was charged."""

    exit_code = 2
    code = "policy"

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class BudgetExceeded(FedHypeVAEError):
    """The release would spend more privacy than is left at the site. Nothing was charged."""

    exit_code = 2
    code = "budget"


class LedgerError(FedHypeVAEError):
    """The privacy ledger can't be opened, locked, written or verified: nothing may be released."""

    code = "ledger"


class ReceiptError(LedgerError):
    """The server brought a receipt that the site never gave: one that was made up, or another site's."""

    code = "receipt"


class WireError(FedHypeVAEError):
    """A message holds something that is not on the allow-list of its kind."""

    code = "wire"


class MeetingError(FedHypeVAEError):
    """Sites can't begin a run together: too few, or they do not agree. Wrong input, and nothing was charged."""

    exit_code = 2
    code = "meeting"


class FederationError(FedHypeVAEError):
    """The federation can't go on: too few sites answered, or the server can't be reached."""

    code = "federation"


class ProtocolError(FedHypeVAEError):
    """Secure aggregation can't go on: a message is wrong, forged, out of turn, or too many sites are missing."""

    code = "protocol"


class BlameError(ProtocolError):
    """What certain sites sent can't be used. `blamed` says why, by index."""

    def __init__(self, blamed: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"site {index}: {why}" for index, why in sorted(blamed.items())))
        self.blamed = dict(blamed)

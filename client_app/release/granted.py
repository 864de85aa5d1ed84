"""What every release is made under: a run that the policy allows and the ledger has declared, and room on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from client_app.ledger.charge import Reservation
from client_app.ledger.ledger import Ledger
from client_app.ledger.receipts import message_ledger, receipt_words, set_mark
from client_app.ledger.runs import Round, events_to_json
from client_app.place import Place
from client_app.policy.request import RunRequest
from client_app.task import Work, fingerprint_of
from common.durable import hold_room
from common.errors import FedHypeVAEError
from common.privacy.events import PrivacyEvent
from common.wire.allow_list import encode_events, settings_digest

# What ledger, witness and the site's log grow by in a message, generously: some kilobytes, in whole pages.
_ENTRIES = 2**20


@dataclass(frozen=True)
class Grant:
    """A run that this site takes part in, with its open ledger."""

    place: Place
    work: Work
    ledger: Ledger
    fingerprint: str

    @property
    def rounds(self) -> Mapping[str, Round]:
        """What the ledger holds of the run, by round."""
        return self.ledger.runs[self.work.run_id].rounds

    @property
    def committed(self) -> frozenset[str]:
        """Keys of the rounds whose release was committed."""
        return frozenset(key for key, known in self.rounds.items() if known.payload_digest is not None)

    def reserve(self, round_key: str, events: Sequence[PrivacyEvent]) -> Reservation:
        """Charge a round, before a record is read; see `Ledger.reserve`."""
        run, limits = self.work.run_id, self.place.policy.limits
        return self.ledger.reserve(run, round_key, events, limits=limits, fingerprint=self.fingerprint)

    def words(self) -> dict[str, str]:
        """What a reply says of the ledger: what this run was charged, and a receipt."""
        charged = encode_events(events_to_json(self.ledger.runs[self.work.run_id].charged))
        return {"charged": charged, **receipt_words(self.place, self.ledger)}


@contextmanager
def granted(place: Place, work: Work, request: RunRequest) -> Iterator[Grant]:
    """The site's ledger with the run declared; no record is read, and nothing is charged yet.

    Args:
        place: the site.
        work: the message's task.
        request: what its run asks of the site; the cheap rules of the policy have allowed it.

    Raises:
        PolicyRefusal: the policy does not allow the run's events. Their ε is computed only where the ledger has not
            granted the same ones before.
        BudgetExceeded, LedgerError, DataError: as the ledger says, or the site's file is another than the run is about.
    """
    limits, fingerprint = place.policy.limits, set_mark(place, fingerprint_of(place, work))
    with message_ledger(place, work) as ledger:
        known = ledger.runs.get(work.run_id)
        if known is None or known.limits != limits or tuple(known.declared) != tuple(request.events):
            place.policy.check(request)
        ledger.declare_run(
            work.run_id,
            request.events,
            limits,
            fingerprint=fingerprint,
            settings=settings_digest(work.context),
            close_idle_after=place.policy.close_idle_runs_after,
        )
        yield Grant(place, work, ledger, fingerprint)


def committed_rounds(round_keys: Iterable[str]) -> frozenset[int]:
    """Numbers, from 1, of the rounds among these keys; the state a round leaves bears its number."""
    return frozenset(int(key.split("-")[1]) for key in round_keys if key.startswith("round-"))


@contextmanager
def room_for(place: Place, num_bytes: int) -> Iterator[None]:
    """Hold room on the disks for what a release will write: a full disk refuses before it is charged, and not after.

    The room is free again when the block ends, for what is then written.

    Args:
        place: the site.
        num_bytes: of payload and private state, a public number.

    Raises:
        FedHypeVAEError: a disk is full; nothing was charged.
    """
    ledger, witness = place.policy.ledger_path(place.folder), place.policy.witness_path(place.folder)
    sizes = {path.parent: _ENTRIES for path in (ledger, witness) if path is not None}
    sizes[place.folder] = num_bytes + _ENTRIES
    with ExitStack() as stack:
        try:
            for folder, size in sizes.items():
                stack.enter_context(hold_room(folder, size))
        except OSError as error:
            raise FedHypeVAEError(f"no room in {folder} ({error}): free the disk; nothing was charged") from error
        yield

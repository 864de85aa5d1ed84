"""What every release is made under: a run that the policy allows and the ledger has declared, and room on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from client_app.ledger.charge import Reservation
from client_app.ledger.ledger import Ledger
from client_app.ledger.receipts import message_ledger, receipt_words, set_mark
from client_app.ledger.runs import Round, events_to_json
from client_app.place import Place
from client_app.policy.request import RunRequest
from client_app.release.log import LOG_FILE, ReleaseLog
from client_app.state.private_state import PrivateState
from client_app.task import Work, charged_under, fingerprint_of, request_of
from common.durable import hold_room
from common.errors import FedHypeVAEError
from common.privacy.events import PrivacyEvent
from common.wire.allow_list import encode_events, settings_digest

# What ledger, witness and the site's log grow by in a message, generously: some kilobytes, in whole pages.
_ENTRIES = 2**20


@dataclass(frozen=True)
class Admission:
    """A message's task that the site's policy lets pass, about the data that the site has; nothing is opened yet.

    Attributes:
        place: the site.
        work: the task.
        request: what its run asks of the site.
        fingerprint: of the data set, as its file states it.
    """

    place: Place
    work: Work
    request: RunRequest
    fingerprint: str


def admit(place: Place, work: Work) -> Admission:
    """Hold a task against the policy's cheap rules, and its run against the site's file; no record is read.

    Raises:
        PolicyRefusal: a rule forbids the run. DataError: it is about other data. Nothing was charged, and the message
            claimed no run's name here.
    """
    request = request_of(work.context, least_colluders=place.policy.least_colluders)
    place.policy.check(request, recompute_epsilon=False)  # the cheap rules, before anything is opened
    return Admission(place, work, request, fingerprint_of(place, work))


@contextmanager
def locked_run(admission: Admission) -> Iterator[PrivateState]:
    """The run's private files under its lock, its name held to the settings that it first came with."""
    private = PrivateState(admission.place.folder / "state", admission.work.run_id)
    with private.locked():
        private.claim(settings_digest(admission.work.context))
        yield private


@dataclass(frozen=True)
class Grant:
    """A run that this site takes part in, with its open ledger; `fingerprint` is the data's, under the site's key."""

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

    def reserve(self, round_key: str, events: tuple[PrivacyEvent, ...]) -> Reservation:
        """Charge a round, before a record is read; see `Ledger.reserve`."""
        run, limits = self.work.run_id, self.place.policy.limits
        charged = self._charged(events)
        return self.ledger.reserve(run, round_key, charged, limits=limits, fingerprint=self.fingerprint)

    def log(self, round_key: str, events: tuple[PrivacyEvent, ...], digest: str, size: int) -> None:
        """Note a committed release in the site's own log, before it is sent; see `ReleaseLog.append`."""
        charged = events_to_json(self._charged(events))
        log_of(self.place).append(self.work.run_id, round_key, charged, digest, size)

    def words(self) -> dict[str, str]:
        """What a reply says of the ledger: what this run was charged, and a receipt."""
        charged = encode_events(events_to_json(self.ledger.runs[self.work.run_id].charged))
        return {"charged": charged, **receipt_words(self.place, self.ledger)}

    def _charged(self, events: tuple[PrivacyEvent, ...]) -> tuple[PrivacyEvent, ...]:
        return charged_under(self.work.context, events, self.place.policy.least_colluders)


def check_consent(admission: Admission) -> None:
    """Refuse a run as `granted` would, on a trial: the ledger is as before afterwards.

    Raises:
        As `granted`.
    """
    if admission.request.protected:
        with _declared(admission, trial=True):
            pass


@contextmanager
def granted(admission: Admission) -> Iterator[Grant]:
    """The site's ledger with the run declared, for a caller that holds the run's lock; nothing is charged yet.

    Raises:
        PolicyRefusal: the policy does not allow the run's events. Their ε is computed only where the ledger has not
            granted the same ones before.
        BudgetExceeded, LedgerError: as the ledger says.
    """
    with _declared(admission, trial=False) as (ledger, fingerprint):
        yield Grant(admission.place, admission.work, ledger, fingerprint)


@contextmanager
def _declared(admission: Admission, *, trial: bool) -> Iterator[tuple[Ledger, str]]:
    """The site's ledger with the run declared, on a trial or for good, and the data's fingerprint under its key."""
    place, work, request = admission.place, admission.work, admission.request
    limits, fingerprint = place.policy.limits, set_mark(place, admission.fingerprint)
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
            trial=trial,
        )
        yield ledger, fingerprint


def log_of(place: Place) -> ReleaseLog:
    """The site's own log of what left."""
    return ReleaseLog(place.folder / LOG_FILE)


def committed_rounds(round_keys: Iterable[str]) -> frozenset[int]:
    """Numbers, from 1, of the rounds among these keys; the state a round leaves has its number."""
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

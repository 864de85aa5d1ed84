"""An exception at any line that reads records changes nothing that leaves but the sum, which is noise alone then.

The lines between the charge and the answer are listed by running the real handlers once, and then each one raises.
Where the last resort is taken out, the reply becomes an error, and these tests fail.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from flwr.app import Message

from client_app.release import last_resort
from client_app.release.last_resort import LOGGED
from common.errors import DataError
from tests.harness import Federation, Handler, HarnessSite, deliver, words_of
from tests.secagg_cases import ROUNDS_ONLY, keyed_federation

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / name}/" for name in ("common", "client_app", "embeddings"))
SECRET = "patient 4711, label 2, row 17"
Line = tuple[str, int]


class PlantedError(BaseException):
    """As libraries in Rust raise them: no Exception, and nothing on the way takes it for something that it knows."""


@dataclass(frozen=True)
class Moment:
    """A site's folder as it was when a message came, and that message."""

    site: HarnessSite
    message: Message

    def deliver(self, folder: Path) -> tuple[HarnessSite, Message]:
        """The message to a fresh copy of the site."""
        shutil.copytree(self.site.folder, folder)
        site = replace(self.site, folder=folder)
        return site, deliver(site, self.message)


@dataclass
class Watch:
    """Follows the lines of this project's code that run while a step reads records, and raises at one of them."""

    target: Line | None = None
    error: BaseException = field(default_factory=lambda: PlantedError(SECRET))
    lines: dict[Line, None] = field(default_factory=dict)
    raised: bool = False

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            before = sys.gettrace()
            sys.settrace(self._enter)
            try:
                return real(*arguments)
            finally:
                sys.settrace(before)

        return watched

    def _enter(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        code = frame.f_code  # the last resort's own lines read nothing
        is_ours = code.co_filename.startswith(OURS) and code is not last_resort.from_records.__code__
        return self._step if is_ours and not self.raised else None

    def _step(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if event == "line" and not self.raised:
            line = (str(Path(frame.f_code.co_filename).relative_to(ROOT)), frame.f_lineno)
            self.lines[line] = None
            if line == self.target:
                self.raised = True
                raise self.error
        return self._step


def watched(moment: Moment, folder: Path, watch: Watch, patch: pytest.MonkeyPatch) -> tuple[HarnessSite, Message]:
    with patch.context() as inner:
        for module in ("release.release", "answers.secure_sum"):
            inner.setattr(f"client_app.{module}.from_records", watch.around(last_resort.from_records))
        return moment.deliver(folder)


def moment_of(federation: Federation, kind: str, folder: Path, what: str = "", **settings: Any) -> Moment:
    """A site when the first message of a kind is about to come to it."""
    seen: list[Message] = []

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message:
        wanted = message.metadata.message_type == kind and site.name == "site-1"
        if wanted and not seen and what in ("", message.content.config_records["words"].get("what", "")):
            seen.append(message)
            shutil.copytree(site.folder, folder)
        return handler()

    federation.run(tamper=tamper, **settings)
    return Moment(HarnessSite("site-1", 101, folder), seen[0])


MOMENTS: dict[str, Callable[[Path], Moment]] = {
    "statistics": lambda home: moment_of(
        Federation.create(home / "run", 1), "query.statistics", home / "site", num_rounds=1
    ),
    "train": lambda home: moment_of(Federation.create(home / "run", 1), "train", home / "site", num_rounds=1),
    "train of patients": lambda home: moment_of(
        Federation.create(home / "run", 1, unit="patient", max_records_per_patient=2, patients=True),
        "train",
        home / "site",
        num_rounds=1,
        unit="patient",
        max_records_per_patient=2,
    ),
    "masked statistics": lambda home: moment_of(
        keyed_federation(home / "run"), "query.secagg_masked", home / "site", trust="secagg", num_rounds=1
    ),
    "masked sums": lambda home: moment_of(
        keyed_federation(home / "run"), "query.secagg_masked", home / "site", trust="secagg", **ROUNDS_ONLY
    ),
}


@pytest.fixture(scope="module", params=MOMENTS)
def moment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Moment:
    return MOMENTS[request.param](tmp_path_factory.mktemp("moment"))


def shape_of(reply: Message) -> object:
    """What of a reply may not depend on records: everything but the values and the ledger's digests."""
    words = words_of(reply)
    tensors = [
        (name, array.dtype, array.shape, len(array.data))
        for record in reply.content.array_records.values()
        for name, array in record.items()
    ]
    lengths = {name: len(str(value)) for name, value in words.items()}
    lengths.pop("signature", None)  # ECDSA's varies with its own random numbers
    return sorted(reply.content), lengths, words.get("charged"), sorted(tensors)


def charged(site: HarnessSite) -> list[int]:
    return [event.count for run in site.runs().values() for event in run.charged]


def chosen(lines: list[Line]) -> list[Line]:
    """Some 40 lines, in every file: all of them where SWEEP=all is in the environment."""
    if os.environ.get("SWEEP") == "all":
        return lines
    first = {path: (path, number) for path, number in reversed(lines)}
    step = max(len(lines) // 30, 1)
    return list(dict.fromkeys([*first.values(), *lines[::step]]))


def test_exception_at_any_line_that_reads_records_shows_nowhere(
    moment: Moment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    honest_site, honest = watched(moment, tmp_path / "honest", watch, monkeypatch)
    assert "error" not in words_of(honest)
    assert LOGGED not in honest_site.log()
    files = {path for path, _ in watch.lines}
    assert {"client_app/records.py", "embeddings/store/file.py", "common/privacy/sampling.py"} <= files
    lines, reached = chosen(list(watch.lines)), 0
    for number, line in enumerate(lines):
        watch = Watch(target=line)
        site, reply = watched(moment, tmp_path / str(number), watch, monkeypatch)
        reached += watch.raised  # a few lines run for some samples of the units alone
        assert (LOGGED in site.log()) == watch.raised, line
        assert (SECRET in site.log()) == watch.raised, line
        assert shape_of(reply) == shape_of(honest), line
        assert charged(site) == charged(honest_site), line
        assert SECRET not in str(reply.content), line
        assert kept(site) == kept(honest_site), line
        shutil.rmtree(site.folder)
    assert reached > 0.9 * len(lines)


def kept(site: HarnessSite) -> list[tuple[str, int]]:
    """The private state that a site keeps: which rounds', and how large."""
    return sorted((path.name, path.stat().st_size) for path in (site.folder / "state").glob("*/state-*"))


@pytest.mark.parametrize("error", [MemoryError(SECRET), RecursionError(SECRET), DataError(SECRET), OSError(SECRET)])
def test_faults_of_all_kinds_are_answered_with_noise(
    moment: Moment, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    _, honest = moment.deliver(tmp_path / "honest")
    monkeypatch.setattr("client_app.release.last_resort.training_data", fail)
    site, reply = moment.deliver(tmp_path / "site")
    assert shape_of(reply) == shape_of(honest)
    assert SECRET in site.log()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_process_that_ends_leaves_a_charged_round_and_sends_nothing(
    moment: Moment, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object) -> None:
        raise error

    before = sum(charged(moment.site))
    monkeypatch.setattr("client_app.release.last_resort.training_data", end)
    with pytest.raises(type(error)):
        moment.deliver(tmp_path / "site")
    site = replace(moment.site, folder=tmp_path / "site")
    assert sum(charged(site)) == before + 1
    assert len(site.releases()) == len(moment.site.releases())


def test_full_disk_refuses_before_the_charge(moment: Moment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def opened(*_: object) -> None:
        raise RuntimeError("a record was read")

    before = charged(moment.site)
    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("client_app.release.last_resort.training_data", opened)
    site, reply = moment.deliver(tmp_path / "site")
    assert words_of(reply)["error"] == "failure"
    assert charged(site) == before
    assert "free the disk" in site.log()


def test_room_is_taken_for_all_that_a_release_writes(
    moment: Moment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written after the records were read has its place on the disk before."""
    sizes: list[int] = []
    real = os.posix_fallocate

    def fallocate(descriptor: int, start: int, size: int) -> None:
        sizes.append(size)
        real(descriptor, start, size)

    monkeypatch.setattr("os.posix_fallocate", fallocate)
    before = size_of(moment.site.folder)
    site, reply = moment.deliver(tmp_path / "site")
    assert "error" not in words_of(reply)
    assert size_of(site.folder) - before < sum(sizes)
    assert not list(site.folder.rglob("*.partial"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

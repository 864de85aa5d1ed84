"""Pictures read in processes: the same answers as in this one; a crash costs one file; nothing outlives its program."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from embeddings import decoding as decoding_module
from embeddings import extract as extract_module
from embeddings.decoding import Answer, Decoders, Load, Prepare
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.load import load_encoder
from embeddings.extract import extract
from embeddings.limits import LARGE_PIXELS, decoding
from embeddings.pipeline import Item, Listing, embed_batches
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.images import Shallow, read_image
from embeddings.store.file import read_store
from tests.embeddings.test_corrupted import seeds

_IMPATIENT = """
import sys
sys.path[:] = sys.argv[1:]
from embeddings import decoding
decoding._SECONDS = 0.2
decoding.serve()
"""
CRASHED = "reading it ended the process that did"


def same(image: np.ndarray) -> np.ndarray:
    """A preparation that leaves the pixels as they are."""
    return np.asarray(image)


def process_number() -> np.ndarray:
    return np.full((2, 2), os.getpid(), np.int64)


def core_limit() -> np.ndarray:
    return np.array(resource.getrlimit(resource.RLIMIT_CORE))


def exit_process() -> np.ndarray:
    os._exit(0)


def never() -> np.ndarray:
    while True:
        pass


def no_memory_here(*_: object) -> np.ndarray:
    raise MemoryError


def large_row(value: int) -> np.ndarray:
    return np.full((3, 500, 500), value, np.float32).transpose(1, 2, 0)


class Unreadable:
    """What a process can't take, as one that doesn't get the memory for it can't."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return image

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


def end_process(how: int) -> np.ndarray:
    os.kill(os.getpid(), how)
    raise AssertionError("still here")


def grey(value: int) -> np.ndarray:
    return np.full((8, 8), value, np.uint8)


def faulty() -> np.ndarray:
    raise ZeroDivisionError("a fault of the program")


def alone(mark: Path) -> np.ndarray:
    """Refuse to be one of two large pictures that are decoded at a time."""
    with decoding(LARGE_PIXELS + 1):
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            raise DataError("two at a time") from None
        sum(range(100_000))
        mark.unlink()
    return grey(1)


def end_while_large() -> np.ndarray:
    with decoding(LARGE_PIXELS + 1):
        return end_process(signal.SIGKILL)


def _content(answer: Answer) -> tuple[bytes, str, bool]:
    return b"" if answer.row is None else answer.row.tobytes(), answer.reason, answer.shallow


def test_answers_of_processes_are_those_of_this_one(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for number, content in enumerate(seeds(tmp_path)):
        (folder / f"good{number}").write_bytes(content)
        (folder / f"cut{number}").write_bytes(content[: len(content) // 2])
    Image.fromarray(np.full((20, 30), 4000, np.uint16)).save(folder / "shallow.png")
    (folder / "x.png").write_bytes(b"no picture")
    loads: list[Load] = [item.load for item in list_folder(tmp_path, None, FolderOptions(patients=False)).items]
    loads.append(partial(read_image, folder / "gone.png", "gone.png"))
    with Decoders(same, 1) as here, Decoders(same, 2) as there, ThreadPoolExecutor(2) as pool:
        expected = here.read(loads)
        for answers in pool.map(there.read, [loads] * 4):
            assert list(map(_content, answers)) == list(map(_content, expected))
    assert sum(answer.shallow for answer in expected) == 1
    assert 5 <= sum(answer.row is None for answer in expected) < len(expected) - 5
    assert not any(isinstance(answer.row, Shallow) for answer in expected)


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_crash_costs_the_file_that_it_happens_over(how: int) -> None:
    """SIGKILL is what a system without memory sends."""
    loads: list[Load] = [partial(grey, number) for number in range(12)]
    for place in (0, 5, 6, 11):
        loads[place] = partial(end_process, how)
    with Decoders(same, 2) as decoders, ThreadPoolExecutor(2) as pool:
        for answers in pool.map(decoders.read, [loads, loads]):
            found = [None if one.row is None else int(one.row[0, 0]) for one in answers]
            assert found == [None if place in (0, 5, 6, 11) else place for place in range(12)]
            assert all(CRASHED in one.reason for one in answers if one.row is None)


def test_ways_a_decoder_ends_cost_one_file_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exit that a library makes; a hang, which is ended by its processor time."""
    monkeypatch.setattr(decoding_module, "_PROGRAM", _IMPATIENT)
    loads: list[Load] = [partial(grey, 1), exit_process, partial(grey, 2), never, partial(grey, 3)]
    with Decoders(same, 2) as decoders:
        answers = decoders.read(loads)
    assert [one.row is not None and int(one.row[0, 0]) for one in answers] == [1, False, 2, False, 3]
    assert all(CRASHED in one.reason for one in answers if one.row is None)


def test_rows_larger_than_what_a_link_holds_come_whole() -> None:
    loads: list[Load] = [partial(large_row, number) for number in range(6)] + [partial(np.zeros, (0, 3))]
    with Decoders(same, 2) as decoders:
        *rows, empty = (answer.row for answer in decoders.read(loads))
    for number, row in enumerate(rows):
        assert row is not None
        assert (row.shape, row.dtype, row.flags.writeable) == ((500, 500, 3), np.float32, True)
        assert (row == number).all()
    assert empty is not None
    assert empty.shape == (0, 3)


def test_answers_that_were_not_taken_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """This program may have no memory for a row; what the process still says belongs to no other picture."""
    with Decoders(same, 2) as decoders:
        with monkeypatch.context() as patched:
            patched.setattr(np, "empty", no_memory_here)
            for _ in range(2):
                with pytest.raises(MemoryError):
                    decoders.read([partial(grey, 1)] * 3)
        for _ in range(2):
            answers = decoders.read([partial(grey, 7)] * 3)
            assert [one.row is not None and int(one.row[0, 0]) for one in answers] == [7] * 3


def test_names_of_any_bytes_travel(tmp_path: Path) -> None:
    names = [os.fsdecode(name) for name in (b"a\nb.png", b"\xff\xfe.png", b"=1+1\r.png")]
    for name in names:
        Image.fromarray(grey(9)).save(tmp_path / name, "png")
    good: list[Load] = [partial(read_image, tmp_path / name, name) for name in names]
    bad: list[Load] = [partial(read_image, tmp_path / f"{name}.gone", name) for name in names]
    with Decoders(same, 1) as here, Decoders(same, 2) as there:
        assert list(map(_content, there.read(good + bad))) == list(map(_content, here.read(good + bad)))
        assert all(answer.row is not None for answer in there.read(good))


@pytest.mark.parametrize("prepare", [Unreadable(), lambda image: image])
def test_processes_that_do_not_start_leave_nothing_behind(prepare: Prepare) -> None:
    decoders = Decoders(prepare, 2)
    with pytest.raises(Exception, match=r"the process that starts the decoders has ended|pickle|local"), decoders:
        decoders.read([process_number])
    assert decoders._parent.returncode is not None


def test_crash_leaves_no_picture_on_the_disk() -> None:
    with Decoders(same, 2) as decoders:
        (answer,) = decoders.read([core_limit])
    assert answer.row is not None
    assert not answer.row.any()


def test_process_that_was_ended_while_idle_costs_no_file() -> None:
    with Decoders(same, 2) as decoders:
        for _ in range(4):
            (answer,) = decoders.read([process_number])
            assert answer.row is not None
            assert answer.row[0, 0] != os.getpid()
            os.kill(int(answer.row[0, 0]), signal.SIGKILL)
        assert all(answer.row is not None for answer in decoders.read([process_number] * 8))


def test_fault_of_the_program_is_no_bad_image() -> None:
    with Decoders(same, 2) as decoders:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault of the program"):
                decoders.read([partial(grey, 1), faulty, partial(grey, 2)])
        assert [one.row is not None and int(one.row[0, 0]) for one in decoders.read([partial(grey, 7)] * 3)] == [7] * 3


def test_processes_that_can_not_be_started_are_said_to_be_so() -> None:
    with Decoders(same, 2) as decoders:
        decoders._parent.kill()
        decoders._parent.wait()
        with pytest.raises(DataError, match="the process that starts the decoders has ended"):
            decoders.read([partial(end_process, signal.SIGKILL)])


def test_large_pictures_are_decoded_one_at_a_time_in_all_processes(tmp_path: Path) -> None:
    loads: list[Load] = [partial(alone, tmp_path / "mark")] * 100
    with Decoders(same, 3) as decoders, ThreadPoolExecutor(3) as pool:
        assert all(CRASHED in answer.reason for answer in decoders.read([end_while_large] * 2))  # its lock is lifted
        for answers in pool.map(decoders.read, [loads] * 3):
            assert {answer.reason for answer in answers} == {""}


_PROGRAM = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from embeddings.decoding import Decoders
from tests.embeddings.test_decoding import process_number, same
with Decoders(same, 3) as decoders, ThreadPoolExecutor(3) as pool:
    list(pool.map(decoders.read, [[process_number]] * 9))
    print("working", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_no_process_outlives_its_program(killed: bool) -> None:
    """Each holds the end of the program's output: it ends when the last of them does."""
    program = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stdout.readline() == "working\n"
    if killed:
        program.kill()
    else:
        program.stdin.close()
    assert program.stdout.read() == ""
    assert (program.wait() == 0) is not killed
    program.stdin.close()


def test_extract_in_processes_gives_the_same_store(
    tmp_path: Path, tiny_dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "07.png").write_bytes(b"bad")
    listing = list_folder(tmp_path / "images", None, FolderOptions(patients=False))
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=4))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(extract_module, "ENOUGH", 20)
    found = []
    for processes in (1, 2):
        outcome = extract(listing, encoder, tmp_path / "out.parquet", bytes(32), processes=processes)
        found.append((outcome.rejected, outcome.fingerprint, (tmp_path / "out.parquet").read_bytes()))
        (tmp_path / "out.parquet").unlink()
    assert found[0] == found[1]


def test_extract_names_the_file_that_crashes_a_decoder(
    tmp_path: Path, tiny_dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [Item(f"{number}.png", partial(grey, number + 1), 0, stamp=(number,)) for number in range(30)]
    items[11] = Item("11.png", partial(end_process, signal.SIGSEGV), 0, stamp=(11,))
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=4))
    monkeypatch.setattr(extract_module, "ENOUGH", 30)
    outcome = extract(Listing(tuple(items), (), ("a",)), encoder, tmp_path / "out.parquet", bytes(32), processes=2)
    ((name, reason),) = outcome.rejected
    assert name == "11.png"
    assert CRASHED in reason
    assert len(read_store(tmp_path / "out.parquet")) == 29


def test_extract_of_few_images_starts_no_process(tmp_path: Path, tiny_dinov2: Path) -> None:
    items = tuple(Item(f"{number}", lambda: grey(3), 0, stamp=(number,)) for number in range(5))  # can't be pickled
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=4))
    listing = Listing(items, (), ("a",))
    assert extract(listing, encoder, tmp_path / "out.parquet", bytes(32), processes=2).rows == 5
    with pytest.raises(Exception, match=r"pickle|local object"):
        list(embed_batches(items, encoder, processes=2))

"""Private state: exact round trips, whole files only, the round before kept, and damage refused."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from client_app.state.private_state import PrivateState
from common.durable import lock_file
from common.errors import DataError, FedHypeVAEError, PolicyRefusal


def tensors(round_index: int) -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(round_index))
    return {
        "client_code": generator.normal(size=16).astype(np.float32),
        "encoder/weight": generator.normal(size=(64, 32)),
        "steps": np.array(round_index, dtype=np.int64),
        "transposed": generator.normal(size=(3, 5)).T,
        "empty": np.zeros((0, 4), dtype=np.float32),
    }


def test_load_gives_back_what_was_saved(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run-1")
    state.save(7, tensors(7))
    loaded = PrivateState(tmp_path, "run-1").load(7)
    assert loaded.keys() == tensors(7).keys()
    for name, array in tensors(7).items():
        np.testing.assert_array_equal(loaded[name], array)
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)


def test_save_takes_torch_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = PrivateState(tmp_path, "run-1")
    code = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state.save(0, {"client_code": code, "transposed": code.T, "scalar": torch.tensor(2.5)})
    loaded = state.load(0)
    for name, expected in (("client_code", code), ("transposed", code.T), ("scalar", torch.tensor(2.5))):
        assert torch.equal(torch.from_numpy(loaded[name]), expected)


def test_save_keeps_the_round_before(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run-1")
    for index in range(5):
        state.save(index, tensors(index))
    assert state.rounds() == [3, 4]
    np.testing.assert_array_equal(state.load(3)["steps"], 3)
    state.save(4, tensors(44))  # the round is computed again from the round before it
    assert state.rounds() == [3, 4]
    np.testing.assert_array_equal(state.load(4)["steps"], 44)


def test_runs_do_not_share_state(tmp_path: Path) -> None:
    names = ["run", "run-1", "../escape", "a/b", "a b", "ä", "." * 80, "x" * 300, "RUN\x00"]
    for number, name in enumerate(names):
        PrivateState(tmp_path, name).save(0, {"n": np.array(number)})
    for number, name in enumerate(names):
        assert int(PrivateState(tmp_path, name).load(0)["n"]) == number
    assert {path.parent.parent for path in tmp_path.rglob("state-*")} == {tmp_path}


def test_load_refuses_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run-1")
    with pytest.raises(DataError, match="can't be read"):
        state.load(0)
    state.save(1, tensors(1))
    path = next(tmp_path.rglob("state-*"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="can't be read"):
        state.load(1)
    path.with_name("state-000002.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="another run, round or format"):
        state.load(2)
    with pytest.raises(DataError, match="at least 0"):
        state.load(-1)
    with pytest.raises(DataError, match="empty"):
        PrivateState(tmp_path, "")


def test_payload_is_given_back_only_if_it_is_the_committed_one(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run-1")
    digest = state.save_payload("round-1", b"what left")
    orphan = state.save_payload("round-1", b"an orphan's")
    assert state.load_payload("round-1", digest) == b"what left"
    assert state.load_payload("round-1", orphan) == b"an orphan's"
    with pytest.raises(DataError, match="can't be read"):
        state.load_payload("round-2", digest)
    path = next(path for path in tmp_path.rglob("payload-*") if digest in path.name)
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="not the one that was committed"):
        state.load_payload("round-1", digest)


def test_drop_payloads_keeps_the_named_round(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run-1")
    digests = {key: state.save_payload(key, key.encode()) for key in ("round-1", "round-10", "round-2")}
    state.drop_payloads(but="round-1")
    assert state.load_payload("round-1", digests["round-1"]) == b"round-1"
    for key in ("round-10", "round-2"):
        with pytest.raises(DataError):
            state.load_payload(key, digests[key])


def test_locked_waits_in_bounded_time_and_is_freed_by_death(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run-1", timeout_s=0.2)
    reader, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with state.locked():
                os.write(ready, b".")
                time.sleep(60)
        finally:
            os._exit(0)
    os.read(reader, 1)
    with pytest.raises(FedHypeVAEError, match="still held by another process"), state.locked():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with state.locked():
        pass
    with state.locked():  # released at the end of the block
        pass


def test_locked_passes_errors_of_the_block_on(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run-1")
    with pytest.raises(OSError, match="of the block"), state.locked():
        raise OSError("of the block")
    with lock_file(state.folder / "lock", timeout_s=0.1):
        pass


def test_save_killed_at_any_instant_leaves_whole_states(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run-1")
    state.save(0, {"a": np.zeros(20_000), "b": np.zeros(20_000)})
    for attempt in range(15):
        child = os.fork()
        if child == 0:
            try:
                for value in range(1, 10_000):
                    state.save(0, {"a": np.full(20_000, value), "b": np.full(20_000, value)})
            finally:
                os._exit(0)
        time.sleep(0.002 + 0.004 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = state.load(0)
        assert np.unique(np.concatenate([loaded["a"], loaded["b"]])).size == 1
        assert state.rounds() == [0]


def test_save_on_a_full_disk_keeps_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = PrivateState(tmp_path, "run-1")
    state.save(1, tensors(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FedHypeVAEError, match="No space left"):
        state.save(1, tensors(2))
    monkeypatch.undo()
    np.testing.assert_array_equal(state.load(1)["steps"], 1)
    assert [path for path in state.folder.iterdir() if "partial" in path.name] == []


def test_claim_holds_a_name_to_its_first_settings(tmp_path: Path) -> None:
    PrivateState(tmp_path, "run-1").claim("a" * 64)
    PrivateState(tmp_path, "run-1").claim("a" * 64)
    PrivateState(tmp_path, "run-2").claim("b" * 64)
    with pytest.raises(PolicyRefusal, match="another run-name") as caught:
        PrivateState(tmp_path, "run-1").claim("b" * 64)
    assert caught.value.rule == "run_name"

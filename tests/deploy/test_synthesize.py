"""`fedhypevae synthesize`: from the generator's file alone, the same seed the same bytes, fast and in little memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from common.durable import sha256_of
from common.errors import ConfigError, DataError
from common.publishing.parquet import read_notes
from deploy.commands.synthesize import parse_shares
from tests.deploy.release_cases import invoke


@pytest.fixture
def generator(released: Any, tmp_path: Path) -> Path:
    """The generator's file, alone in a folder, as it would lie on another machine."""
    (tmp_path / "alone").mkdir()
    shutil.copy2(released.run / "generator.safetensors", tmp_path / "alone")
    return tmp_path / "alone" / "generator.safetensors"


def draw(source: Path, out: Path, *words: str | int) -> Any:
    return invoke("synthesize", source, "--out", out, *(str(word) for word in words))


def test_synthesize_writes_what_was_asked_for(generator: Path, tmp_path: Path) -> None:
    done = draw(generator, tmp_path / "a.parquet", "--rows", 70_000, "--seed", 3)
    assert done.exit_code == 0, done.output
    assert "costs no privacy" in done.output
    assert "post-processing" in done.output
    table = pq.read_table(tmp_path / "a.parquet")
    assert len(table) == 70_000
    assert set(table["label"].to_pylist()) == {0, 1, 2}
    notes = read_notes(tmp_path / "a.parquet")
    assert notes["private"] is True
    assert notes["generator_sha256"] == sha256_of(generator)
    assert notes["sampling"]["seed"] == 3


def test_synthesize_gives_the_same_bytes_for_the_same_seed(generator: Path, released: Any, tmp_path: Path) -> None:
    """Also from the bundle's folder, and whatever the number of threads; other bytes for another seed."""
    shutil.copytree(released.run, tmp_path / "run")
    ways = {"one": (generator, 1, 5), "many": (tmp_path / "run", 4, 5), "other": (generator, 2, 6)}
    found = {}
    for name, (source, threads, seed) in ways.items():
        words = ("--rows", 70_000, "--seed", seed, "--threads", threads)
        assert draw(source, tmp_path / f"{name}.parquet", *words).exit_code == 0
        found[name] = (tmp_path / f"{name}.parquet").read_bytes()
    assert found["one"] == found["many"]
    assert found["one"] != found["other"]


@pytest.mark.parametrize(
    "words",
    [
        ("--balance", "given"),
        ("--share", "liver=1"),
        ("--balance", "given", "--share", "heart=1"),
        ("--code", "7"),
        ("--code", "first"),
        ("--rows", 2_000_000_000),
    ],
)
def test_synthesize_refuses_wrong_words(generator: Path, tmp_path: Path, words: tuple[str | int, ...]) -> None:
    done = draw(generator, tmp_path / "a.parquet", "--rows", 10, *words)
    assert isinstance(done.exception, ConfigError), done.output
    assert not (tmp_path / "a.parquet").exists()


def test_synthesize_leaves_a_file_alone(generator: Path, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("mine")
    assert isinstance(draw(generator, tmp_path / "a.parquet", "--rows", 10).exception, ConfigError)
    assert (tmp_path / "a.parquet").read_text() == "mine"


def test_synthesize_needs_a_generator(tmp_path: Path) -> None:
    assert isinstance(draw(tmp_path, tmp_path / "a.parquet", "--rows", 10).exception, DataError)


def test_synthesize_takes_balances_and_codes(generator: Path, tmp_path: Path) -> None:
    for place, words in enumerate(
        [
            ("--balance", "dp-counts"),
            ("--balance", "given", "--share", "lung=2", "--share", "liver=1"),
            ("--code", "meta"),
        ]
    ):
        assert draw(generator, tmp_path / f"{place}.parquet", "--rows", 30, *words).exit_code == 0
    assert read_notes(tmp_path / "1.parquet")["sampling"]["shares"] == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("texts", [["liver"], ["liver=x"], ["liver=1", "liver=2"], ["=1"], ["kidney=1"]])
def test_parse_shares_refuses_another_form(texts: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_shares(texts, ("liver", "lung"))


@pytest.mark.slow
def test_million_rows_take_less_than_a_minute_and_two_gibibytes(tmp_path: Path) -> None:
    """Processor time on two threads, since a machine that is busy with other work takes longer by the clock."""
    from benchmarks.synthesize_speed import THREADS, make_generator, synthesize

    found = synthesize(make_generator(tmp_path), 1_000_000, tmp_path / "rows.parquet")
    assert pq.ParquetFile(tmp_path / "rows.parquet").metadata.num_rows == 1_000_000
    (tmp_path / "rows.parquet").unlink()
    assert found["peak_memory_mib"] < 2048
    assert min(found["wall_seconds"], found["processor_seconds"] / THREADS) < 60

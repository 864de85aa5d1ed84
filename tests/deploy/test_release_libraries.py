"""A bundle in other people's programs: pyarrow, pandas, datasets, the Hub, mlcroissant; all without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.publishing.bundle import load_bundle
from deploy.release.describe import DATA_FILE

pytest.importorskip("datasets", reason="install the extra `release`")
pytest.importorskip("mlcroissant", reason="install the extra `release`")


def run_python(code: str, folder: Path, home: Path) -> str:
    """Run a program in a fresh process that has no network and no cache of its own."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home), "TMPDIR": str(home)}
    blocked = "import socket\ndef no(*a, **k): raise OSError('a network was asked for')\nsocket.socket.connect = no\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=folder,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pyarrow_and_pandas_read_the_rows(released: Any) -> None:
    import pandas
    import pyarrow.parquet as pq

    embeddings, labels = load_bundle(released.bundle).published()
    table = pq.read_table(released.bundle / "data")
    assert table.schema.field("embedding").type.list_size == 12
    frame = pandas.read_parquet(released.bundle / DATA_FILE)
    assert list(frame.columns) == ["embedding", "label"]
    assert np.array_equal(np.stack(frame["embedding"].to_list()), embeddings.numpy())
    assert frame["label"].tolist() == labels.tolist() == table["label"].to_pylist()


def test_datasets_load_the_rows_with_names_of_the_labels(released: Any, tmp_path: Path) -> None:
    code = """
import os
from datasets import load_dataset
rows = load_dataset("parquet", data_files="data/*.parquet", split="train")
first = rows.with_format("torch")[0]["embedding"]
print(len(rows), rows.features["label"].names, len(first), first.dtype)
whole = load_dataset(os.getcwd(), split="train")
print(len(whole), whole.features == rows.features)
"""
    lines = run_python(code, released.bundle, tmp_path).splitlines()
    assert lines == ["60 ['liver', 'lung', 'spleen'] 12 torch.float32", "60 True"]


def test_card_is_one_that_the_hub_reads(released: Any, tmp_path: Path) -> None:
    code = """
from huggingface_hub import DatasetCard
card = DatasetCard.load("README.md")
data = card.data.to_dict()
print(data["license"], data["annotations_creators"], data["size_categories"], data["pretty_name"])
print(data["configs"], "differential-privacy" in data["tags"], data["task_categories"])
"""
    lines = run_python(code, released.bundle, tmp_path).splitlines()
    assert lines[0] == "cc-by-4.0 ['machine-generated'] ['n<1K'] Synthetic embeddings of a federation"
    assert "'path': 'data/*.parquet'" in lines[1]
    assert " True " in lines[1]


def test_croissant_is_valid_and_leads_to_the_rows(released: Any, tmp_path: Path) -> None:
    """No error and no warning, and mlcroissant reads the very rows through it."""
    code = """
import numpy, mlcroissant
dataset = mlcroissant.Dataset("croissant.json")
print(sorted(dataset.metadata.issues.errors), sorted(dataset.metadata.issues.warnings))
rows = list(dataset.records("synthetic"))
print(len(rows), len(rows[0]["synthetic/embedding"]), [int(row["synthetic/label"]) for row in rows])
"""
    lines = run_python(code, released.bundle, tmp_path).splitlines()
    labels = load_bundle(released.bundle).published()[1].tolist()
    assert lines == ["[] []", f"60 12 {labels}"]


def test_network_is_blocked_in_these_tests(tmp_path: Path) -> None:
    """The check can fail: a program that asks for a network ends."""
    with pytest.raises(AssertionError, match="a network was asked for"):
        run_python("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", tmp_path, tmp_path)

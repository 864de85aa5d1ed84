"""The data sets of the comparison as pools of labelled rows, read from the shared data folder.

Values that a run could learn only from the data (centres, scales, codes of missing values) are constants
here.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

ORGAN_ROWS = 25_211  # as many as OrganSMNIST, the paper's set, has
_ORGAN_DRAW_SEED = 0
_HEART_SITES = ("cleveland", "hungarian", "switzerland", "va")
# Public centre and scale of each number: rounded values of an adult patient at rest.
_HEART_NUMBERS = {
    "age": (55.0, 10.0),
    "sex": (0.5, 0.5),
    "trestbps": (130.0, 20.0),
    "chol": (245.0, 60.0),
    "fbs": (0.0, 1.0),
    "thalach": (140.0, 25.0),
    "exang": (0.5, 0.5),
    "oldpeak": (1.0, 1.0),
    "ca": (0.5, 1.0),
}
_HEART_CODES = {"cp": "1234", "restecg": "012", "slope": "123", "thal": "367"}
# Nobody has a cholesterol or a blood pressure of zero: these are missing values.
_HEART_ZERO_IS_MISSING = ("chol", "trestbps")
# cleveland.data comes in a recoded edition: other numbers for the same codes, and the label turned
# round. 1 is "no disease": exercise angina stands at 14 % beside its 1 and 55 % beside its 0; elsewhere
# it is the reverse.
_CLEVELAND_CODES = {
    "cp": {"3": "1", "1": "2", "2": "3", "0": "4"},
    "restecg": {"1": "0", "2": "1", "0": "2"},
    "slope": {"2": "1", "1": "2", "0": "3"},
    "thal": {"2": "3", "1": "6", "3": "7", "0": "?"},
    "ca": {"4": "?"},
    "target": {"0": "1", "1": "0"},
}


@dataclass(frozen=True)
class Pool:
    """Labelled rows before they are divided into sites.

    `embeddings` (n, d) float32; `labels` (n,) int64; `class_names` K names; `sites` (n,) name of each row's
    real site, or None; `groups` (n,) int64 privacy unit of each row, or None where it is the row.
    """

    embeddings: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    sites: NDArray[np.str_] | None = None
    groups: NDArray[np.int64] | None = None


def data_folder() -> Path:
    """Where the shared data lies: $FEDHYPEVAE_SHARED/data, or ../shared/data beside the clone.

    Raises:
        DataError: there is no such folder.
    """
    shared = os.environ.get("FEDHYPEVAE_SHARED")
    root = Path(__file__).resolve().parents[2] / "shared" if shared is None else Path(shared)
    if not (root / "data").is_dir():
        raise DataError(
            f"expected the benchmark's data in {root / 'data'}, found no folder there: "
            "set FEDHYPEVAE_SHARED to the folder that holds data/"
        )
    return root / "data"


def organ_draw(count: int) -> NDArray[np.int64]:
    """Which of the `count` rows of OrganAMNIST (its three splits end to end) the pool has, in its order."""
    return np.random.default_rng(_ORGAN_DRAW_SEED).permutation(count)[:ORGAN_ROWS]


def load_organ(folder: Path) -> Pool:
    """OrganAMNIST with SSCD embeddings: 25,211 rows of its three splits, unit length, 11 classes."""
    with np.load(_existing(folder / "organamnist_sscd512.npz")) as arrays:
        embeddings = np.concatenate([arrays[f"{split}_embeddings"] for split in ("train", "val", "test")])
        labels = np.concatenate([arrays[f"{split}_labels"] for split in ("train", "val", "test")])
    drawn = organ_draw(len(labels))
    names = tuple(f"organ-{label}" for label in range(11))
    return Pool(_unit_length(embeddings[drawn]), labels[drawn].astype(np.int64), names)


def load_ham(folder: Path) -> Pool:
    """HAM10000 with SSCD embeddings: 10,015 rows of four real sites, 7 classes; the unit is the lesion."""
    with np.load(_existing(folder / "ham10000_sscd512.npz")) as arrays:
        _, groups = np.unique(arrays["lesion_id"], return_inverse=True)
        return Pool(
            _unit_length(arrays["embeddings"]),
            arrays["labels"].astype(np.int64),
            tuple(str(name) for name in arrays["class_names"]),
            arrays["site_names"][arrays["sites"]],
            groups.astype(np.int64),
        )


def load_heart(folder: Path) -> Pool:
    """UCI heart disease: 920 patients of four real hospitals, 22 scaled features, disease or none.

    A missing number counts as its public centre, a missing code as none of its values.
    """
    rows: list[list[float]] = []
    labels: list[int] = []
    sites: list[str] = []
    for site in _HEART_SITES:
        path = _existing(folder / "heart" / f"heart.{site}.data")
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for record in csv.DictReader(lines):
                if site == "cleveland":
                    record = _uci_codes(record)
                rows.append(_heart_features(record))
                labels.append(int(int(record["target"]) > 0))
                sites.append(site)
    return Pool(
        np.asarray(rows, dtype=np.float32),
        np.asarray(labels, dtype=np.int64),
        ("no disease", "disease"),
        np.asarray(sites, dtype=np.str_),
    )


def _uci_codes(record: dict[str, str]) -> dict[str, str]:
    """A record of cleveland.data in the codes of the other three files."""
    return {name: _CLEVELAND_CODES.get(name, {}).get(value, value) for name, value in record.items()}


def _heart_features(record: dict[str, str]) -> list[float]:
    features = []
    for name, (center, scale) in _HEART_NUMBERS.items():
        value = record[name]
        missing = value == "?" or (name in _HEART_ZERO_IS_MISSING and float(value) == 0)
        features.append(0.0 if missing else (float(value) - center) / scale)
    for name, codes in _HEART_CODES.items():
        features += [float(record[name] == code) for code in codes]
    return features


def _unit_length(embeddings: NDArray[np.floating]) -> NDArray[np.float32]:
    rows = embeddings.astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"expected the data set {path}, found no such file: see the benchmark's README")
    return path

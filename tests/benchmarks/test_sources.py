"""The data sets as they lie in the shared folder: sizes, scales, codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.sources import data_folder, load_ham, load_heart, load_organ
from common.errors import DataError

_HEADER = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,target\n"


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return data_folder()
    except DataError:
        pytest.skip("the shared data folder is not here")


def test_organ_is_the_stated_draw(folder: Path) -> None:
    pool = load_organ(folder)
    assert pool.embeddings.shape == (25_211, 512)
    assert np.allclose(np.linalg.norm(pool.embeddings, axis=1), 1.0, atol=1e-5)
    assert sorted(set(pool.labels.tolist())) == list(range(11))
    assert pool.groups is None


def test_ham_has_four_sites_and_lesions(folder: Path) -> None:
    pool = load_ham(folder)
    assert pool.sites is not None
    assert pool.groups is not None
    counts = {str(site): int((pool.sites == site).sum()) for site in np.unique(pool.sites)}
    assert counts == {"rosendahl": 2259, "vidir_modern": 3363, "vidir_molemax": 3954, "vienna_dias": 439}
    assert len(np.unique(pool.groups)) == 7470
    assert pool.class_names[5] == "nv"
    assert float((pool.labels == 5).mean()) == pytest.approx(0.67, abs=0.005)


def test_heart_speaks_one_code_at_all_sites(folder: Path) -> None:
    pool = load_heart(folder)
    assert pool.embeddings.shape == (920, 22)
    assert pool.sites is not None
    exercise_angina = pool.embeddings[:, 6]
    for site in ("cleveland", "hungarian", "switzerland", "va"):
        ill, well = ((pool.sites == site) & (pool.labels == label) for label in (1, 0))
        # Everywhere, people with the disease have angina on exercise more often.
        assert exercise_angina[ill].mean() > exercise_angina[well].mean()


def _write_heart(folder: Path, cleveland: str, va: str) -> Path:
    (folder / "heart").mkdir()
    for site, lines in {"cleveland": cleveland, "hungarian": "", "switzerland": "", "va": va}.items():
        (folder / "heart" / f"heart.{site}.data").write_text("\ufeff" + _HEADER + lines, encoding="utf-8")
    return folder


def test_heart_features_by_hand(tmp_path: Path) -> None:
    # The same patient, in the recoded edition and in the original codes; the second lacks chol, ca and thal.
    pool = load_heart(
        _write_heart(
            tmp_path,
            "65,1,3,150,305,1,2,115,1,2,2,0,1,0\n",
            "65,1,1,150,0,1,1,115,1,2,1,?,?,3\n",
        )
    )
    # age, sex, trestbps, chol, fbs, thalach, exang, oldpeak, ca
    numbers = [1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -0.5]
    codes = [1, 0, 0, 0, 0, 1, 0, 1, 0, 0]  # cp, restecg, slope
    assert pool.embeddings[0].tolist() == pytest.approx([*numbers, *codes, 0, 1, 0])
    numbers[3], numbers[8] = 0.0, 0.0
    assert pool.embeddings[1].tolist() == pytest.approx([*numbers, *codes, 0, 0, 0])
    assert pool.labels.tolist() == [1, 1]


def test_data_folder_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDHYPEVAE_SHARED", str(tmp_path))
    with pytest.raises(DataError, match="FEDHYPEVAE_SHARED"):
        data_folder()
    (tmp_path / "data").mkdir()
    assert data_folder() == tmp_path / "data"
    with pytest.raises(DataError, match=r"ham10000_sscd512\.npz"):
        load_ham(tmp_path / "data")

"""Every reader within a bound of memory that the kernel enforces, on files that would take gigabytes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from embeddings.store.file import read_store, read_usable
from tests.embeddings import bombs
from tests.embeddings.bombs import Make

J2K, JPEG, JPEG_LS, RLE = (
    b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.5",
)  # fmt: skip
# The reader in a process of its own, which may take so many MiB beyond what it has after its imports.
PROGRAM = """
import json, resource, sys, warnings
from pathlib import Path
from common.errors import FedHypeVAEError
{imports}
warnings.simplefilter("ignore")
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + {allowed} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
told = {{}}
for name in sys.argv[2:]:
    path = Path(sys.argv[1]) / name
    try:
        {work}
        told[name] = "read"
    except FedHypeVAEError as error:
        told[name] = str(error)
told[""] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(json.dumps(told))
"""


def under_limit(folder: Path, imports: str, work: str, allowed: int = 400) -> dict[str, str]:
    """What a reader says of each file of a folder."""
    program = PROGRAM.format(imports=imports, work=work, allowed=allowed)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, str] = json.loads(done.stdout)
    assert int(told.pop("")) < allowed
    return told


def make_all(folder: Path, makes: dict[str, tuple[Make, str]]) -> dict[str, str]:
    """Write the files; returns what is expected of each."""
    folder.mkdir()
    for name, (make, _) in makes.items():
        make(folder / name)
        assert (folder / name).stat().st_size < 4_000_000, name
    return {name: expected for name, (_, expected) in makes.items()}


def compare(told: dict[str, str], expected: dict[str, str]) -> None:
    """Every message is one line that names the file and what was expected: a limit's, not of memory that ran out."""
    assert told.keys() == expected.keys()
    wrong = {name: text for name, text in told.items() if expected[name] not in text or "\n" in text}
    assert not wrong


def dicom_frame(frame: Callable[[], bytes], syntax: bytes, **header: int) -> Make:
    return lambda path: bombs.encapsulated(path, frame(), syntax, **header)


def jpeg_ls() -> bytes:
    """A JPEG-LS frame of 64x64 pixels that says it had 60,000 by 60,000."""
    from pydicom import dcmread
    from pydicom.data import get_testdata_file
    from pydicom.encaps import get_frame

    raw = bytearray(get_frame(dcmread(get_testdata_file("MR_small_jpeg_ls_lossless.dcm")).PixelData, 0))
    place = raw.index(b"\xff\xf7")
    raw[place + 5 : place + 9] = (60_000).to_bytes(2, "big") * 2
    return bytes(raw)


EMPTY_ITEM = bytes.fromhex("feff00e000000000")
DICOM: dict[str, tuple[Make, str]] = {
    "deflated": (partial(bombs.deflated_dicom, mebibytes=640), "unpacks to more than"),
    "deflated-less": (partial(bombs.deflated_dicom, mebibytes=128), "unpacks to more than"),
    "items": (partial(bombs.dicom_header, parts=EMPTY_ITEM, count=2_000_000, sequence=True), "300,000 parts"),
    "groups": (partial(bombs.frame_groups, count=500_000), "60,000 items"),
    "values": (
        partial(bombs.dicom_header, parts=bombs.long_text((0x0020, 0x0013), 60_000_000), count=1), "attribute of 60,0"),
    "j2k": (dicom_frame(lambda: bombs.jpeg_2000(60_000, 60_000), J2K), "a frame of 60000x60000 pixels"),
    "j2k-boxed": (dicom_frame(lambda: bombs.jpeg_2000(60_000, 60_000, boxed=True), J2K), "a frame of 60000x60000"),
    "j2k-tiles": (dicom_frame(lambda: bombs.jpeg_2000(64, 64, tile=(1, 1)) , J2K), "read"),
    "j2k-more-tiles": (
        dicom_frame(lambda: bombs.jpeg_2000(255, 255, tile=(1, 1)), J2K, columns=255, rows=255), "tiles; expected"),
    "j2k-none": (dicom_frame(lambda: b"\xff\x4f\xff\x52" + bytes(100), J2K), "does not say its size"),
    "j2k-blank": (
        dicom_frame(lambda: bombs.blank_jpeg_2000(8900, 8900), J2K, columns=8900, rows=8900), "decompression bomb"),
    "jpeg": (dicom_frame(lambda: bombs.jpeg(60_000, 60_000), JPEG), "a frame of 60000x60000 pixels"),
    "jpeg-second": (dicom_frame(lambda: bombs.jpeg(60_000, 60_000, second=True), JPEG), "does not say its size"),
    "jpeg-ls": (dicom_frame(jpeg_ls, JPEG_LS), "a frame of 60000x60000 pixels"),
    "rle": (dicom_frame(lambda: bombs.rle(1_000_000), RLE), "unpacks to more than its 4,096 bytes"),
    "other-syntax": (dicom_frame(lambda: bytes(99), b"1.2.840.10008.1.2.8.1"), "is not read here"),
    "many-pixels": (partial(bombs.native, columns=60_000, rows=60_000, bits=8), "more than 80,000,000 pixels"),
    "wide-pixels": (partial(bombs.native, columns=8_000, rows=8_000, bits=64), "a frame of 512,000,000 bytes"),
}  # fmt: skip


def test_dicom_readers_stay_within_their_bound(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    pytest.importorskip("pylibjpeg")
    expected = make_all(tmp_path / "files", DICOM)
    expected["j2k-tiles"] = ""  # within the bounds; whether it can be decoded is the decoder's
    imports = "import pydicom, pylibjpeg, openjpeg, libjpeg, rle\n"
    imports += "from embeddings.readers.dicom import read_frame, read_header"
    compare(under_limit(tmp_path / "files", imports, "read_header(path, name); read_frame(path, name)"), expected)
    deflated = {name for name in expected if name.startswith("deflated")}
    headers = under_limit(tmp_path / "files", imports, "read_header(path, name)")
    assert all("unpacks to more than" in headers[name] for name in deflated)


PICTURES: dict[str, tuple[Make, str]] = {
    "ztxt": (partial(bombs.png, kind=b"zTXt", mebibytes=160), "ztxt: can't be decoded"),
    "iccp": (partial(bombs.png, kind=b"iCCP", mebibytes=160), "iccp: can't be decoded"),
    "itxt": (partial(bombs.png, kind=b"iTXt", mebibytes=160), "itxt: can't be decoded"),
    "webp": (partial(bombs.webp, width=16_000, height=10_000), "more than 80,000,000 pixels"),
    "gif": (partial(bombs.gif, width=60_000, height=60_000), "pixels"),
    "blank.webp": (partial(bombs.blank, size=(5_000, 5_000), mode="RGB", lossless=True), "decompression bomb"),
    "tile": (
        partial(bombs.tiff, entries=[(322, 4, 1, 100_000), (323, 4, 1, 100_000), (324, 4, 1, 8), (325, 4, 1, 64)]),
        "100000x100000 pixels"),
    "tags": (partial(bombs.tiff, entries=[(tag, 7, 250_000, 100) for tag in range(1_000, 21_000)]), "tags: "),
}  # fmt: skip


def test_picture_reader_stays_within_its_bound(tmp_path: Path) -> None:
    expected = make_all(tmp_path / "files", PICTURES)
    imports = "from PIL import features; features.check('webp')\nfrom embeddings.readers.images import read_image"
    compare(under_limit(tmp_path / "files", imports, "read_image(path, name)"), expected)


def test_exif_of_overlapping_tags_stays_within_the_bound(tmp_path: Path) -> None:
    bombs.tiff(tmp_path / "x", [(tag, 7, 250_000, 100) for tag in range(1_000, 21_000)])
    exif = b"Exif\0\0" + (tmp_path / "x").read_bytes()
    (tmp_path / "files").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "files" / "a.png", exif=exif)
    told = under_limit(tmp_path / "files", "from embeddings.readers.images import read_image", "read_image(path, name)")
    assert set(told) == {"a.png"}


FLOATS = {"descr": "<f4"}
ARRAYS: dict[str, tuple[Make, str]] = {
    "rows": (partial(bombs.npz, header={**FLOATS, "shape": (2**26, 4)}, size=2**20), "at most 10,000,000 rows"),
    "header": (partial(bombs.long_npy_header, mebibytes=1024), "numpy's format 1.0"),
    "zeros": (partial(bombs.npz, header={**FLOATS, "shape": (2**20, 64)}, size=2**28), "decompression bomb"),
    "lie-more": (partial(bombs.npz, header={**FLOATS, "shape": (4, 4)}, size=2**28), "as its header says"),
    "lie-less": (partial(bombs.npz, header={**FLOATS, "shape": (2**20, 4)}, size=64), "as its header says"),
    "text": (partial(bombs.npz, header={"descr": "<U4000000", "shape": (3,)}, size=48_000_000), "of at most 1000"),
    "objects": (partial(bombs.npz, header={"descr": "|O", "shape": (3,)}, size=64), "objects"),
    "lzma": (partial(bombs.npz, header={**FLOATS, "shape": (4, 4)}, size=64, method=zipfile.ZIP_LZMA), "numpy does"),
    "negative": (partial(bombs.npz, header={**FLOATS, "shape": (-4, -4)}, size=64), "rows, found the shape"),
    # two classes, whatever their numbers
    "labels": (partial(bombs.npz, header={**FLOATS, "shape": (2, 4)}, size=32, labels=np.asarray([0, 2**40])), "read"),
}  # fmt: skip


def test_array_reader_stays_within_its_bound_of_memory_and_disk(tmp_path: Path) -> None:
    expected = make_all(tmp_path / "files", ARRAYS)
    imports = (
        "from embeddings.readers.findings import LabelForm; from embeddings.readers.ready import ReadyNames, read_ready"
    )
    work = f"read_ready(path, Path({str(tmp_path / 'work')!r}), ReadyNames(), LabelForm())"
    compare(under_limit(tmp_path / "files", imports, work, allowed=200), expected)
    assert sum(file.stat().st_size for file in (tmp_path / "work").iterdir()) < 100_000_000


SETS: dict[str, tuple[Make, str]] = {
    "zeros": (partial(bombs.store, rows=2**19, width=64), "decompression bomb"),
    "rows": (partial(bombs.store, rows=11_000_000, width=1), "at most 10,000,000 rows"),
    "text": (partial(bombs.store, rows=1_000, width=4, site="s" * 1_000_000), "texts of at most 1,000 characters"),
    "texts": (partial(bombs.store, rows=200_000, width=4, site="s" * 900), "decompression bomb"),
    "long-row": (partial(bombs.long_row, values=30_000_000), "column embedding: expected 4 values"),
    "lying-page": (bombs.lying_page, "column embedding"),
}  # fmt: skip


@pytest.mark.parametrize("work", ["read_store(path)", "[len(chunk) for chunk in iterate_store(path)]"])
def test_store_reader_stays_within_its_bound(tmp_path: Path, work: str) -> None:
    expected = make_all(tmp_path / "files", SETS)
    imports = "import pandas\nfrom embeddings.store.file import iterate_store, read_store"
    compare(under_limit(tmp_path / "files", imports, work, allowed=300), expected)


def test_label_reader_stays_within_its_bound(tmp_path: Path) -> None:
    from embeddings.readers.labels import LabelColumns, read_labels

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["path", "label"], ["a", "x"], ["b", "y" * 2_000], ["c" * 2_000, "y"]])
    (tmp_path / "l.csv").write_text(text.getvalue())
    table = read_labels(tmp_path / "l.csv", LabelColumns())
    assert list(table.rows) == ["a"]
    assert all("more than 1,000 characters in line" in reason for reason in table.rejected.values())
    (tmp_path / "files").mkdir()
    with (tmp_path / "files" / "rows.csv").open("w") as file:
        file.write("path,label\n")
        file.write("a,b\n" * 60_000)
    with (tmp_path / "files" / "size.csv").open("wb") as sparse:
        sparse.truncate(2**31)
    imports = "from embeddings.readers import labels\nlabels.LABEL_ROWS = 50_000"
    told = under_limit(tmp_path / "files", imports, "labels.read_labels(path, labels.LabelColumns())")
    assert "at most 50,000 rows" in told["rows.csv"]
    assert "at most 268,435,456 bytes" in told["size.csv"]


def test_tensor_files_stay_within_their_bound(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with (tmp_path / "files" / "header").open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(90_000_100)
    deep = json.dumps({"__metadata__": {"format": "x", "encoder": "[" * 200_000}}).encode()
    (tmp_path / "files" / "deep").write_bytes(len(deep).to_bytes(8, "little") + deep)
    imports = "from deploy.classifier.file import load_head\nfrom common.tensor_file import read_tensors"
    told = under_limit(tmp_path / "files", imports, "load_head(path)")
    assert "expected at most 10,000,000" in told["header"]
    assert "no classifier of this project" in told["deep"]


def test_run_goes_on_whatever_the_texts_of_a_row_are(tmp_path: Path) -> None:
    """A run's reading refuses nothing that lies in a row: the server would see it."""
    bombs.store(tmp_path / "a.parquet", rows=3, width=4, site="s" * 5_000)
    with pytest.raises(DataError, match="at most 1,000 characters"):
        read_store(tmp_path / "a.parquet")
    assert len(read_usable(tmp_path / "a.parquet")) == 0  # zeros alone

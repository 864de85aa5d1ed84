"""DICOM rendering against pydicom's own transformations, Pillow's decoders, and values worked out by hand."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, DataError
from embeddings.encoders.load import load_encoder
from embeddings.readers.dicom import is_dicom, read_frame, read_header
from embeddings.readers.dicom_picture import Window

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("pylibjpeg")
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian  # noqa: E402

# File, modality as stored, photometric interpretation as stored, transfer syntax.
FILES = {
    "CT_small.dcm": ("CT", "MONOCHROME2", "Explicit VR Little Endian"),
    "MR_small.dcm": ("MR", "MONOCHROME2", "Explicit VR Little Endian"),
    "MR_small_implicit.dcm": ("MR", "MONOCHROME2", "Implicit VR Little Endian"),
    "MR_small_bigendian.dcm": ("MR", "MONOCHROME2", "Explicit VR Big Endian"),
    "MR_small_RLE.dcm": ("MR", "MONOCHROME2", "RLE Lossless"),
    "MR_small_jp2klossless.dcm": ("MR", "MONOCHROME2", "JPEG 2000 Image Compression (Lossless Only)"),
    "MR_small_jpeg_ls_lossless.dcm": ("MR", "MONOCHROME2", "JPEG-LS Lossless Image Compression"),
    "JPEG2000.dcm": ("NM", "MONOCHROME2", "JPEG 2000 Image Compression"),
    "JPGExtended.dcm": ("NM", "MONOCHROME2", "JPEG Extended (Process 2 and 4)"),
    "J2K_pixelrep_mismatch.dcm": ("CT", "MONOCHROME2", "JPEG 2000 Image Compression (Lossless Only)"),
    "image_dfl.dcm": ("OT", "MONOCHROME2", "Deflated Explicit VR Little Endian"),
    "liver_1frame.dcm": ("SEG", "MONOCHROME2", "Explicit VR Little Endian"),
    "rtdose_1frame.dcm": ("RTDOSE", "MONOCHROME2", "Implicit VR Little Endian"),
    "examples_overlay.dcm": ("MR", "MONOCHROME2", "Explicit VR Little Endian"),
    "examples_rgb_color.dcm": ("US", "RGB", "Explicit VR Little Endian"),
    "examples_palette.dcm": ("US", "PALETTE COLOR", "Explicit VR Little Endian"),
    "examples_jpeg2k.dcm": ("US", "YBR_RCT", "JPEG 2000 Image Compression (Lossless Only)"),
    "SC_rgb_rle.dcm": ("OT", "RGB", "RLE Lossless"),
    "SC_rgb_rle_16bit.dcm": ("OT", "RGB", "RLE Lossless"),
    "SC_ybr_full_422_uncompressed.dcm": ("OT", "YBR_FULL_422", "Explicit VR Little Endian"),
    "SC_rgb_jpeg_gdcm.dcm": ("OT", "RGB", "JPEG Lossless, Non-Hierarchical, First-Order Prediction"),
    "SC_rgb_jpeg_dcmtk.dcm": ("OT", "YBR_FULL", "JPEG Baseline (Process 1)"),
    "SC_rgb_small_odd.dcm": ("OT", "RGB", "Explicit VR Little Endian"),
}


def _path(name: str) -> Path:
    found = get_testdata_file(name, download=False)
    if found is None:
        pytest.skip(f"{name} is not among pydicom's installed test files")
    return Path(str(found))


def _reference(path: Path) -> np.ndarray:
    """Render with pydicom's own functions, as its documentation does, and scale what they give to 0..255."""
    from pydicom.pixels import apply_color_lut, apply_rescale, apply_voi_lut, pixel_array

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        pixels = pixel_array(dataset)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            return (apply_color_lut(pixels, dataset) // 256).astype(np.uint8)
        if pixels.ndim == 3:
            return pixels if pixels.dtype == np.uint8 else (pixels // 256).astype(np.uint8)
        values = apply_rescale(pixels, dataset).astype(np.float64)
        low, high = values.min(), values.max()
        if dataset.get("WindowCenter") is not None:
            values = apply_voi_lut(values, dataset)
            stored = int(dataset.BitsStored)
            ends = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if dataset.PixelRepresentation else (0, 2**stored - 1)
            slope = float(dataset.get("RescaleSlope", 1))
            low, high = (end * slope + float(dataset.get("RescaleIntercept", 0)) for end in ends)
        return np.rint((values - low) / (high - low) * 255.0)


@pytest.mark.parametrize("name", FILES)
def test_read_frame_matches_the_reference_rendering(name: str) -> None:
    path = _path(name)
    dataset = pydicom.dcmread(path)
    found = (dataset.get("Modality"), dataset.PhotometricInterpretation, dataset.file_meta.TransferSyntaxUID.name)
    assert found == (FILES[name][0], FILES[name][1], found[2])
    assert found[2].startswith(FILES[name][2][:25])
    picture = read_frame(path, name)
    expected = _reference(path)
    assert picture.dtype == np.uint8
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(np.float64) - expected).max() <= 1


def test_read_frame_every_file_is_embedded(tiny_dinov2: Path) -> None:
    pictures = [read_frame(_path(name), name) for name in FILES]
    vectors = load_encoder(str(tiny_dinov2)).embed(pictures)
    assert vectors.shape == (len(FILES), 32)
    assert np.isfinite(vectors).all()


def test_read_frame_jpeg_equals_pillows_decoder() -> None:
    """Another decoder altogether: the JPEG stream taken out of the file and given to Pillow."""
    from pydicom.encaps import generate_frames

    path = _path("SC_rgb_jpeg_dcmtk.dcm")
    dataset = pydicom.dcmread(path)
    stream = next(generate_frames(dataset.PixelData, number_of_frames=1))
    expected = np.asarray(Image.open(io.BytesIO(stream)).convert("RGB")).astype(int)
    assert np.abs(read_frame(path, path.name).astype(int) - expected).max() <= 4


def _dataset(pixels: np.ndarray, **attributes: object) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    frames = pixels.shape[0] if pixels.ndim == 3 else 1
    dataset.update(
        {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": "1.2.3.4",
            "Modality": "CT",
            "PhotometricInterpretation": "MONOCHROME2",
            "SamplesPerPixel": 1,
            "Rows": pixels.shape[-2],
            "Columns": pixels.shape[-1],
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
        }
    )
    for keyword, value in {"NumberOfFrames": frames, **attributes}.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = pixels.astype("<i2").tobytes()
    return dataset


def _shown(tmp_path: Path, dataset: FileDataset, frame: int = 0, window: Window | None = None) -> list[int]:
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    return read_frame(tmp_path / "a.dcm", "a.dcm", frame, window).ravel().tolist()


VALUES = np.asarray([[-1000, 0, 40, 80, 3000]])


def test_read_frame_window_by_hand(tmp_path: Path) -> None:
    """Centre 40, width 81: y = (x - 39.5)/80 + 0.5, so 0 -> 0.00625 and 80 -> 1.00625."""
    dataset = _dataset(VALUES, WindowCenter=40, WindowWidth=81)
    assert _shown(tmp_path, dataset) == [0, 2, 129, 255, 255]


def test_read_frame_rescale_comes_before_the_window(tmp_path: Path) -> None:
    dataset = _dataset(VALUES + 1024, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=81)
    assert _shown(tmp_path, dataset) == [0, 2, 129, 255, 255]


def test_read_frame_monochrome1_is_inverted(tmp_path: Path) -> None:
    dataset = _dataset(VALUES, WindowCenter=40, WindowWidth=81, PhotometricInterpretation="MONOCHROME1")
    assert _shown(tmp_path, dataset) == [255, 253, 126, 0, 0]


def test_read_frame_linear_exact_and_sigmoid_by_hand(tmp_path: Path) -> None:
    dataset = _dataset(VALUES, WindowCenter=40, WindowWidth=80, VOILUTFunction="LINEAR_EXACT")
    assert _shown(tmp_path, dataset) == [0, 0, 128, 255, 255]
    dataset.VOILUTFunction = "SIGMOID"
    sigmoid = 255 / (1 + np.exp(-4 * (VALUES[0] - 40) / 80))
    assert _shown(tmp_path, dataset) == np.rint(sigmoid).astype(int).tolist()


def test_read_frame_other_window_replaces_the_files(tmp_path: Path) -> None:
    dataset = _dataset(VALUES, WindowCenter=1000, WindowWidth=10)
    assert _shown(tmp_path, dataset, window=Window(40, 81)) == [0, 2, 129, 255, 255]
    with pytest.raises(ConfigError, match="width above 0"):
        Window(40, 0)


def test_read_frame_without_window_spans_the_values_but_padding(tmp_path: Path) -> None:
    dataset = _dataset(np.asarray([[-2000, 0, 100, 50]]), PixelPaddingValue=-2000)
    dataset["PixelPaddingValue"].VR = "SS"
    assert _shown(tmp_path, dataset) == [0, 0, 255, 128]
    assert _shown(tmp_path, _dataset(np.full((1, 3), 7))) == [0, 0, 0]


def test_read_frame_voi_table_by_hand(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [4, 0, 8]
    table.LUTData = [0, 51, 102, 255]
    table["LUTDescriptor"].VR = "US"
    table["LUTData"].VR = "US"
    dataset = _dataset(np.asarray([[-5, 0, 1, 2, 3, 9]]), VOILUTSequence=Sequence([table]))
    assert _shown(tmp_path, dataset) == [0, 0, 51, 102, 255, 255]


def test_read_frame_reads_per_frame_windows_and_shared_rescale(tmp_path: Path) -> None:
    def group(keyword: str, **values: float) -> Dataset:
        inner, outer = Dataset(), Dataset()
        for name, value in values.items():
            setattr(inner, name, value)
        setattr(outer, keyword, Sequence([inner]))
        return outer

    frames = np.stack([VALUES, VALUES])
    dataset = _dataset(frames)
    windows = [group("FrameVOILUTSequence", WindowCenter=center, WindowWidth=81) for center in (40, 80)]
    dataset.PerFrameFunctionalGroupsSequence = Sequence(windows)
    rescale = group("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=40)
    dataset.SharedFunctionalGroupsSequence = Sequence([rescale])
    assert _shown(tmp_path, dataset, frame=1) == [0, 2, 129, 255, 255]
    assert _shown(tmp_path, dataset, frame=0) == [0, 129, 255, 255, 255]


def test_read_header_counts_frames_and_reads_no_pixels() -> None:
    header = read_header(_path("examples_ybr_color.dcm"), "x")
    assert header.frames == 30
    assert read_frame(_path("examples_ybr_color.dcm"), "x", 29).shape == (240, 320, 3)


@pytest.mark.parametrize("name", ["rtplan.dcm", "reportsi.dcm", "DICOMDIR-empty.dcm"])
def test_read_header_without_pixels_is_one_line(name: str) -> None:
    with pytest.raises(DataError, match=f"^{name}: a DICOM file without pixels"):
        read_header(_path(name), name)


def test_read_frame_truncated_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^MR_truncated.dcm: the DICOM pixels can't be decoded"):
        read_frame(_path("MR_truncated.dcm"), "MR_truncated.dcm")


def test_read_header_refuses_a_bomb(tmp_path: Path) -> None:
    dataset = _dataset(VALUES)
    dataset.Rows = dataset.Columns = 60_000
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    for reader in (read_header, read_frame):
        with pytest.raises(DataError, match="pixels"):
            reader(tmp_path / "a.dcm", "a.dcm")


def test_is_dicom_looks_at_the_mark_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(bytes(200))
    assert not is_dicom(tmp_path / "a.dcm")
    assert is_dicom(_path("CT_small.dcm"))
    assert not is_dicom(tmp_path / "none")

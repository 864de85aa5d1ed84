"""DICOM files: headers, and frames as pictures.

What a file says of its sizes is checked before anything is unpacked or decoded, against limits and against what each
encoded frame says of itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, DataError
from common.texts import neat
from embeddings.limits import (
    DEFLATE_RATIO,
    FREE_BYTES,
    INFLATED_BYTES,
    MAX_FRAMES,
    MIB,
    check_frame,
    check_size,
    decoding,
)
from embeddings.readers.codestream import frame_size, rle_size
from embeddings.readers.dicom_order import NO_PLACE, Slice, middle_frame, slice_of
from embeddings.readers.dicom_parts import InParts, check_values
from embeddings.readers.dicom_picture import Source, Window, render
from embeddings.readers.dicom_samples import Samples, as_stored, sample_form

_DEFLATED, _EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"
_HEADER_TAGS = (
    "PatientID",
    "SeriesInstanceUID",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelRepresentation",
)
_PLACES = (
    "InstanceNumber",
    "SliceLocation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


@dataclasses.dataclass(frozen=True)
class Header:
    """What listing a series needs to know of a file. `patient` never leaves the listing unhashed."""

    frames: int
    patient: str
    series: str
    place: Slice
    middle: int


def is_dicom(path: Path) -> bool:
    """Tell whether a file carries the DICOM mark (`DICM` at byte 128); a pipe, which may never end, is none."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(128)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def read_header(path: Path, name: str, *, places: bool = False) -> Header:
    """Read a DICOM file's header without its pixels.

    Args:
        path: the file.
        name: how messages name it.
        places: whether to look at where its slices lie.

    Returns:
        Number of frames, the patient as stated, the series, the place in it, and the frame in the middle.

    Raises:
        DataError: it can't be read, has no image, too many pixels or frames, or unpacks to too much.
        ConfigError: pydicom is not installed.
    """
    pydicom = _pydicom()
    try:
        with _plain(path, name) as file:
            dataset = pydicom.dcmread(
                file, stop_before_pixels=True, specific_tags=[*_HEADER_TAGS, *(_PLACES if places else ())]
            )
        check_values(dataset, name)
        rows, columns = dataset.get("Rows"), dataset.get("Columns")
        if rows is None or columns is None:
            raise DataError(f"{name}: a DICOM file without pixels; leave it out")
        check_size(name, int(columns), int(rows))
        frames = int(dataset.get("NumberOfFrames") or 1)
        if not 1 <= frames <= MAX_FRAMES:
            raise DataError(f"{name}: expected 1 to {MAX_FRAMES:,} frames, found {frames}")
        return Header(
            frames=frames,
            patient=_text(dataset.get("PatientID")),
            series=neat(_text(dataset.get("SeriesInstanceUID"))),
            place=slice_of(dataset) if places else NO_PLACE,
            middle=middle_frame(dataset, frames) if places and frames > 1 else 0,
        )
    except DataError:
        raise
    except Exception as error:  # a damaged header may raise anything; it must cost this file only
        raise DataError(f"{name}: the DICOM header can't be read ({type(error).__name__})") from None


def read_frame(path: Path, name: str, frame: int = 0, window: Window | None = None) -> NDArray[np.uint8]:
    """Decode one frame and show it as a viewer does.

    Args:
        path: the file.
        name: how messages name it.
        frame: 0..frames-1.
        window: replaces the file's own window and table; None keeps them.

    Returns:
        (h, w) uint8 for grey frames, (h, w, 3) uint8 for colour.

    Raises:
        DataError: the file is damaged or has no pixels.
        ConfigError: pydicom is not installed.
    """
    pydicom = _pydicom()
    try:
        with _plain(path, name) as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            check_values(dataset, name)
            syntax = dataset.file_meta.TransferSyntaxUID
            samples = _check_frame(dataset, syntax, file, name, frame)
            # The RLE plugin written in Rust panics on damaged input; pydicom's own decoder raises.
            plugin = "pydicom" if syntax == pydicom.uid.RLELossless else ""
            allocated = 8 if samples.narrow else int(dataset.BitsAllocated)
            raw = as_stored(str(dataset.get("PhotometricInterpretation")), samples.bits, allocated)
            with decoding(int(dataset.Columns) * int(dataset.Rows)):
                form = {"bits_allocated": 8, "bits_stored": min(samples.bits, 8)} if samples.narrow else {}
                if syntax.is_encapsulated and syntax != pydicom.uid.RLELossless and dataset.get("SamplesPerPixel") == 3:
                    form["planar_configuration"] = 0  # decoders give pixel by pixel, whatever the header says
                # pydicom clears unused bits as if the sample were always the lowest ones: `Samples` looks where it lies
                pixels = pydicom.pixels.pixel_array(
                    file, index=frame, decoding_plugin=plugin, raw=raw, correct_unused_bits=False, **form
                )
                return render(Source(dataset, frame, samples, name), pixels, window)
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        raise DataError(f"{name}: decoding needs more memory than there is") from None
    except BaseException as error:  # decoders raise anything, also what is no Exception; it costs this file only
        raise DataError(f"{name}: the DICOM pixels can't be decoded ({type(error).__name__})") from None


@contextlib.contextmanager
def _plain(path: Path, name: str) -> Iterator[Any]:
    """The file; a deflated one is unpacked within bounds, and then says of itself that it is plain."""
    from pydicom import filereader
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with path.open("rb") as opened:
        file = InParts(opened, name)
        filereader.read_preamble(file, False)
        meta = filereader._read_file_meta_info(file)
        start = file.tell()
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            file.seek(0)
            yield file
            return
        file.seek(0)
        plain = io.BytesIO()
        plain.write(file.read(start).replace(_DEFLATED, _EXPLICIT))
        most = min(INFLATED_BYTES, max(FREE_BYTES, DEFLATE_RATIO * path.stat().st_size))
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        while not stream.eof and plain.tell() <= most and (piece := stream.unconsumed_tail or file.read(MIB)):
            plain.write(stream.decompress(piece, MIB))
    if not stream.eof:
        raise DataError(
            f"{name}: a deflated file that ends early, or unpacks to more than {most:,} bytes (it may be a "
            "decompression bomb); copy it again, store it without compression, or leave it out"
        )
    plain.seek(0)
    yield InParts(plain, name)


def _check_frame(dataset: Any, syntax: Any, file: BinaryIO, name: str, frame: int) -> Samples:
    """Refuse a frame by what the file and the frame declare, before anything is decoded.

    Args:
        dataset: the header.
        syntax: the transfer syntax.
        file: the open file, at its pixels.
        name: how messages name it.
        frame: 0..frames-1.

    Returns:
        The form of its samples.

    Raises:
        DataError: no pixels, too many, sizes that differ, samples that can't be placed, or an encoding whose sizes are
            not known here.
    """
    from pydicom import uid
    from pydicom.encaps import get_frame

    head = file.read(12)
    file.seek(-len(head), io.SEEK_CUR)
    group, element = (
        struct.unpack_from("<HH" if head[:2] == b"\xe0\x7f" else ">HH", head) if len(head) == 12 else (0, 0)
    )
    if group != 0x7FE0 or element not in {0x0008, 0x0009, 0x0010}:
        raise DataError(f"{name}: a DICOM file without pixels; leave it out")
    columns, rows, samples = int(dataset.Columns), int(dataset.Rows), int(dataset.get("SamplesPerPixel") or 1)
    frames = int(dataset.get("NumberOfFrames") or 1)
    check_size(name, columns, rows)
    for keyword in ("BitsAllocated", "SamplesPerPixel", *(["PixelRepresentation"] if element == 0x0010 else [])):
        if dataset.get(keyword) is None:
            raise DataError(f"{name}: a DICOM file that does not state {keyword}; correct the header or leave it out")
    size = columns * rows * samples * -(-int(dataset.BitsAllocated) // 8)
    if syntax in {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}:
        check_frame(name, size, size)
        if element != 0x0010:
            if samples != 1:
                raise DataError(f"{name}: floats of {samples} samples a pixel; expected 1: leave it out")
            return Samples(8 * (4 if element == 0x0008 else 8), floating=True)
        (length,) = struct.unpack_from(
            "<I" if syntax.is_little_endian else ">I", head, 4 if syntax.is_implicit_VR else 8
        )
        if length == 0xFFFFFFFF:
            raise DataError(f"{name}: encoded pixels in a file that says they are not; correct its transfer syntax")
        if dataset.get("PhotometricInterpretation") == "YBR_FULL_422" and length >= size * frames:
            raise DataError(
                f"{name}: YBR_FULL_422 of {length:,} bytes, all colour of {columns}x{rows} pixels, and so is "
                "YBR_FULL or RGB; correct the header or leave the file out"
            )
        return sample_form(dataset, None, name)
    lossy = {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K}
    jpegs = {*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes, *uid.JPEG2000TransferSyntaxes}
    if syntax not in {uid.RLELossless, *jpegs}:
        raise DataError(f"{name}: the transfer syntax {syntax} is not read here; store it as another")
    place = file.tell()
    file.seek(12, io.SEEK_CUR)
    extended = None
    if dataset.get("ExtendedOffsetTable") is not None:
        extended = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    encoded = get_frame(file, frame, number_of_frames=frames, extended_offsets=extended)
    file.seek(place)
    check_frame(name, size, len(encoded))
    if syntax == uid.RLELossless:
        if rle_size(encoded) > size + 2 * 15:  # a segment may be padded
            raise DataError(f"{name}: a frame that unpacks to more than its {size:,} bytes; leave it out")
        return sample_form(dataset, None, name)
    found = frame_size(encoded, name)
    if found[:3] != (columns, rows, samples):
        raise DataError(
            f"{name}: a frame of {found[0]}x{found[1]} pixels in {found[2]} samples; expected {columns}x{rows} in "
            f"{samples}, as its header says: leave it out"
        )
    return sample_form(dataset, found, name, jpeg_2000=syntax in uid.JPEG2000TransferSyntaxes, lossy=syntax in lossy)


def _text(value: Any) -> str:
    """A value as text; several are one, as they are written."""
    return "" if value is None else value if isinstance(value, str) else "\\".join(map(str, value))


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise ConfigError("DICOM files need pydicom: pip install '.[dicom]' in the project's folder") from None
    # A value outside its type's rules is no reason to refuse a picture; and a warning may quote a header.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom

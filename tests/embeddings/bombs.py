"""Small files that unpack to much more than their size, or that say other of it than they hold."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common.wire.identity import EncoderIdentity
from embeddings.store.sets import EmbeddingSet, SetMetadata
from embeddings.store.writing import write_store

ZEROS = bytes(1 << 24)


def deflated_dicom(path: Path, mebibytes: int, tail: bytes = b"") -> None:
    """A deflated DICOM file whose pixels unpack to so much."""
    body = _element(0x0028, 0x0002, b"US", struct.pack("<H", 1)) + _element(0x0028, 0x0004, b"CS", b"MONOCHROME2 ")
    for element, value in ((0x0010, 8), (0x0011, 8), (0x0100, 8), (0x0101, 8), (0x0102, 7), (0x0103, 0)):
        body += _element(0x0028, element, b"US", struct.pack("<H", value))
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = mebibytes << 20
    out = packer.compress(body + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, size))
    for _ in range(size >> 24):
        out += packer.compress(ZEROS)
    path.write_bytes(_head(b"1.2.840.10008.1.2.1.99") + out + packer.flush() + tail)


def dicom_header(path: Path, parts: bytes, count: int, *, sequence: bool = False) -> None:
    """A deflated DICOM file of 8x8 pixels, with a private attribute or a sequence repeated in its header."""
    body = b"" if not sequence else struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    body += parts * count + (struct.pack("<HHI", 0xFFFE, 0xE0DD, 0) if sequence else b"")
    body += _element(0x0028, 0x0002, b"US", struct.pack("<H", 1)) + _element(0x0028, 0x0004, b"CS", b"MONOCHROME2 ")
    for element, value in ((0x0010, 8), (0x0011, 8), (0x0100, 8), (0x0101, 8), (0x0102, 7), (0x0103, 0)):
        body += _element(0x0028, element, b"US", struct.pack("<H", value))
    body += struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 64) + bytes(64)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(_head(b"1.2.840.10008.1.2.1.99") + packer.compress(body) + packer.flush())


def frame_groups(path: Path, count: int) -> None:
    """A deflated DICOM file with so many empty items in a sequence of known length, which is read at once."""
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    dicom_header(path, struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(item) * count) + item * count, 1)


def long_text(tag: tuple[int, int], size: int) -> bytes:
    """A DICOM attribute of text with a backslash between any two of its values of two letters."""
    return struct.pack("<HH2sHI", *tag, b"UC", 0, size) + b"12\\" * (size // 3) + b" " * (size % 3)


def long_npy_header(path: Path, mebibytes: int) -> None:
    """An archive whose array says of its header that it is so long, and it is."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("embeddings.npy", "w") as file:
        file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", mebibytes << 20))
        for _ in range(mebibytes >> 4):
            file.write(b" " * (1 << 24))


def encapsulated(path: Path, frame: bytes, syntax: bytes, columns: int = 64, rows: int = 64, samples: int = 1) -> None:
    """A DICOM file of one encoded frame, and what its header says of it."""
    photometric = b"MONOCHROME2 " if samples == 1 else b"RGB "
    body = _element(0x0028, 0x0002, b"US", struct.pack("<H", samples)) + _element(0x0028, 0x0004, b"CS", photometric)
    if samples > 1:
        body += _element(0x0028, 0x0006, b"US", struct.pack("<H", 0))
    for element, value in ((0x0010, rows), (0x0011, columns), (0x0100, 8), (0x0101, 8), (0x0102, 7), (0x0103, 0)):
        body += _element(0x0028, element, b"US", struct.pack("<H", value))
    frame += bytes(len(frame) % 2)
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    pixels += struct.pack("<HHI", 0xFFFE, 0xE000, len(frame)) + frame + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path.write_bytes(_head(syntax) + body + pixels)


def native(path: Path, columns: int, rows: int, bits: int) -> None:
    """A DICOM file that declares such a frame and holds eight bytes of it."""
    body = _element(0x0028, 0x0002, b"US", struct.pack("<H", 1)) + _element(0x0028, 0x0004, b"CS", b"MONOCHROME2 ")
    for element, value in ((0x0010, rows), (0x0011, columns), (0x0100, bits), (0x0101, bits), (0x0102, bits - 1)):
        body += _element(0x0028, element, b"US", struct.pack("<H", value))
    body += _element(0x0028, 0x0103, b"US", struct.pack("<H", 0))
    body += struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 8) + bytes(8)
    path.write_bytes(_head(b"1.2.840.10008.1.2.1\0") + body)


def jpeg_2000(columns: int, rows: int, *, boxed: bool = False, tile: tuple[int, int] | None = None) -> bytes:
    """A JPEG 2000 frame of 64x64 pixels that says it had so many."""
    sink = io.BytesIO()
    Image.new("L", (64, 64)).save(sink, "JPEG2000", no_jp2=not boxed, irreversible=False)
    raw = bytearray(sink.getvalue())
    place = raw.index(b"\xff\x4f\xff\x51") + 8
    struct.pack_into(">II", raw, place, columns, rows)
    struct.pack_into(">II", raw, place + 16, *(tile or (columns, rows)))
    return bytes(raw)


def blank_jpeg_2000(columns: int, rows: int) -> bytes:
    """A blank frame that is as large as it says, in a few hundred bytes."""
    sink = io.BytesIO()
    Image.new("L", (columns, rows)).save(sink, "JPEG2000", no_jp2=True, irreversible=False)
    return sink.getvalue()


def jpeg(columns: int, rows: int, *, second: bool = False) -> bytes:
    """A JPEG frame of 64x64 pixels that says it had so many, in its only frame header or in a second one."""
    sink = io.BytesIO()
    Image.new("L", (64, 64)).save(sink, "JPEG")
    raw = bytearray(sink.getvalue())
    place = raw.index(b"\xff\xc0")
    length = struct.unpack_from(">H", raw, place + 2)[0] + 2
    header = bytearray(raw[place : place + length])
    struct.pack_into(">HH", header, 5, rows, columns)
    raw[place : place + (0 if second else length)] = header
    return bytes(raw)


def rle(expanding: int) -> bytes:
    """An RLE frame of one segment that unpacks to 128 times so many bytes."""
    return struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * expanding


def png(path: Path, kind: bytes, mebibytes: int) -> None:
    """A picture of one pixel with a compressed chunk that unpacks to so much."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(mebibytes)) + packer.flush()
    names = {b"zTXt": b"key\0\0", b"iCCP": b"key\0\0", b"iTXt": b"key\0\1\0\0\0"}
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (kind, names[kind] + packed), (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks))


def blank(path: Path, size: tuple[int, int], mode: str, **options: Any) -> None:
    """A picture without anything on it."""
    Image.new(mode, size).save(path, **options)


def tiff(path: Path, entries: list[tuple[int, int, int, int]]) -> None:
    """A TIFF of one grey pixel, with more tags: number, type, count, value."""
    plain = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    rows = sorted({entry[0]: entry for entry in [*plain, *entries]}.values())
    table = struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHII", *row) for row in rows) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + table + bytes(300_000))


def gif(path: Path, width: int, height: int) -> None:
    """A GIF with a screen of one pixel and a first frame of so many."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    path.write_bytes(screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\2\x4c\1\0;")


def webp(path: Path, width: int, height: int) -> None:
    """A WebP file whose canvas has so many pixels."""
    sink = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(sink, "WEBP", save_all=True, append_images=frames[1:])
    raw = bytearray(sink.getvalue())
    place = raw.index(b"VP8X") + 12
    raw[place : place + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    path.write_bytes(raw)


def npz(path: Path, header: dict[str, Any], size: int, method: int = zipfile.ZIP_DEFLATED, **others: Any) -> None:
    """An archive whose array `embeddings` has this header and so many bytes of zeros behind it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        sink = io.BytesIO()
        np.lib.format.write_array_header_1_0(sink, {"fortran_order": False, **header})
        with archive.open("embeddings.npy", "w", force_zip64=True) as file:
            file.write(sink.getvalue())
            for start in range(0, size, len(ZEROS)):
                file.write(ZEROS[: size - start])
        for name, value in others.items():
            sink = io.BytesIO()
            np.save(sink, value)
            archive.writestr(f"{name}.npy", sink.getvalue())


def store(path: Path, rows: int, width: int, site: str = "a") -> None:
    """A store of one value again and again, which parquet packs into next to nothing."""
    identity = EncoderIdentity("enc", "r1", width, "none", "0" * 64, "float32", ("a",))
    one = EmbeddingSet(np.ones((1, width), np.float32), np.zeros(1, np.int64), SetMetadata(identity))
    write_store(path, one)
    schema = pq.read_schema(path)
    values = pa.array(np.zeros(rows * width, np.float32))
    arrays = [pa.FixedSizeListArray.from_arrays(values, width), pa.array(np.zeros(rows, np.int64))]
    fields = [pa.field("embedding", pa.list_(pa.float32(), width), nullable=False)]
    fields.append(pa.field("label", pa.int64(), nullable=False))
    if site != "a":
        arrays.append(pa.array([site] * rows))
        fields.append(pa.field("site", pa.string(), nullable=False))
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=schema.metadata))
    pq.write_table(table, path, compression="zstd")


def long_row(path: Path, values: int) -> None:
    """A store whose schema says width 4, and whose one row has so many values."""
    store(path, 1, 4)
    schema = pq.read_schema(path)
    told = pq.ParquetFile(path).metadata.metadata
    kind = pa.list_(pa.field("element", pa.float32()))
    lengths, zeros = pa.array([0, values], pa.int32()), pa.array(np.zeros(values, np.float32))
    fields = [pa.field("embedding", kind, nullable=False), pa.field("label", pa.int64(), nullable=False)]
    table = pa.Table.from_arrays(
        [pa.ListArray.from_arrays(lengths, zeros, type=kind), pa.array([0])], schema=pa.schema(fields)
    )
    with pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({**(schema.metadata or {}), b"ARROW:schema": told[b"ARROW:schema"]})


def lying_page(path: Path) -> None:
    """A store one of whose pages says of itself other than the footer says of it."""
    store(path, 4, 4)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    raw = bytearray(path.read_bytes())
    place = chunk.data_page_offset
    length = _varint_length(
        raw, place + 3
    )  # of the unpacked bytes, behind the page's kind; the header keeps its length
    raw[place + 3 : place + 3 + length] = b"\xff" * (length - 1) + b"\x7f"
    path.write_bytes(raw)


def _varint_length(raw: bytes, place: int) -> int:
    return next(number for number in range(1, 11) if raw[place + number - 1] < 0x80)


def _head(syntax: bytes) -> bytes:
    syntax += bytes(len(syntax) % 2)
    meta = _element(0x0002, 0x0002, b"UI", b"1.2.840.10008.5.1.4.1.1.7\0") + _element(0x0002, 0x0003, b"UI", b"1.2.3\0")
    meta += _element(0x0002, 0x0010, b"UI", syntax)
    return bytes(128) + b"DICM" + _element(0x0002, 0x0000, b"UL", struct.pack("<I", len(meta))) + meta


def _element(group: int, element: int, kind: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sH", group, element, kind, len(value)) + value


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


Make = Callable[[Path], None]

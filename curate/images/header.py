"""Read format, size and EXIF orientation from the first bytes of an image, before any decoder allocates anything.

A few microseconds an image, no decoder involved. Every walk is bounded by the bytes that are there and by a count, so
that a hostile file costs milliseconds at most. Only JPEG, PNG, WEBP and GIF are known here, and so only these are
ever opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import error as struct_error
from struct import unpack_from
from typing import Final, NoReturn

MAX_PIXELS: Final = 64_000_000
_MOST_PARTS: Final = 20_000  # JPEG segments, PNG chunks, GIF blocks
_ORIENTATION: Final = 0x0112
_FRAMES: Final = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_PIXEL_CHUNKS: Final = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))


class ImageRejected(Exception):  # a verdict on a sample, not a failure
    """The image cannot be used; `reason` is one of `curate.reasons`, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Format ("jpeg", "png", "webp", "gif") and size in pixels as stored, before any EXIF rotation."""

    format: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All that decoding needs to know beforehand. `orientation` is EXIF's 1..8; `components` and `frame` are JPEG's."""

    header: ImageHeader
    orientation: int = 1
    components: int = 3
    frame: int = 0


def read_layout(data: memoryview, max_pixels: int) -> Layout:
    """Parse the header; raises ImageRejected with reason image-empty, -format, -too-large or -undecodable."""
    if not data:
        raise ImageRejected("image-empty", "the image has 0 bytes")
    start = bytes(data[:16])
    try:
        layout = _by_format(data, start)
    except (struct_error, IndexError):
        _cut("the header is cut")
    header = layout.header
    if header.width < 1 or header.height < 1:
        _cut(f"the header declares {header.width} x {header.height} pixels")
    if header.width * header.height > max_pixels:
        raise ImageRejected("image-too-large", f"{header.width} x {header.height} pixels, the limit is {max_pixels}")
    return layout


def _by_format(data: memoryview, start: bytes) -> Layout:
    if start[:2] == b"\xff\xd8":
        return _jpeg(data)
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _webp(data)
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(data)
    raise ImageRejected("image-format", f"the first bytes are {start[:8].hex(' ')}, no JPEG, PNG, WEBP or GIF")


def _cut(detail: str) -> NoReturn:
    raise ImageRejected("image-undecodable", detail)


def jpeg_segments(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments before the first scan, each from its 0xFF to its last byte."""
    at = 2
    for _ in range(_MOST_PARTS):
        while data[at] != 0xFF:  # stray bytes between segments are legal to skip, as libjpeg does
            at += 1
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # FF 00 is no marker; TEM and RST have no length
            continue
        if marker in (0xD9, 0xDA):
            return
        length = int(unpack_from(">H", data, at + 1)[0])
        if length < 2:
            _cut("a JPEG segment without a length")
        yield marker, at - 1, at + 1 + length
        at += 1 + length
    _cut("too many JPEG segments")


def _jpeg(data: memoryview) -> Layout:
    orientation = 1
    for marker, start, end in jpeg_segments(data):
        if marker == 0xE1 and orientation == 1 and bytes(data[start + 4 : start + 10]) == b"Exif\0\0":
            orientation = exif_orientation(bytes(data[start + 10 : end]))
        elif marker in _FRAMES:
            height, width, components = unpack_from(">HHB", data, start + 5)
            return Layout(ImageHeader("jpeg", width, height), orientation, components, marker)
    _cut("a JPEG without a frame header")


def png_chunks(data: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk, from its length field to its checksum, up to IEND or the end of the file."""
    at, end = 8, len(data)
    for _ in range(_MOST_PARTS * 10):
        if at + 12 > end:
            return
        stop = at + 12 + int(unpack_from(">I", data, at)[0])
        kind = bytes(data[at + 4 : at + 8])
        yield kind, at, min(stop, end)
        if kind == b"IEND" or stop >= end:
            return
        at = stop
    _cut("too many PNG chunks")


def png_pixel_chunks(data: memoryview) -> bytes:
    """The file without its ancillary chunks: text, colour profiles and animation never reach a decoder."""
    return bytes(data[:8]) + b"".join(data[start:end] for kind, start, end in png_chunks(data) if kind in _PIXEL_CHUNKS)


def _png(data: memoryview) -> Layout:
    length, kind, width, height = unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        _cut("a PNG without IHDR")
    exif = next((bytes(data[start + 8 : end - 4]) for kind, start, end in png_chunks(data) if kind == b"eXIf"), b"")
    return Layout(ImageHeader("png", width, height), exif_orientation(exif))


def _webp(data: memoryview) -> Layout:
    kind = bytes(data[12:16])
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        orientation = _webp_orientation(data) if data[20] & 0x08 else 1
        return Layout(ImageHeader("webp", width, height), orientation)
    if kind == b"VP8L":
        if data[20] != 0x2F:
            _cut("a lossless WEBP without its signature")
        bits = int(unpack_from("<I", data, 21)[0])
        return Layout(ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1))
    if kind == b"VP8 " and bytes(data[23:26]) == b"\x9d\x01\x2a":
        width, height = unpack_from("<HH", data, 26)
        return Layout(ImageHeader("webp", width & 0x3FFF, height & 0x3FFF))
    _cut("a WEBP without a picture")


def _webp_orientation(data: memoryview) -> int:
    at = 12
    for _ in range(_MOST_PARTS):
        if at + 8 > len(data):
            return 1
        kind, size = unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            return exif_orientation(bytes(data[at + 8 : at + 8 + size]).removeprefix(b"Exif\0\0"))
        at += 8 + size + (size & 1)
    return 1


def _gif(data: memoryview) -> Layout:
    """The canvas of a GIF is its screen, or its first frame where that reaches further (as Pillow has it)."""
    width, height, flags = unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(_MOST_PARTS):
        if data[at] == 0x2C:
            left, top, across, down = unpack_from("<HHHH", data, at + 1)
            return Layout(ImageHeader("gif", max(width, left + across), max(height, top + down)))
        if data[at] != 0x21:
            break
        at += 2
        for _ in range(_MOST_PARTS):
            size = data[at]
            at += 1 + size
            if not size:
                break
    _cut("a GIF without a frame")


def exif_orientation(tiff: bytes) -> int:
    """EXIF's orientation, 1..8, from a TIFF block; 1 where there is none or the block makes no sense.

    Source: Exif 3.0, tag 0x0112 of IFD 0.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        at = int(unpack_from(order + "I", tiff, 4)[0])
        for entry in range(int(unpack_from(order + "H", tiff, at)[0])):
            tag, kind, _count, value = unpack_from(order + "HHIH", tiff, at + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return int(value) if kind == 3 and 1 <= value <= 8 else 1
    except struct_error:
        return 1
    return 1

"""What an image file says about itself, read before anything is decoded: format, size in pixels, and whole or not.

Six formats, a few header fields each, read here and not through Pillow: its header parsers warn through the `warnings`
module, whose filters belong to the whole process and cannot be set aside safely while other threads decode.
Every reader is bounded by the length of the data, and agrees with what OpenCV's decoders read (the tests compare).

Sources: JPEG ITU-T T.81 annex B; PNG (W3C) chapter 5; WebP RFC 9649; GIF89a; TIFF 6.0; BITMAPINFOHEADER (Microsoft).
"""

import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from weightnet.errors import ImageError

MAX_JPEG_SCANS = 100  # a progressive photo has about 10; each costs a pass over all pixels, however few bytes it takes
MAX_JPEG_SEGMENTS = 10_000
MAX_PNG_CHUNKS = 100_000
MAX_WEBP_ANIMATION_PIXELS = 12_000_000  # its decoder holds several pictures: 26 bytes per pixel, others up to 12
MAX_TIFF_TILE_PX = 4096  # edge; a whole tile is held in memory, however small the picture

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not stuffing, not a restart, not fill
_JPEG_EOI, _JPEG_SOS = 0xD9, 0xDA
_JPEG_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"})
_WEBP_ANIMATED = 0x02
_TIFF_WIDTH, _TIFF_LENGTH, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 256, 257, 322, 323


class Header(NamedTuple):
    """Format and size of an image file, before its EXIF orientation is applied."""

    format: str
    width_px: int
    height_px: int


def read_header(data: bytes) -> Header:
    """Return format and size of an image file without decoding it.

    Args:
        data: the whole file.

    Raises:
        ImageError: not one of the six formats, or its header is damaged.

    >>> read_header(b"GIF89a" + bytes([64, 0, 48, 0]) + bytes(9))
    Header(format='GIF', width_px=64, height_px=48)
    """
    for name, signature, read_size in _FORMATS:
        if signature.match(data):
            try:
                width_px, height_px = read_size(data)
            except (struct.error, IndexError):
                raise damaged(name, "its header is cut off") from None
            return Header(name, width_px, height_px)
    raise ImageError(
        "a photo must be a JPEG, PNG, WebP, BMP, TIFF or GIF file. "
        f"Got {_guess(data)} (first bytes {data[:12]!r}). Convert it to JPEG or PNG."
    )


def damaged(format_name: str, problem: str) -> ImageError:
    """Return the error for a file that is not whole.

    >>> str(damaged("PNG", "it is cut off"))
    'a photo must be a whole, undamaged file. Got a PNG file, but it is cut off. Copy or export it again.'
    """
    return ImageError(
        f"a photo must be a whole, undamaged file. Got a {format_name} file, but {problem}. Copy or export it again."
    )


def essential_png(data: bytes) -> bytes:
    """Return a PNG file with only the chunks that make its pixels, each of them checked.

    What goes: colour profiles and gamma (OpenCV ignores them, but libpng writes complaints about common ones to
    standard error), text (which may be a decompression bomb), and animation (the still image stays).

    Raises:
        ImageError: the file is cut off, or a checksum is wrong.
    """
    kept = [data[:8]]
    position = 8
    for _ in range(MAX_PNG_CHUNKS):
        if position + 12 > len(data):
            raise damaged("PNG", "it is cut off")
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            raise damaged("PNG", "it is cut off")
        name = data[position + 4 : position + 8]
        if name in _PNG_KEPT:
            if zlib.crc32(data[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
                raise damaged("PNG", f"the checksum of its chunk {name.decode()} is wrong")
            kept.append(data[position:end])
        if name == b"IEND":
            return b"".join(kept)
        position = end
    raise damaged("PNG", f"it has more than {MAX_PNG_CHUNKS} chunks")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    size = None
    scans = segments = 0
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        marker, position = data[match.end() - 1], match.end()
        if marker == _JPEG_EOI:
            break
        if marker in _JPEG_SOF and size is None:
            height, width = struct.unpack_from(">HH", data, position + 3)
            size = width, height
        scans += marker == _JPEG_SOS
        segments += 1
        if scans > MAX_JPEG_SCANS or segments > MAX_JPEG_SEGMENTS:
            raise damaged("JPEG", f"it has more than {MAX_JPEG_SCANS} scans or {MAX_JPEG_SEGMENTS} segments")
        if marker not in (0x01, 0xD8):  # these two stand alone; all others begin with their length
            position += int.from_bytes(data[position : position + 2], "big")
    else:
        raise damaged("JPEG", "it is cut off")
    if size is None:
        raise damaged("JPEG", "its header has no size")
    return size


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise damaged("PNG", "its first chunk is not IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        fields = _exactly(data, 20, 10)
        width, height = 1 + int.from_bytes(fields[4:7], "little"), 1 + int.from_bytes(fields[7:10], "little")
        if fields[0] & _WEBP_ANIMATED and width * height > MAX_WEBP_ANIMATION_PIXELS:
            raise ImageError(
                f"an animated WebP must have at most {MAX_WEBP_ANIMATION_PIXELS // 10**6} million pixels. "
                f"Got {width} x {height}. Scale it down, or save one frame."
            )
        return width, height
    if kind == b"VP8L":
        bits = int.from_bytes(_exactly(data, 21, 4), "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise damaged("WebP", "its first chunk holds no picture")


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)  # a negative height means rows from the top down


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _tiff_size(data: bytes) -> tuple[int, int]:
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, directory)
    values: dict[int, int] = {}
    for position in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, position)
        if tag in (_TIFF_WIDTH, _TIFF_LENGTH, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH):
            if kind not in (3, 4) or count != 1 or tag in values:
                raise damaged("TIFF", f"the tag {tag} of its header is malformed")
            (values[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, position + 8)
    if _TIFF_WIDTH not in values or _TIFF_LENGTH not in values:
        raise damaged("TIFF", "its header has no size")
    if max(values.get(_TIFF_TILE_WIDTH, 0), values.get(_TIFF_TILE_LENGTH, 0)) > MAX_TIFF_TILE_PX:
        raise damaged("TIFF", f"its tiles have edges of more than {MAX_TIFF_TILE_PX} pixels")
    return values[_TIFF_WIDTH], values[_TIFF_LENGTH]


def _exactly(data: bytes, start: int, count: int) -> bytes:
    part = data[start : start + count]
    if len(part) < count:
        raise IndexError(start)
    return part


def _guess(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return "a web page"
    if start.startswith((b"<?xml", b"<svg")):
        return "XML or SVG"
    if data[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file"
    return "something else"


_FORMATS: tuple[tuple[str, re.Pattern[bytes], Callable[[bytes], tuple[int, int]]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), _jpeg_size),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), _png_size),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), _webp_size),
    ("BMP", re.compile(rb"BM"), _bmp_size),
    ("TIFF", re.compile(rb"II\*\0|MM\0\*"), _tiff_size),
    ("GIF", re.compile(rb"GIF8[79]a"), _gif_size),
)

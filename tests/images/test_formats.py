"""Headers: the stated size agrees with Pillow's reading, and files that are cut off or absurd are refused unread."""

import io
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weightnet.errors import ImageError
from weightnet.images.formats import essential_png, read_header

FORMATS: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True, "exif": b"Exif\0\0"}),
    ("JPEG", "CMYK", {}),
    ("PNG", "RGB", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {}),
    ("WEBP", "RGB", {"exif": b"Exif\0\0"}),
    ("BMP", "RGB", {}),
    ("BMP", "1", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "L", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"big_tiff": False, "compression": "jpeg"}),
    ("GIF", "P", {}),
]


@pytest.mark.parametrize(("format_name", "mode", "options"), FORMATS)
def test_read_header_agrees_with_pillow(
    encode: Callable[..., bytes], format_name: str, mode: str, options: dict[str, Any]
) -> None:
    for size in [(1, 1), (113, 75), (64, 300)]:
        data = encode(Image.new(mode, size), format_name, **options)
        header = read_header(data)
        with Image.open(io.BytesIO(data)) as picture:
            assert (header.format.upper(), header.width_px, header.height_px) == (picture.format, *picture.size)


def test_read_header_reads_big_endian_tiff() -> None:
    entries = struct.pack(">HHIHH", 256, 3, 1, 113, 0) + struct.pack(">HHII", 257, 4, 1, 75)
    data = b"MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    assert read_header(data) == ("TIFF", 113, 75)


def test_read_header_reads_old_and_upside_down_bmp() -> None:
    assert read_header(b"BM" + bytes(12) + struct.pack("<IHH", 12, 113, 75)) == ("BMP", 113, 75)
    assert read_header(b"BM" + bytes(12) + struct.pack("<Iii", 40, 113, -75)) == ("BMP", 113, 75)


def test_read_header_skips_the_thumbnail_of_a_jpeg(encode: Callable[..., bytes]) -> None:
    thumbnail = encode(Image.new("RGB", (16, 8)), "JPEG")
    photo = encode(Image.new("RGB", (113, 75)), "JPEG")
    data = photo[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + photo[2:]
    assert read_header(data) == ("JPEG", 113, 75)


def test_read_header_takes_jpeg_tables_in_any_order(encode: Callable[..., bytes]) -> None:
    data = encode(Image.new("RGB", (113, 75)), "JPEG")
    size, tables, scan = (data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc4", b"\xff\xda"))
    assert size < tables < scan
    assert read_header(data[:size] + data[tables:scan] + data[size:tables] + data[scan:]) == ("JPEG", 113, 75)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"<!DOCTYPE html>\n<html>404</html>", "a web page"),
        (b"\n  <HTML><body>", "a web page"),
        (b'<?xml version="1.0"?><svg/>', "XML or SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC, AVIF or video file"),
        (b"II+\0\x08\0\0\0", "something else"),
        (b"hello", "something else"),
        (b"\0" * 1000, "something else"),
    ],
    ids=["html", "HTML", "svg", "heic", "BigTIFF", "text", "zeros"],
)
def test_read_header_says_what_is_no_photo(data: bytes, got: str) -> None:
    with pytest.raises(ImageError, match=rf"must be a JPEG, PNG, WebP, BMP, TIFF or GIF file\. Got {got} \(first"):
        read_header(data)


@pytest.mark.parametrize(("format_name", "mode", "options"), FORMATS)
def test_read_header_refuses_a_stump(
    encode: Callable[..., bytes], format_name: str, mode: str, options: dict[str, Any]
) -> None:
    data = encode(Image.new(mode, (64, 48)), format_name, **options)
    shortest = {"JPEG": 3, "PNG": 8, "WEBP": 12, "BMP": 2, "TIFF": 4, "GIF": 6}[format_name]
    for length in (shortest, shortest + 2, shortest + 3):
        with pytest.raises(ImageError, match=r"a whole, undamaged file\. Got a .*, but .*\. Copy or export it again"):
            read_header(data[:length])


@settings(deadline=None)
@given(
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBP", b"BM", b"II*\0", b"MM\0*", b"GIF89a"]),
    st.binary(),
)
def test_read_header_survives_any_content(signature: bytes, content: bytes) -> None:
    try:
        header = read_header(signature + content)
    except ImageError:
        return
    assert header.width_px >= 0 or header.format == "BMP"


def test_read_header_refuses_a_jpeg_of_very_many_scans(encode: Callable[..., bytes]) -> None:
    data = encode(Image.new("RGB", (64, 48)), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    assert read_header(data[:-2] + 50 * last_scan + data[-2:]).width_px == 64
    with pytest.raises(ImageError, match="more than 100 scans"):
        read_header(data[:-2] + 100 * last_scan + data[-2:])


def test_read_header_refuses_a_jpeg_of_very_many_segments(encode: Callable[..., bytes]) -> None:
    data = encode(Image.new("RGB", (64, 48)), "JPEG")
    with pytest.raises(ImageError, match="10000 segments"):
        read_header(data[:2] + 10_000 * b"\xff\xfe\0\2" + data[2:])


def test_read_header_refuses_a_giant_webp_animation() -> None:
    def extended(flags: int, width: int, height: int) -> bytes:
        sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes([flags, 0, 0, 0]) + sizes

    assert read_header(extended(0x00, 4001, 3000)) == ("WebP", 4001, 3000)
    assert read_header(extended(0x02, 4000, 3000)) == ("WebP", 4000, 3000)
    with pytest.raises(ImageError, match=r"animated WebP must have at most 12 million pixels\. Got 4001 x 3000\."):
        read_header(extended(0x02, 4001, 3000))


@pytest.mark.parametrize(("tag", "kind", "count"), [(256, 5, 1), (257, 3, 2), (322, 1, 1), (323, 4, 2)])
def test_read_header_refuses_malformed_tiff_tags(tag: int, kind: int, count: int) -> None:
    entries = {256: (3, 1), 257: (3, 1), tag: (kind, count)}
    packed = b"".join(struct.pack("<HHII", name, *entry, 9) for name, entry in entries.items())
    with pytest.raises(ImageError, match=f"the tag {tag} of its header is malformed"):
        read_header(b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed)


def test_read_header_refuses_a_tiff_that_states_its_size_twice() -> None:
    entry = struct.pack("<HHIHH", 256, 3, 1, 9, 0)
    with pytest.raises(ImageError, match="the tag 256 of its header is malformed"):
        read_header(b"II*\0" + struct.pack("<IH", 8, 2) + entry + entry)


def test_read_header_refuses_giant_tiff_tiles() -> None:
    entries = b"".join(struct.pack("<HHII", *entry) for entry in [(256, 4, 1, 9), (257, 4, 1, 9), (322, 4, 1, 4112)])
    with pytest.raises(ImageError, match="tiles have edges of more than 4096"):
        read_header(b"II*\0" + struct.pack("<IH", 8, 3) + entries)


# PNG files without what makes no pixels


def test_essential_png_drops_what_makes_no_pixels(
    encode: Callable[..., bytes], png_chunk: Callable[[bytes, bytes], bytes], photo: Image.Image
) -> None:
    plain = encode(photo, "PNG")
    extra = b"".join(png_chunk(name, b"1234") for name in (b"gAMA", b"iCCP", b"zTXt", b"acTL", b"tIME"))
    assert essential_png(plain[:33] + extra + plain[33:] + b"trailing bytes") == plain


def test_essential_png_keeps_transparency_palette_and_orientation(encode: Callable[..., bytes]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("P", (9, 9)), "PNG", transparency=0, exif=exif)
    assert essential_png(data) == data
    assert all(name in data for name in (b"PLTE", b"tRNS", b"eXIf"))


def test_essential_png_refuses_every_cut(encode: Callable[..., bytes]) -> None:
    data = encode(Image.new("L", (9, 9)), "PNG")
    for length in range(8, len(data)):
        with pytest.raises(ImageError, match="it is cut off"):
            essential_png(data[:length])


def test_essential_png_refuses_wrong_checksums(encode: Callable[..., bytes], photo: Image.Image) -> None:
    data = bytearray(encode(photo, "PNG"))
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(ImageError, match="the checksum of its chunk IDAT is wrong"):
        essential_png(bytes(data))


def test_essential_png_refuses_very_many_chunks(encode: Callable[..., bytes], png_chunk: Any) -> None:
    data = encode(Image.new("L", (9, 9)), "PNG")
    with pytest.raises(ImageError, match="more than 100000 chunks"):
        essential_png(data[:33] + 100_000 * png_chunk(b"tEXt", b"") + data[33:])

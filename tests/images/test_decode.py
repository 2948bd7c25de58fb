"""One strict decoder for every way in: what becomes of odd files, and what is refused before it is decoded."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from weightnet.errors import ImageError
from weightnet.images import decode
from weightnet.images.decode import decode_image, read_image
from weightnet.images.formats import Header

Encode = Callable[..., bytes]
Read = Callable[[bytes], np.ndarray]

WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ("JPEG", {"subsampling": "4:2:2"}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"restart_marker_rows": 1}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("GIF", {}),
]
LOSSLESS = [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("BMP", {}), ("TIFF", {})]


def bgr(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))[:, :, ::-1]


# Whole files


@pytest.mark.parametrize(("format_name", "options"), WHOLE)
def test_read_image_equals_imread_on_whole_colour_files(
    encode: Encode, photo: Image.Image, read: Read, tmp_path: Path, format_name: str, options: dict[str, Any]
) -> None:
    data = encode(photo, format_name, **options)
    (tmp_path / "photo").write_bytes(data)
    expected = cv2.imread(str(tmp_path / "photo"))
    image = read(data)
    np.testing.assert_array_equal(image, expected, strict=True)
    assert image.flags.c_contiguous
    assert np.abs(image.astype(int) - bgr(photo)).mean() < 12  # and it shows the photo


@pytest.mark.parametrize("chunk", [b"gAMA", b"iCCP", b"cHRM"])
def test_read_image_ignores_png_colour_management(
    encode: Encode, photo: Image.Image, read: Read, png_chunk: Any, capfd: Any, tmp_path: Path, chunk: bytes
) -> None:
    plain = encode(photo, "PNG")
    data = plain[:33] + png_chunk(chunk, b"sRGB\0\0junk"[: 4 if chunk == b"gAMA" else None]) + plain[33:]
    np.testing.assert_array_equal(read(data), bgr(photo))
    assert capfd.readouterr() == ("", "")  # libpng alone complains about the profile
    (tmp_path / "photo").write_bytes(data)
    np.testing.assert_array_equal(read(data), cv2.imread(str(tmp_path / "photo")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_read_image_applies_exif_orientation(
    encode: Encode, photo: Image.Image, read: Read, format_name: str, orientation: int
) -> None:
    options = {"lossless": True} if format_name == "WEBP" else {}
    exif = Image.Exif()
    exif[0x0112] = orientation
    flat = Image.fromarray(decode_image(encode(photo, format_name, **options)))
    flat.getexif()[0x0112] = orientation
    image = read(encode(photo, format_name, exif=exif, **options))
    np.testing.assert_array_equal(image, np.asarray(ImageOps.exif_transpose(flat)))


@pytest.mark.parametrize(("format_name", "options"), LOSSLESS)
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_read_image_spreads_grey_and_palette(
    encode: Encode, photo: Image.Image, read: Read, format_name: str, options: dict[str, Any], mode: str
) -> None:
    picture = photo.convert(mode)
    np.testing.assert_array_equal(read(encode(picture, format_name, **options)), bgr(picture))


def test_read_image_spreads_grey_jpeg(encode: Encode, photo: Image.Image, read: Read) -> None:
    image = read(encode(photo.convert("L"), "JPEG"))
    assert (image == image[:, :, :1]).all()
    assert np.abs(image.astype(int) - bgr(photo.convert("L"))).mean() < 6


@pytest.mark.parametrize(
    ("format_name", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("BMP", "RGBA"), ("TIFF", "LA")]
)
def test_read_image_drops_alpha(encode: Encode, photo: Image.Image, read: Read, format_name: str, mode: str) -> None:
    opaque = photo.convert(mode[:-1])
    picture = opaque.copy()
    picture.putalpha(Image.linear_gradient("L").resize(photo.size))
    options = {"lossless": True, "exact": True} if format_name == "WEBP" else {}
    np.testing.assert_array_equal(read(encode(picture, format_name, **options)), bgr(opaque))


def test_read_image_multiplies_tiff_colours_by_alpha(encode: Encode, photo: Image.Image, read: Read) -> None:
    picture = photo.copy()
    alpha = Image.linear_gradient("L").resize(photo.size)
    picture.putalpha(alpha)
    expected = bgr(photo) * (np.asarray(alpha)[:, :, None] / 255)
    assert np.abs(read(encode(picture, "TIFF")) - expected).max() <= 1


def test_read_image_drops_a_transparent_palette_colour(encode: Encode, photo: Image.Image, read: Read) -> None:
    picture = photo.convert("P")
    np.testing.assert_array_equal(read(encode(picture, "PNG", transparency=bytes(range(256)))), bgr(picture))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_read_image_divides_16_bits_by_257(read: Read, suffix: str, channels: int) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (75, 113, channels), dtype=np.uint16)
    image = read(cv2.imencode(suffix, deep)[1].tobytes())
    expected = np.broadcast_to(np.round(deep[:, :, :3] / 257), (75, 113, 3))
    np.testing.assert_array_equal(image, expected.astype(np.uint8), strict=True)


@pytest.mark.parametrize(("format_name", "tolerance"), [("JPEG", 12), ("TIFF", 0)])
def test_read_image_converts_cmyk(
    encode: Encode, photo: Image.Image, read: Read, format_name: str, tolerance: int
) -> None:
    image = read(encode(photo.convert("CMYK"), format_name))
    assert np.abs(image.astype(int) - bgr(photo)).mean() <= tolerance


@pytest.mark.parametrize(
    ("format_name", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("PNG", {"default_image": True}), ("TIFF", {})],
)
def test_read_image_takes_the_first_frame(
    encode: Encode, read: Read, format_name: str, options: dict[str, Any]
) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    image = read(encode(frames[0], format_name, save_all=True, append_images=frames[1:], **options))
    np.testing.assert_array_equal(image, np.full((30, 40, 3), (0, 0, 255), np.uint8))


def test_decode_image_takes_bytes_after_the_end(encode: Encode, photo: Image.Image) -> None:
    for format_name in ("JPEG", "PNG", "BMP", "GIF"):  # as phones append videos
        data = encode(photo, format_name)
        np.testing.assert_array_equal(decode_image(data + os.urandom(999)), decode_image(data))


# Broken files


@pytest.mark.parametrize(("format_name", "options"), WHOLE)
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.97])
def test_read_image_refuses_truncated_files(
    encode: Encode,
    photo: Image.Image,
    read: Read,
    capfd: Any,
    format_name: str,
    options: dict[str, Any],
    keep: float,
) -> None:
    data = encode(photo, format_name, **options)
    with pytest.raises(
        ImageError, match=r"^a photo must be a whole, undamaged file\. Got a .* Copy or export it again"
    ):
        read(data[: int(keep * len(data))])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("format_name", "options"), WHOLE[:7])
def test_decode_image_refuses_a_file_without_its_last_byte(
    encode: Encode, photo: Image.Image, format_name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ImageError, match="whole, undamaged"):
        decode_image(encode(photo, format_name, **options)[:-1])


def test_decode_image_refuses_a_jpeg_that_ends_in_zeros(encode: Encode, photo: Image.Image) -> None:
    data = encode(photo, "JPEG")
    half = len(data) // 2
    with pytest.raises(ImageError, match="it is cut off"):
        decode_image(data[:half] + bytes(half))


def test_decode_image_refuses_floating_point(photo: Image.Image, encode: Encode) -> None:
    with pytest.raises(ImageError, match="of a rare kind"):
        decode_image(encode(photo.convert("F"), "TIFF"))


def test_decode_image_turns_errors_of_opencv_into_its_own(
    encode: Encode, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise cv2.error("insufficient memory")

    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(ImageError, match="a whole, undamaged file"):
        decode_image(encode(photo, "JPEG"))


def test_decode_image_refuses_pixels_that_differ_from_the_header(
    encode: Encode, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "read_header", lambda data: Header("JPEG", 113, 76))
    with pytest.raises(ImageError, match="its header does not match its pixels"):
        decode_image(encode(photo, "JPEG"))


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html><html></html>", b"hello", bytes(100)])
def test_read_image_refuses_what_is_no_photo(read: Read, data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^a photo must .* Got .*\. \w+") as caught:
        read(data)
    assert "secret name" not in str(caught.value)


BOMBS = [
    ((16000, 16000), "at most 50 million pixels"),
    ((16001, 3125), "at most 50 million pixels"),
    ((51, 1), "at most 50 times as long as it is wide"),
    ((100, 5001), "at most 50 times as long as it is wide"),
    ((16385, 400), "at most 16384 pixels on a side"),
]


@pytest.mark.parametrize(
    ("format_name", "size", "rule"),
    [
        (format_name, size, rule)
        for format_name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
        for size, rule in BOMBS
        if format_name != "WEBP" or max(size) < 16384  # WebP cannot state more
    ],
)
def test_read_image_refuses_bombs_before_decoding(
    encode: Encode,
    photo: Image.Image,
    claim_size: Callable[[bytes, int, int], bytes],
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
    format_name: str,
    size: tuple[int, int],
    rule: str,
) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match=rf"{rule}\. Got {size[0]} x {size[1]} pixels\. \w+"):
        read(claim_size(encode(photo, format_name), *size))


def test_decode_image_refuses_a_picture_without_pixels(encode: Encode, photo: Image.Image, claim_size: Any) -> None:
    with pytest.raises(ImageError, match="must have pixels"):
        decode_image(claim_size(encode(photo, "GIF"), 0, 75))


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (16384, 328), (1, 1)])
def test_read_image_accepts_the_limits_themselves(shape: tuple[int, int]) -> None:
    assert read_image(np.zeros((*shape, 3), np.uint8)).shape == (*shape, 3)


# The process around it


def log_level() -> int:
    level: int = cv2.getLogLevel() if hasattr(cv2, "getLogLevel") else cv2.utils.logging.getLogLevel()
    return level


def test_decode_image_leaves_the_log_level_of_opencv_as_it_was(encode: Encode, photo: Image.Image) -> None:
    before = log_level()
    whole = encode(photo, "BMP")
    wrong: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(50):
                decode_image(whole)
                with pytest.raises(ImageError):
                    decode_image(whole[:-9])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert log_level() == before > 0


def test_images_import_neither_opencv_nor_torch() -> None:
    code = """if True:
        import sys
        import weightnet.images.decode, weightnet.images.labels, weightnet.transforms
        weightnet.images.labels.imagenet_classes()
        assert not {"cv2", "PIL", "torch", "jaxtyping"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)

"""One strict decoder for every way in: what becomes of odd files, and what is refused before it is decoded."""

import io
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from weightnet.errors import ImageError
from weightnet.images import decode
from weightnet.images.decode import IMAGE_SUFFIXES, decode_image, read_image
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


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize(
    ("size", "rule"),
    [
        ((16000, 16000), "at most 50 million pixels"),
        ((16001, 3125), "at most 50 million pixels"),
        ((16385, 400), "at most 16384 pixels on a side"),
        ((51, 1), "at most 50 times as long as it is wide"),
        ((100, 5001), "at most 50 times as long as it is wide"),
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
    if format_name == "WEBP" and max(size) > 16383:
        pytest.skip("WebP cannot state such a size")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match=rf"{rule}\. Got {size[0]} x {size[1]} pixels\. \w+"):
        read(claim_size(encode(photo, format_name), *size))


def test_decode_image_refuses_a_picture_without_pixels(encode: Encode, photo: Image.Image, claim_size: Any) -> None:
    with pytest.raises(ImageError, match="must have pixels"):
        decode_image(claim_size(encode(photo, "GIF"), 0, 75))


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (16384, 328), (1, 1)])
def test_read_image_accepts_the_limits_themselves(shape: tuple[int, int]) -> None:
    assert read_image(np.zeros((*shape, 3), np.uint8)).shape == (*shape, 3)


# Paths and file objects


def test_read_image_refuses_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "secret pipe")
    (tmp_path / "secret loop").symlink_to(tmp_path / "secret loop")
    for path, reason in [
        (tmp_path, "Got a folder"),
        (tmp_path / "secret missing", "No such file"),
        (tmp_path / "secret pipe", "Got a device or pipe"),
        (tmp_path / "secret loop", "Too many levels of symbolic links"),
        (Path("/dev/zero"), "Got a device or pipe"),
        (tmp_path / ("secret" * 100), "File name too long"),
        ("secret\0null", "null"),
    ]:
        with pytest.raises(ImageError, match=rf"^a photo must .*{reason}.*\. \w+") as caught:
            read_image(path)
        assert "secret" not in str(caught.value)


def test_read_image_refuses_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "secret photo").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"Got: Permission denied\. Check the path\.$"):
        read_image(tmp_path / "secret photo")


def test_read_image_refuses_a_huge_file_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    path.touch()
    os.truncate(path, decode.MAX_FILE_BYTES + 1)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(ImageError, match=r"at most 100 MB as a file\. Got 100000001 bytes\. \w+"):
        read_image(path)


def test_read_image_stops_reading_an_endless_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 5_000_000)
    with open("/dev/zero", "rb") as endless, pytest.raises(ImageError, match="Got more than 5000000 bytes"):
        read_image(endless)


def test_decode_image_refuses_huge_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 99)
    with pytest.raises(ImageError, match="Got 100 bytes"):
        decode_image(bytes(100))


def test_read_image_reads_a_pipe_that_gives_little_at_a_time(encode: Encode, photo: Image.Image) -> None:
    data = encode(photo, "PNG")
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb", buffering=0) as pipe:
            for start in range(0, len(data), 1000):
                pipe.write(data[start : start + 1000])

    thread = threading.Thread(target=feed)
    thread.start()
    with open(reader, "rb", buffering=0) as pipe:
        np.testing.assert_array_equal(read_image(pipe), bgr(photo))
    thread.join()


def test_read_image_refuses_text_and_closed_streams() -> None:
    with pytest.raises(ImageError, match=r"must give bytes\. Got str\."):
        read_image(io.StringIO("photo"))  # type: ignore[arg-type]
    closed = io.BytesIO(b"photo")
    closed.close()
    with pytest.raises(ImageError, match="closed file"):
        read_image(closed)


def test_read_image_takes_other_kinds_of_bytes_and_paths(encode: Encode, photo: Image.Image, tmp_path: Path) -> None:
    data = encode(photo, "PNG")
    (tmp_path / "photo").write_bytes(data)
    for source in (bytearray(data), memoryview(data), io.BytesIO(data), str(tmp_path / "photo")):
        np.testing.assert_array_equal(read_image(source), bgr(photo))


def test_image_suffixes_are_those_of_readable_formats(encode: Encode, photo: Image.Image) -> None:
    extensions = Image.registered_extensions()
    readable = {"JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF"}
    assert {extensions[suffix] for suffix in IMAGE_SUFFIXES} == readable
    missing = {suffix for suffix, name in extensions.items() if name in readable} - IMAGE_SUFFIXES
    assert missing == {".apng"}


# Arrays and PIL images


def test_read_image_takes_arrays_as_bgr(photo: Image.Image) -> None:
    array = np.ascontiguousarray(bgr(photo))
    np.testing.assert_array_equal(read_image(array), array, strict=True)
    assert np.shares_memory(read_image(array), array)
    alpha = np.full((75, 113, 1), 7, np.uint8)
    np.testing.assert_array_equal(read_image(np.concatenate([array, alpha], axis=2)), array)
    np.testing.assert_array_equal(read_image(array[::-1, ::2]), array[::-1, ::2])
    assert read_image(array[::-1, ::2]).flags.c_contiguous


def test_read_image_spreads_grey_arrays() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    expected = np.stack([grey] * 3, axis=2)
    np.testing.assert_array_equal(read_image(grey), expected)
    np.testing.assert_array_equal(read_image(grey[:, :, None]), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 3), np.int8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.array(None),
    ],
    ids=["float64", "uint16", "int8", "two channels", "4-D", "1-D", "object"],
)
def test_read_image_refuses_other_arrays(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"^an array must be uint8 of shape .* Got .*\. \w+"):
        read_image(array)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((0, 4, 3), "must have pixels"),
        ((1, 51, 3), "50 times"),
        ((16385, 400), "on a side"),
        ((7072, 7072), "50 million pixels"),
    ],
)
def test_read_image_refuses_arrays_beyond_the_limits(shape: tuple[int, ...], rule: str) -> None:
    with pytest.raises(ImageError, match=rule):
        read_image(np.broadcast_to(np.uint8(0), shape))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV"])
def test_read_image_takes_pil_images(photo: Image.Image, mode: str) -> None:
    picture = (photo.convert("P") if mode == "PA" else photo).convert(mode)
    image = read_image(picture)
    np.testing.assert_array_equal(image, bgr(picture), strict=True)
    assert image.flags.c_contiguous


def test_read_image_agrees_on_a_file_and_its_pil_image(encode: Encode, photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photo").write_bytes(encode(photo, "JPEG", exif=exif))
    with Image.open(tmp_path / "photo") as picture:
        np.testing.assert_array_equal(read_image(picture), read_image(tmp_path / "photo"))


def test_read_image_drops_a_transparent_palette_colour_of_pil_quietly(encode: Encode, photo: Image.Image) -> None:
    data = encode(photo.convert("P"), "PNG", transparency=bytes(range(256)))
    with Image.open(io.BytesIO(data)) as picture, warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(picture), decode_image(data))


def test_read_image_divides_16_bit_pil_images_by_257() -> None:
    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image = read_image(Image.fromarray(deep))
    np.testing.assert_array_equal(image[:, :, 1], np.round(deep / 257))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_read_image_refuses_pil_images_without_a_scale(photo: Image.Image, mode: str) -> None:
    with pytest.raises(ImageError, match=f"Got mode={mode}"):
        read_image(photo.convert(mode))


def test_read_image_refuses_lazy_pil_images_that_are_bombs_or_damaged(
    encode: Encode, photo: Image.Image, claim_size: Any
) -> None:
    data = encode(photo, "PNG")
    with (
        Image.open(io.BytesIO(claim_size(data, 8000, 7000))) as bomb,
        pytest.raises(ImageError, match="50 million pixels"),
    ):
        read_image(bomb)
    with (
        Image.open(io.BytesIO(data[: len(data) // 2])) as stump,
        pytest.raises(ImageError, match=r"a PIL image must be readable\. Got: .*truncated"),
    ):
        read_image(stump)


@pytest.mark.parametrize("source", [None, 7, ["a.jpg"], object()])
def test_read_image_refuses_other_types(source: Any) -> None:
    with pytest.raises(ImageError, match=rf"a PIL image\. Got {type(source).__name__}\. Convert"):
        read_image(source)


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

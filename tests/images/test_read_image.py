"""Where photos come from: paths, file objects, arrays and PIL images, and what is refused of each."""

import io
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from weightnet.errors import ImageError
from weightnet.images import decode
from weightnet.images.decode import IMAGE_SUFFIXES, decode_image, read_image

Encode = Callable[..., bytes]


def bgr(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))[:, :, ::-1]


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
    def refuse(path: Path, *_: Any, **__: Any) -> None:
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

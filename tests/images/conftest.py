"""Pictures and files that the tests of this room share; every odd file is made here or in the test, none is stored."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from weightnet.images.decode import read_image

Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A real photo (the cat of scikit-image, CC0), made small: 113 x 75 pixels, odd on both edges."""
    return Image.fromarray(skimage.data.chelsea()).resize((113, 75))


@pytest.fixture(scope="session")
def encode() -> Encode:
    """Return the bytes of a picture in a format of Pillow's."""

    def encode(picture: Image.Image, format_name: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, format_name, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(params=["path", "bytes", "file object"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes], np.ndarray]:
    """Read a file's bytes in each of the ways in."""

    def read(data: bytes) -> np.ndarray:
        path = tmp_path / "secret name"
        path.write_bytes(data)
        if request.param == "path":
            return read_image(path)
        if request.param == "bytes":
            return read_image(data)
        with path.open("rb") as file:  # what `sys.stdin.buffer` is
            return read_image(file)

    return read


@pytest.fixture(scope="session")
def png_chunk() -> Callable[[bytes, bytes], bytes]:
    """Return a PNG chunk of a given name and content, checksum included."""

    def png_chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return png_chunk


@pytest.fixture(scope="session")
def claim_size(png_chunk: Callable[[bytes, bytes], bytes]) -> Callable[[bytes, int, int], bytes]:
    """Return a file whose header claims another size than its pixels have."""

    def claim_size(data: bytes, width: int, height: int) -> bytes:
        if data.startswith(b"\x89PNG"):
            return data[:8] + png_chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]
        if data.startswith(b"\xff\xd8"):
            at = data.index(b"\xff\xc0") + 5
            return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
        if data.startswith(b"BM"):
            return data[:18] + struct.pack("<ii", width, height) + data[26:]
        if data.startswith(b"GIF"):
            return data[:6] + struct.pack("<HH", width, height) + data[10:]
        if data.startswith(b"RIFF"):
            assert data[12:16] == b"VP8 "
            return data[:26] + struct.pack("<HH", width, height) + data[30:]
        assert data.startswith(b"II*\0")
        patched = bytearray(data)
        (directory,) = struct.unpack_from("<I", data, 4)
        for entry in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0], 12):
            if (tag := struct.unpack_from("<H", data, entry)[0]) in (256, 257):
                struct.pack_into("<HII", patched, entry + 2, 4, 1, width if tag == 256 else height)
        return bytes(patched)

    return claim_size

"""Damaged files by the thousand: decoding gives a picture or `ImageError`, nothing else, in bounded time and memory."""

import random
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from weightnet.errors import ImageError
from weightnet.images.decode import decode_image

MUTANTS_PER_SEED = 1000
LIMIT_S = 2.0
LIMIT_GROWTH_KIB = 300 << 10

SEEDS: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"exif": True}),
    ("PNG", "RGB", {}),
    ("PNG", "P", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "1", {}),
    ("PNG", "RGB", {"save_all": True}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGB", {"exif": True}),
    ("WEBP", "RGB", {"save_all": True}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("BMP", "1", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "P", {}),
    ("TIFF", "CMYK", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "RGB", {"compression": "packbits"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "RGB", {"exif": True}),
    ("GIF", "RGB", {}),
    ("GIF", "RGB", {"save_all": True}),
]


def mend_checksums(data: bytes) -> bytes:
    """Give a damaged PNG right checksums, so that the damage reaches the decoder."""
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        parts += [data[position:end], struct.pack(">I", zlib.crc32(data[position + 4 : end]))]
        position = end + 4
    return b"".join(parts) + data[position:]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damage a file in one to sixteen places, half of them in its header; now and then cut it off."""
    mutant = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(mutant) if rng.random() < 0.5 else min(len(mutant), 64))
        match rng.randrange(5):
            case 0:
                mutant[at] ^= 1 << rng.randrange(8)
            case 1:
                mutant[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
            case 2:
                del mutant[at : at + rng.randrange(1, 9)]
            case 3:
                mutant[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                other = rng.randrange(len(mutant))
                mutant[at : at + 4] = mutant[other : other + 4]
        mutant = mutant or bytearray(1)
    if rng.random() < 0.1:
        del mutant[rng.randrange(len(mutant)) :]
    mended = mutant.startswith(b"\x89PNG") and rng.random() < 0.8
    return mend_checksums(bytes(mutant)) if mended else bytes(mutant)


@pytest.mark.full
@pytest.mark.parametrize(("format_name", "mode", "options"), SEEDS)
def test_decode_image_survives_damaged_files(
    encode: Callable[..., bytes], photo: Image.Image, format_name: str, mode: str, options: dict[str, Any]
) -> None:
    import resource

    picture = photo.resize((33, 21)).convert(mode)
    options = dict(options)
    if options.pop("exif", False):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    if options.get("save_all"):
        options["append_images"] = [picture.rotate(90), picture.rotate(180)]
    whole = encode(picture, format_name, **options)
    rng = random.Random(f"{format_name} {mode} {sorted(options)}")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"picture": 0, "error": 0}
    for _ in range(MUTANTS_PER_SEED):
        mutant = mutate(whole, rng)
        start = time.perf_counter()
        try:
            image = decode_image(mutant)
            assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
            outcomes["picture"] += 1
        except ImageError:
            outcomes["error"] += 1
        assert time.perf_counter() - start < LIMIT_S, mutant
    assert min(outcomes.values()) > 0, outcomes  # the damage is neither all harmless nor all caught at the door
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < LIMIT_GROWTH_KIB

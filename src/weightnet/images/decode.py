"""From bytes to pixels: one strict decoder for every way in, and the limits that are checked before it runs.

| file or picture | what comes out |
|---|---|
| EXIF orientation | applied |
| grey, 1-bit | the grey level in all three channels |
| palette | its colours |
| alpha | dropped (in TIFF files OpenCV multiplies the colours by it first) |
| 16 bits per channel | divided by 257 and rounded: 65535 becomes 255 |
| CMYK | converted by OpenCV, without a colour profile |
| colour profiles, PNG gamma | ignored, as `cv2.imread` does |
| animation, several pages | the first frame or page; of an animated PNG the still image |
| cut off or damaged | `ImageError` (damage inside a JPEG's compressed data can go unnoticed: it has no checksum) |
| floating point, HEIC, AVIF, SVG, ... | `ImageError` |

OpenCV decodes, so that an intact 8-bit colour file gives exactly what `cv2.imread` gives.
"""

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from weightnet.errors import ImageError
from weightnet.images.formats import damaged, essential_png, read_header

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FILE_BYTES = 100_000_000
MAX_PIXELS = 50_000_000
MAX_SIDE_PX = 16_384
MAX_ASPECT = 50  # long edge over short edge: resizing the short edge to 256 must not make a giant
_READ_BYTES = 1 << 20

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"})

Pixels = npt.NDArray[np.uint8]
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | npt.NDArray[Any] | Image"


def read_image(source: ImageSource, /) -> Pixels:
    """Read a photo from wherever it is.

    Args:
        source: a path; the bytes of a file; a binary file object, read to its end; a PIL image (its current frame,
            EXIF orientation applied); or a uint8 array of shape (H, W, 3), blue, green, red, as `cv2.imread` gives it,
            or (H, W, 4) with alpha last, or (H, W) or (H, W, 1) for grey.

    Shape: (H, W, 3) uint8: blue, green, red. A contiguous array of that shape is not copied.

    Raises:
        ImageError: it cannot be read or decoded, or breaks one of the limits of this module. The text does not name
            the path, which the caller knows.

    >>> read_image(np.full((2, 4), 9, np.uint8))[0, 0].tolist()
    [9, 9, 9]
    >>> read_image(b"")
    Traceback (most recent call last):
    weightnet.errors.ImageError: a photo must not be empty. Got 0 bytes. Copy or download it again.
    """
    if isinstance(source, str | os.PathLike):
        return decode_image(_read_file(Path(source)))
    if isinstance(source, bytes | bytearray | memoryview):
        return decode_image(bytes(source))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if hasattr(source, "read"):
        return decode_image(_read_stream(cast("BinaryIO", source)))

    from PIL import Image

    if isinstance(source, Image.Image):
        return _from_pil(source)
    raise ImageError(
        "a photo must be a path, bytes, a binary file object, a NumPy array or a PIL image. "
        f"Got {type(source).__name__}. Convert it to one of these."
    )


def decode_image(data: bytes, /) -> Pixels:
    """Decode a whole JPEG, PNG, WebP, BMP, TIFF or GIF file; the table above says what becomes of the odd ones.

    Args:
        data: the bytes of the file, at most 100 MB; the picture at most 50 million pixels, 16,384 on a side, and 50
            times as long as it is wide. All of this is checked before anything is decoded.

    Shape: (H, W, 3) uint8: blue, green, red.

    Raises:
        ImageError: another format, a limit broken, cut off or damaged.

    >>> import cv2
    >>> png = cv2.imencode(".png", np.full((2, 4, 3), (255, 128, 0), np.uint8))[1].tobytes()
    >>> decode_image(png)[0, 0].tolist()
    [255, 128, 0]
    """
    if not data:
        raise ImageError("a photo must not be empty. Got 0 bytes. Copy or download it again.")
    if len(data) > MAX_FILE_BYTES:
        raise _file_too_large(f"{len(data)} bytes")
    header = read_header(data)
    _check_size(header.height_px, header.width_px)
    image = _decode_opencv(essential_png(data) if header.format == "PNG" else data)
    if image is None:
        raise damaged(header.format, "it is cut off, damaged, or of a rare kind")
    if image.dtype == np.uint16:
        image = _to_8_bits(image)
    stored = (header.height_px, header.width_px, 3)
    turned = (header.width_px, header.height_px, 3)  # by its EXIF orientation
    if image.dtype != np.uint8 or image.shape not in (stored, turned):
        raise damaged(header.format, "it is of a rare kind, or its header does not match its pixels")
    return image


def _to_8_bits(image: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    import cv2

    return np.asarray(cv2.convertScaleAbs(image, alpha=1 / 257), np.uint8)  # one pass, exact for all 65,536 levels


def _decode_opencv(data: bytes) -> npt.NDArray[Any] | None:
    import cv2

    with _quiet_opencv():
        try:
            image: npt.NDArray[Any] | None = cv2.imdecode(
                np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
            )
        except cv2.error:
            return None
    return image


_quiet_lock = threading.Lock()
_quiet_users = 0
_quiet_previous = 0


@contextlib.contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keep OpenCV from logging about bad files, whose rows say what is wrong, and leave its log level as it was.

    The level belongs to the whole process, so threads that decode at once share one change: the first to come makes
    it and the last to go undoes it. What libjpeg itself writes about hostile files cannot be kept away so.
    """
    import cv2

    # OpenCV 5 moved the function that 4 has at the top.
    set_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel
    global _quiet_users, _quiet_previous
    with _quiet_lock:
        if _quiet_users == 0:
            _quiet_previous = set_level(0)
        _quiet_users += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                set_level(_quiet_previous)


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("a photo must be a file. Got a folder. Name the photos in it.")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("a photo must be an ordinary file. Got a device or pipe. Pass its content as bytes.")
        if status.st_size > MAX_FILE_BYTES:
            raise _file_too_large(f"{status.st_size} bytes")
        with path.open("rb", buffering=0) as file:
            return _read_stream(file, status.st_size + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"a photo must be a readable file. Got: {reason}. Check the path.") from None


def _read_stream(stream: BinaryIO, read_bytes: int = _READ_BYTES) -> bytes:
    parts: list[bytes] = []
    room = MAX_FILE_BYTES + 1
    try:
        while room > 0 and (part := stream.read(min(room, read_bytes))):
            if not isinstance(part, bytes):
                raise ImageError(f"a file object must give bytes. Got {type(part).__name__}. Open it in binary mode.")
            parts.append(part)
            room -= len(part)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"a photo must be readable to its end. Got: {reason}. Open it again.") from None
    if room <= 0:
        raise _file_too_large(f"more than {MAX_FILE_BYTES} bytes")
    return b"".join(parts)


def _from_array(array: npt.NDArray[Any]) -> Pixels:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            "an array must be uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). "
            f"Got {array.dtype} of shape {array.shape}. Convert it to 0..255 and move the channels last."
        )
    _check_size(*array.shape[:2])
    if channels == 1:
        array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(array[:, :, :3])


def _from_pil(image: "Image") -> Pixels:
    _check_size(image.height, image.width)
    try:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return _from_array(_to_8_bits(np.asarray(image, np.uint16)))
        if image.mode not in ("I", "F"):
            # By way of RGBA, since Pillow warns about a palette with transparency that becomes RGB.
            pixels = np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
            return np.ascontiguousarray(pixels[:, :, 2::-1])
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageError(f"a PIL image must be readable. Got: {error}. Copy or export the file again.") from None
    raise ImageError(
        f"a PIL image must have whole grey levels or colours. Got mode={image.mode}. Scale it to 0..255 and mode L."
    )


def _check_size(height_px: int, width_px: int) -> None:
    got = f"Got {width_px} x {height_px} pixels."
    short, long = sorted((height_px, width_px))
    if short < 1:
        raise ImageError(f"a photo must have pixels. {got} Export it again.")
    if long > MAX_SIDE_PX:
        raise ImageError(f"a photo must be at most {MAX_SIDE_PX} pixels on a side. {got} Scale it down.")
    if height_px * width_px > MAX_PIXELS:
        raise ImageError(f"a photo must have at most {MAX_PIXELS // 10**6} million pixels. {got} Scale it down.")
    if long > MAX_ASPECT * short:
        raise ImageError(f"a photo must be at most {MAX_ASPECT} times as long as it is wide. {got} Crop it.")


def _file_too_large(got: str) -> ImageError:
    return ImageError(f"a photo must be at most {MAX_FILE_BYTES // 10**6} MB as a file. Got {got}. Save it smaller.")

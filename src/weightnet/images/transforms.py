"""From decoded pixels to what a network takes: the hub page's transforms, bit for bit, and `Preprocess` for cards.

Shape suffixes: H height, W width, C channels (1 or 3), 3 the colours blue, green, red. Everything here is NumPy and
OpenCV, whose bilinear resize is part of the original's numbers: no other library's resize gives the same pixels.

Source: the MegEngine hub page of WeightNet, and `megengine.data.transform.vision` (Apache-2.0), whose rounding is kept.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from weightnet.errors import ImageError, UsageError

MEAN_BGR = (103.530, 116.280, 123.675)
STD_BGR = (57.375, 57.120, 58.395)
MAX_RESIZE_PX = 2048  # with the decoder's limit on aspect ratio, a resized picture stays under 630 MB

Pixels = npt.NDArray[Any]
Interpolation = Literal["linear", "area"]


class Transform(Protocol):
    """Anything with `apply(image)`."""

    def apply(self, image: Pixels, /) -> Pixels:
        """Return the transformed image."""
        ...


class Compose:
    """Apply several transforms one after the other.

    Args:
        transforms: the transforms, in the order in which they are applied.

    Raises:
        UsageError: one of them has no `apply`.

    >>> page = Compose([Resize(256), CenterCrop(224), Normalize(mean=MEAN_BGR, std=STD_BGR), ToMode("CHW")])
    >>> page.apply(np.zeros((300, 400, 3), np.uint8)).shape
    (3, 224, 224)
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        for transform in transforms:
            if isinstance(transform, type) or not hasattr(transform, "apply"):
                raise UsageError(f"transforms must all have `apply`. Got {transform!r}. Pass instances: Resize(256).")
        self.transforms = list(transforms)

    def apply(self, image: Pixels, /) -> Pixels:
        """Return what the last transform makes of what the ones before it made of `image`."""
        for transform in self.transforms:
            image = transform.apply(image)
        return image


class Resize:
    """Resize the short edge with OpenCV's bilinear interpolation; the long edge keeps the proportions, rounded down.

    An image whose short edge has that size already is returned as it is.

    Args:
        output_size: the short edge afterwards, in pixels.

    Raises:
        UsageError: the size is not a positive whole number.

    >>> Resize(256).apply(np.zeros((612, 459, 3), np.uint8)).shape
    (341, 256, 3)
    """

    def __init__(self, output_size: int) -> None:
        _require_positive_int("output_size", output_size)
        self.output_size = output_size

    def apply(self, image_HWC: Pixels, /) -> Pixels:
        """Return the resized image.

        Shape: (H, W, C) -> (H', W', C) with min(H', W') = output_size, dtype kept.

        Raises:
            ImageError: the array is not an image of one or three channels.
        """
        _require_image(image_HWC)
        return _resize_short_edge(image_HWC, self.output_size, "linear")


class CenterCrop:
    """Cut a square out of the middle; a middle between two pixels goes to the even offset, as Python rounds.

    Args:
        output_size: edge of the square, in pixels.

    Raises:
        UsageError: the size is not a positive whole number.

    >>> row = np.arange(7, dtype=np.uint8).reshape(1, 7, 1).repeat(4, axis=0)
    >>> CenterCrop(4).apply(row)[0, :, 0].tolist()
    [2, 3, 4, 5]
    """

    def __init__(self, output_size: int) -> None:
        _require_positive_int("output_size", output_size)
        self.output_size = output_size

    def apply(self, image_HWC: Pixels, /) -> Pixels:
        """Return the square, as a view of the image.

        Shape: (H, W, C) -> (output_size, output_size, C), dtype kept.

        Raises:
            ImageError: the array is not an image of one or three channels, or an edge is shorter than the square's.
        """
        _require_image(image_HWC)
        return _crop_center(image_HWC, self.output_size)


class Normalize:
    """Subtract a mean and divide by a standard deviation, per channel, in float32.

    Args:
        mean: one value for all channels or one per channel, in the image's units and channel order.
        std: the same for the divisor.

    Raises:
        UsageError: a value is not finite, a divisor is not positive, or there are not one or three of them.

    >>> Normalize(mean=[1.0, 2.0, 3.0], std=[2.0, 2.0, 2.0]).apply(np.full((1, 1, 3), 5, np.uint8)).tolist()
    [[[2.0, 1.5, 1.0]]]
    """

    def __init__(self, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        self.mean = _per_channel("mean", mean)
        self.std = _per_channel("std", std)
        if not (self.std > 0).all():
            raise UsageError(f"std must be greater than 0. Got std={std}. Pass one divisor for each channel.")

    def apply(self, image_HWC: Pixels, /) -> Pixels:
        """Return the normalised image.

        Shape: (H, W, C) -> (H, W, C), or (H, W, 1) -> (H, W, 3) where mean or std has three values; float32.

        Raises:
            ImageError: the array is not an image of one or three channels.
        """
        _require_image(image_HWC)
        return np.asarray((image_HWC - self.mean) / self.std)


class ToMode:
    """Turn (H, W, C) into the contiguous (C, H, W) that a network takes.

    Args:
        mode: "CHW", the only mode.

    Raises:
        UsageError: another mode.

    >>> ToMode("CHW").apply(np.zeros((4, 5, 3), np.uint8)).shape
    (3, 4, 5)
    """

    def __init__(self, mode: Literal["CHW"] = "CHW") -> None:
        if mode != "CHW":
            raise UsageError(f'mode must be "CHW". Got mode={mode!r}. Leave the transform out to keep (H, W, C).')
        self.mode = mode

    def apply(self, image_HWC: Pixels, /) -> Pixels:
        """Return the same values as (C, H, W), contiguous.

        Raises:
            ImageError: the array is not an image of one or three channels.
        """
        _require_image(image_HWC)
        return np.ascontiguousarray(np.moveaxis(image_HWC, 2, 0))


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """A model's own preprocessing, as its card stores it; the defaults are the hub page's, bit for bit.

    Args:
        channel_order: "BGR" or "RGB", the order of the channels that the network takes.
        resize: short edge after resizing, in pixels, 1 to 2048.
        crop: edge of the square cut out of the middle, in pixels, at most `resize`.
        interpolation: "linear" is OpenCV's bilinear, as on the page; "area" is antialiased (every source pixel counts,
            by the area it covers) where the image shrinks, and bilinear where it grows.
        mean: subtracted per channel, in grey levels 0..255 and in `channel_order`; None with `std=None`: raw pixels.
        std: divisor per channel, in the same units and order.

    Raises:
        UsageError: a value breaks one of these rules.

    >>> preprocess = Preprocess(resize=128, crop=112, interpolation="area", mean=None, std=None)
    >>> x_CHW = preprocess(np.full((300, 400, 3), 7, np.uint8))
    >>> x_CHW.shape, x_CHW.dtype.name, float(x_CHW.max())
    ((3, 112, 112), 'float32', 7.0)
    """

    channel_order: Literal["BGR", "RGB"] = "BGR"
    resize: int = 256
    crop: int = 224
    interpolation: Interpolation = "linear"
    mean: tuple[float, float, float] | None = MEAN_BGR
    std: tuple[float, float, float] | None = STD_BGR

    def __post_init__(self) -> None:
        _require_choice("channel_order", self.channel_order, ("BGR", "RGB"))
        _require_choice("interpolation", self.interpolation, ("linear", "area"))
        _require_positive_int("resize", self.resize)
        _require_positive_int("crop", self.crop)
        if self.resize > MAX_RESIZE_PX:
            raise UsageError(f"resize must be at most {MAX_RESIZE_PX}. Got resize={self.resize}. Use a smaller size.")
        if self.crop > self.resize:
            raise UsageError(
                f"crop must be at most resize. Got crop={self.crop}, resize={self.resize}. Use a smaller crop."
            )
        if (self.mean is None) != (self.std is None):
            raise UsageError(
                f"mean and std must be given together. Got mean={self.mean}, std={self.std}. "
                "Give both, or leave both None for raw 0..255 pixels."
            )
        if self.mean is not None and self.std is not None:
            # A card's lists become tuples, so that equal preprocessings are equal and hash alike.
            object.__setattr__(self, "mean", _three_floats("mean", self.mean))
            object.__setattr__(self, "std", _three_floats("std", self.std))
            if min(self.std) < 1e-6:
                raise UsageError(f"std must be at least 1e-6. Got std={self.std}. Pass one divisor for each channel.")

    def crop_uint8(self, image_HW3: npt.NDArray[np.uint8], /) -> npt.NDArray[np.uint8]:
        """Resize the short edge and cut out the middle: all but the channel order and the normalisation.

        Args:
            image_HW3: blue, green, red, as `read_image` gives it.

        Shape: (H, W, 3) uint8 -> (crop, crop, 3) uint8, contiguous, still blue, green, red.

        Raises:
            ImageError: the array is not a uint8 image of three channels.

        >>> Preprocess().crop_uint8(np.zeros((300, 400, 3), np.uint8)).shape
        (224, 224, 3)
        """
        _require_image(image_HW3)
        if image_HW3.dtype != np.uint8 or image_HW3.shape[2] != 3:
            raise ImageError(
                f"an image must be uint8 of shape (H, W, 3). Got {image_HW3.dtype} of shape {image_HW3.shape}. "
                "Use weightnet.images.decode.read_image to read a photo or convert an array."
            )
        resized = _resize_short_edge(image_HW3, self.resize, self.interpolation)
        return np.ascontiguousarray(_crop_center(resized, self.crop))

    def __call__(self, image_HW3: npt.NDArray[np.uint8], /) -> npt.NDArray[np.float32]:
        """Return what the network takes for this photo.

        Args:
            image_HW3: blue, green, red, as `read_image` gives it.

        Shape: (H, W, 3) uint8 -> (3, crop, crop) float32, contiguous.

        Raises:
            ImageError: the array is not a uint8 image of three channels.
        """
        return self.normalize(self.crop_uint8(image_HW3))

    def normalize(self, crop_HW3: npt.NDArray[np.uint8], /) -> npt.NDArray[np.float32]:
        """Finish what `crop_uint8` began: channel order, normalisation, layout.

        Shape: (H, W, 3) uint8, blue, green, red -> (3, H, W) float32, contiguous.

        >>> Preprocess(channel_order="RGB", mean=None, std=None).normalize(np.array([[[1, 2, 3]]], np.uint8)).ravel()
        array([3., 2., 1.], dtype=float32)
        """
        ordered = crop_HW3 if self.channel_order == "BGR" else crop_HW3[:, :, ::-1]
        x_CHW = np.empty((3, *crop_HW3.shape[:2]), np.float32)
        if self.mean is None or self.std is None:
            x_CHW[...] = np.moveaxis(ordered, 2, 0)
            return x_CHW
        # Plane by plane: the arithmetic of Normalize, value for value, about ten times faster than on (H, W, 3).
        for c, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            np.subtract(ordered[:, :, c], np.float32(mean), out=x_CHW[c], dtype=np.float32)
            np.divide(x_CHW[c], np.float32(std), out=x_CHW[c])
        return x_CHW

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a card's JSON stores them.

        >>> Preprocess(mean=None, std=None).to_dict()["mean"] is None
        True
        """
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], /) -> "Preprocess":
        """Return the preprocessing that a card's JSON describes; every field must be there and no other.

        Raises:
            UsageError: fields are missing or unknown, or a value breaks a rule of `Preprocess`.

        >>> Preprocess.from_dict(Preprocess(crop=192).to_dict()) == Preprocess(crop=192)
        True
        """
        if not isinstance(fields, Mapping):
            raise UsageError(
                f"preprocess must be a JSON object. Got {type(fields).__name__}. See a card for its fields."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in known if name not in fields]
        unknown = [str(name) for name in fields if name not in known]
        if missing or unknown:
            raise UsageError(
                f"preprocess must have exactly the fields {', '.join(known)}. "
                f"Got missing={missing}, unknown={unknown}. Add the first and take out the second."
            )
        return cls(**fields)


def _resize_short_edge(image_HWC: Pixels, size_px: int, interpolation: Interpolation) -> Pixels:
    import cv2

    height, width, channels = image_HWC.shape
    if min(height, width) == size_px:
        return image_HWC
    if height < width:
        new_height, new_width = size_px, int(size_px * width / height)
    else:
        new_height, new_width = int(size_px * height / width), size_px
    shrinks = size_px < min(height, width)
    flag = cv2.INTER_AREA if interpolation == "area" and shrinks else cv2.INTER_LINEAR
    resized: Pixels = cv2.resize(image_HWC, (new_width, new_height), interpolation=flag)
    return resized.reshape(new_height, new_width, channels)  # cv2 drops the axis of a single channel


def _crop_center(image_HWC: Pixels, size_px: int) -> Pixels:
    height, width = image_HWC.shape[:2]
    if min(height, width) < size_px:
        raise ImageError(
            f"an image must be at least {size_px} x {size_px} pixels to be cropped so. Got height={height}, "
            f"width={width}. Resize it before, or crop less."
        )
    top, left = (int(round((edge - size_px) / 2.0)) for edge in (height, width))  # noqa: RUF046 (keeps the original)
    return image_HWC[top : top + size_px, left : left + size_px]


def _require_image(image_HWC: Pixels) -> None:
    if not isinstance(image_HWC, np.ndarray):
        raise ImageError(
            f"an image must be a NumPy array of shape (H, W, 3). Got {type(image_HWC).__name__}. "
            "A photo that cv2.imread could not read is None: check the path."
        )
    if image_HWC.ndim != 3 or image_HWC.shape[2] not in (1, 3) or 0 in image_HWC.shape:
        raise ImageError(
            f"an image must have shape (H, W, 3) or (H, W, 1). Got shape={image_HWC.shape}. "
            "Add an axis to a grey image, take the alpha channel away from BGRA."
        )
    if image_HWC.dtype not in (np.uint8, np.uint16, np.float32):
        raise ImageError(
            f"an image must be uint8, uint16 or float32. Got dtype={image_HWC.dtype}. Convert it with astype()."
        )


def _require_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1. Got {name}={value!r}. Pass a size in pixels.")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        wanted = " or ".join(f'"{choice}"' for choice in choices)
        raise UsageError(f"{name} must be {wanted}. Got {name}={value!r}. Pick one of them.")


def _three_floats(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, tuple | list) or len(values) != 3 or not all(map(_is_level, values)):
        raise UsageError(
            f"{name} must be three numbers of at most 1e6, or None. Got {name}={values!r}. Pass one per channel."
        )
    return tuple(map(float, values))


def _is_level(value: object) -> bool:
    # The bound also keeps NaN and infinity out, and float32 from overflowing.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def _per_channel(name: str, values: object) -> npt.NDArray[np.float32]:
    try:
        array = np.array(values, dtype=np.float32, ndmin=1)
    except (TypeError, ValueError):
        array = np.array([np.nan])
    if array.shape not in ((1,), (3,)) or not np.isfinite(array).all():
        raise UsageError(f"{name} must be one or three finite numbers. Got {name}={values!r}. Pass one per channel.")
    return array

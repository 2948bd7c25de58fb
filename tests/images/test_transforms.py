"""The page's transforms against the original's recorded results, and `Preprocess` against both and its own rules."""

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightnet.transforms as T
from weightnet.errors import ImageError, UsageError
from weightnet.transforms import Preprocess

MEAN, STD = [103.530, 116.280, 123.675], [57.375, 57.120, 58.395]
SAMPLES = Path(__file__).parents[1] / "data" / "preprocess"
EXPECTED = json.loads((SAMPLES / "expected.json").read_text())
CROP = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToMode("CHW")])
PAGE = T.Compose([T.Resize(256), T.CenterCrop(224), T.Normalize(mean=MEAN, std=STD), T.ToMode("CHW")])


def imread(path: Path, *, channels: int) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR)
    return image.reshape(*image.shape[:2], channels)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def sha256(array: np.ndarray) -> str:
    assert array.flags.c_contiguous
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("name", EXPECTED)
def test_compose_equals_original_on_stored_samples(name: str) -> None:
    expected = EXPECTED[name]
    image = imread(SAMPLES / f"{name}.png", channels=expected["shape"][0])
    crop, full = CROP.apply(image), PAGE.apply(image)
    assert (list(crop.shape), crop.dtype) == (expected["shape"], np.uint8)
    assert sha256(crop) == expected["crop_u8_chw_sha256"]
    assert (full.shape, full.dtype) == ((3, 224, 224), np.float32)
    if "full_f32_chw_sha256" in expected:
        assert sha256(full) == expected["full_f32_chw_sha256"]


def test_compose_equals_original_on_every_reference_case(shared: Path) -> None:
    folder = shared / "reference" / "preprocess"
    crops = np.load(folder / "crops_u8_chw.npz")
    for name, facts in json.loads((folder / "meta.json").read_text()).items():
        image = imread(folder / f"{name}.png", channels=facts["input_hwc"][2])
        full = PAGE.apply(image)
        np.testing.assert_array_equal(CROP.apply(image), crops[name.replace("/", "__")], err_msg=name)
        assert abs(full.mean(dtype=np.float64) - facts["full_mean"]) < 1e-6, name
        stored = folder / f"{name}.full_f32.npz"
        if stored.exists():
            (expected,) = np.load(stored).values()
            np.testing.assert_array_equal(full, expected, err_msg=name, strict=True)
        if image.shape[2] == 3:
            np.testing.assert_array_equal(Preprocess()(image), full, err_msg=name, strict=True)


def test_resize_truncates_the_long_edge() -> None:
    assert T.Resize(256).apply(noise(480, 639)).shape == (256, 340, 3)  # 340.8
    assert T.Resize(256).apply(noise(639, 480)).shape == (340, 256, 3)


def test_resize_keeps_an_image_that_has_the_size() -> None:
    image = noise(256, 399)
    assert T.Resize(256).apply(image) is image


@pytest.mark.parametrize(("edge", "offset"), [(341, 58), (343, 60), (342, 59), (224, 0), (225, 0), (227, 2)])
def test_center_crop_rounds_half_to_even(edge: int, offset: int) -> None:
    image = noise(224, edge)
    np.testing.assert_array_equal(T.CenterCrop(224).apply(image), image[:, offset : offset + 224])
    turned = image.transpose(1, 0, 2)
    np.testing.assert_array_equal(T.CenterCrop(224).apply(turned), turned[offset : offset + 224])


def test_center_crop_refuses_a_small_image() -> None:
    with pytest.raises(ImageError, match=r"at least 224 x 224 .*height=300, width=223"):
        T.CenterCrop(224).apply(noise(300, 223))


def test_normalize_spreads_grey_over_three_channels() -> None:
    grey = noise(5, 7, channels=1)
    expected = T.Normalize(MEAN, STD).apply(grey.repeat(3, axis=2))
    np.testing.assert_array_equal(T.Normalize(MEAN, STD).apply(grey), expected, strict=True)


def test_normalize_takes_one_value_for_all_channels() -> None:
    np.testing.assert_array_equal(
        T.Normalize(mean=128.0, std=64.0).apply(noise(4, 4)), (noise(4, 4).astype(np.float32) - 128) / 64, strict=True
    )


@pytest.mark.parametrize(
    "transform", [T.Resize(8), T.CenterCrop(8), T.Normalize(MEAN, STD), T.ToMode("CHW"), T.Compose([T.Resize(8)])]
)
@pytest.mark.parametrize(
    "image",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((0, 9, 3), np.uint8),
        np.zeros((9, 9, 3), np.int64),
        None,
        "cat.jpg",
    ],
    ids=["2-D", "BGRA", "no rows", "int64", "None", "path"],
)
def test_apply_refuses_what_is_no_image(transform: Any, image: Any) -> None:
    with pytest.raises(ImageError, match=r"^an image must .* Got .*\. \w+"):
        transform.apply(image)


@pytest.mark.parametrize(
    "build",
    [
        lambda: T.Resize(0),
        lambda: T.Resize(2.5),  # type: ignore[arg-type]
        lambda: T.Resize(True),
        lambda: T.CenterCrop(-1),
        lambda: T.Normalize(mean=[1.0, 2.0], std=[1.0, 2.0]),
        lambda: T.Normalize(mean=MEAN, std=[1.0, 0.0, 1.0]),
        lambda: T.Normalize(mean=float("nan"), std=1.0),
        lambda: T.Normalize(mean="grey", std=1.0),  # type: ignore[arg-type]
        lambda: T.Normalize(mean=MEAN, std=[None]),  # type: ignore[list-item]
        lambda: T.ToMode("HWC"),  # type: ignore[arg-type]
        lambda: T.Compose([T.Resize]),  # type: ignore[list-item]
    ],
)
def test_transforms_refuse_impossible_arguments(build: Any) -> None:
    with pytest.raises(UsageError, match=r"must .* Got .*\. \w+"):
        build()


# Preprocess


def page_transform(preprocess: Preprocess, image: np.ndarray) -> np.ndarray:
    """What `Preprocess` should compute, from the page's transforms alone (bilinear only)."""
    crop = T.CenterCrop(preprocess.crop).apply(T.Resize(preprocess.resize).apply(image))
    if preprocess.channel_order == "RGB":
        crop = crop[:, :, ::-1]
    if preprocess.mean is None:
        return T.ToMode("CHW").apply(crop.astype(np.float32))
    return T.ToMode("CHW").apply(T.Normalize(preprocess.mean, preprocess.std).apply(crop))


sizes = st.integers(1, 200)
levels = st.floats(-300, 300, width=32)
deviations = st.floats(1 / 128, 300, width=32)
normalisations = st.none() | st.tuples(st.tuples(levels, levels, levels), st.tuples(deviations, deviations, deviations))


@st.composite
def preprocesses(draw: st.DrawFn) -> Preprocess:
    resize = draw(st.integers(1, 64))
    mean, std = draw(normalisations) or (None, None)
    return Preprocess(
        channel_order=draw(st.sampled_from(["BGR", "RGB"])),
        resize=resize,
        crop=draw(st.integers(1, resize)),
        interpolation=draw(st.sampled_from(["linear", "area"])),
        mean=mean,
        std=std,
    )


@settings(deadline=None)
@given(preprocesses(), sizes, sizes)
def test_preprocess_output_has_the_promised_shape(preprocess: Preprocess, height: int, width: int) -> None:
    image = noise(height, width)
    crop, x_CHW = preprocess.crop_uint8(image), preprocess(image)
    assert (crop.shape, crop.dtype) == ((preprocess.crop, preprocess.crop, 3), np.uint8)
    assert (x_CHW.shape, x_CHW.dtype) == ((3, preprocess.crop, preprocess.crop), np.float32)
    assert crop.flags.c_contiguous
    assert x_CHW.flags.c_contiguous


@settings(deadline=None)
@given(preprocesses(), sizes, sizes)
def test_preprocess_equals_the_page_transforms(preprocess: Preprocess, height: int, width: int) -> None:
    image = noise(height, width)
    if preprocess.interpolation == "linear" or min(height, width) <= preprocess.resize:
        np.testing.assert_array_equal(preprocess(image), page_transform(preprocess, image), strict=True)


@settings(deadline=None)
@given(preprocesses())
def test_preprocess_survives_json(preprocess: Preprocess) -> None:
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


def test_preprocess_dict_is_the_card_shape() -> None:
    assert Preprocess().to_dict() == {
        "channel_order": "BGR",
        "resize": 256,
        "crop": 224,
        "interpolation": "linear",
        "mean": MEAN,
        "std": STD,
    }


def test_preprocess_area_counts_every_pixel_when_shrinking() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::4] = 200  # every fourth row: bilinear at 1/8 misses or hits them, the mean is 50
    area = Preprocess(resize=8, crop=8, interpolation="area").crop_uint8(stripes)
    assert (area == 50).all()
    assert not (Preprocess(resize=8, crop=8).crop_uint8(stripes) == 50).any()


def test_preprocess_swaps_channels_for_rgb() -> None:
    image = noise(40, 50)
    raw = Preprocess(resize=32, crop=32, mean=None, std=None)
    swapped = Preprocess(channel_order="RGB", resize=32, crop=32, mean=None, std=None)
    np.testing.assert_array_equal(swapped(image), raw(image)[::-1])
    np.testing.assert_array_equal(swapped.crop_uint8(image), raw.crop_uint8(image))


def test_preprocess_takes_views_of_any_layout() -> None:
    image = noise(90, 70)
    for view in (image[::-1], image[:, ::-1], image[:, :, ::-1], image[::2, ::3], image.transpose(1, 0, 2)):
        np.testing.assert_array_equal(Preprocess()(view), Preprocess()(np.ascontiguousarray(view)))


def test_preprocess_leaves_its_input_as_it_is() -> None:
    image = noise(256, 256)
    image.setflags(write=False)
    Preprocess()(image)


def test_preprocess_equal_ones_hash_alike() -> None:
    listed = Preprocess(mean=[1, 2, 3], std=[4, 5, 6])  # type: ignore[arg-type]
    assert listed == Preprocess(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    assert hash(listed) == hash(Preprocess(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0)))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (noise(9, 9, channels=1), r"\(H, W, 3\)"),
        (noise(9, 9).astype(np.float32), "uint8"),
        (noise(9, 9)[:, :, 0], r"\(H, W, 3\)"),
        (None, "NoneType"),
    ],
    ids=["grey", "float32", "2-D", "None"],
)
def test_preprocess_refuses_other_arrays(image: Any, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        Preprocess()(image)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"channel_order": "rgb"}, 'channel_order must be "BGR" or "RGB"'),
        ({"interpolation": "cubic"}, 'interpolation must be "linear" or "area"'),
        ({"interpolation": None}, "interpolation must be"),
        ({"resize": 0}, "resize must be a whole number"),
        ({"resize": 256.0}, "resize must be a whole number"),
        ({"resize": "256"}, "resize must be a whole number"),
        ({"resize": 2049}, "resize must be at most 2048"),
        ({"crop": True}, "crop must be a whole number"),
        ({"crop": 257}, "crop must be at most resize"),
        ({"mean": None}, "mean and std must be given together"),
        ({"std": None}, "mean and std must be given together"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be at least"),
        ({"std": [1.0, -1.0, 1.0]}, "std must be at least"),
        ({"mean": [0.0, 0.0]}, "mean must be three numbers"),
        ({"mean": [0.0, 0.0, float("nan")]}, "mean must be three numbers"),
        ({"std": [1.0, 1.0, float("inf")]}, "std must be three numbers"),
        ({"mean": [0.0, 0.0, "0"]}, "mean must be three numbers"),
        ({"mean": 0.0}, "mean must be three numbers"),
        ({"gamma": 2.2}, r"unknown=\['gamma'\]"),
    ],
)
def test_preprocess_from_dict_refuses_broken_rules(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        Preprocess.from_dict(Preprocess().to_dict() | fields)


def test_preprocess_from_dict_names_missing_fields() -> None:
    with pytest.raises(UsageError, match=r"missing=\['crop', 'std'\]"):
        Preprocess.from_dict({"channel_order": "BGR", "resize": 256, "interpolation": "linear", "mean": None})


def test_preprocess_from_dict_refuses_what_is_no_object() -> None:
    with pytest.raises(UsageError, match="preprocess must be a JSON object"):
        Preprocess.from_dict([])  # type: ignore[arg-type]

"""What pixels a checkpoint wants, read off its stem."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import skimage.data

from weightnet.images.transforms import MEAN_BGR, STD_BGR, Preprocess
from weightnet.zoo import calibration
from weightnet.zoo.calibration import detect_pixels
from weightnet.zoo.megengine import read_megengine, to_torch_layout

State = dict[str, npt.NDArray[np.floating]]
ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data/megengine"
SCRIPT = ROOT / "scripts/make_patch_statistics.py"


def stem(name: str = "tiny.pkl") -> State:
    """The stem of a committed checkpoint."""
    state = to_torch_layout(read_megengine(DATA / name))
    return {key: array for key, array in state.items() if key.startswith("first_conv")}


@pytest.mark.parametrize(
    ("name", "normalised"), [("tiny.pkl", True), ("tiny_mge051_py38.pkl", True), ("tiny_rawcal.pkl", False)]
)
def test_detect_pixels_decides_committed_checkpoints(name: str, normalised: bool) -> None:
    decision = detect_pixels(stem(name))
    assert decision.normalised is normalised
    assert decision.margin > 7.5
    assert f"{decision.margin:.1f} nats" in decision.reason
    assert decision.reason.startswith("normalised" if normalised else "raw")


def test_detect_pixels_decides_the_reference_network(shared: Path) -> None:
    decision = detect_pixels(to_torch_layout(read_megengine(shared / "reference/shufflenet_v2_x0_5.pkl")))
    assert decision.normalised is True
    assert decision.margin > 7.5
    assert decision.fit_normalised is not None
    assert decision.fit_normalised.variance_error < 0.7
    assert decision.fit_normalised.mean_error < 0.7


def on_photos(weight: npt.NDArray[np.floating], bias: npt.NDArray[np.floating], *, normalised: bool) -> State:
    """A stem whose batch norm has seen the two photos of scikit-image."""
    preprocess = Preprocess() if normalised else Preprocess(mean=None, std=None)
    outputs = []
    for photo_rgb in (skimage.data.chelsea(), skimage.data.coffee()):
        x_CHW = preprocess(np.ascontiguousarray(photo_rgb[:, :, ::-1]))
        windows = np.lib.stride_tricks.sliding_window_view(x_CHW, (3, 3), axis=(1, 2))[:, ::2, ::2]
        outputs.append(np.einsum("chwij,ocij->ohw", windows, weight, optimize=True).reshape(len(weight), -1))
    y = np.concatenate(outputs, axis=1) + bias[:, None]
    return {
        "first_conv.0.weight": weight,
        "first_conv.0.bias": bias,
        "first_conv.1.running_mean": y.mean(axis=1),
        "first_conv.1.running_var": y.var(axis=1),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalised", [True, False])
def test_detect_pixels_decides_stems_that_saw_other_photos(normalised: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    scale = 1.0 if normalised else 1 / 57
    state = on_photos(random.normal(0, scale, (24, 3, 3, 3)), random.normal(0, 0.5, 24), normalised=normalised)
    decision = detect_pixels(state)
    assert decision.normalised is normalised
    assert decision.margin > 6


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_detect_pixels_does_not_depend_on_the_scale_of_the_filters(factor: float) -> None:
    state = stem()
    for kind, power in (("0.weight", 1), ("0.bias", 1), ("1.running_mean", 1), ("1.running_var", 2)):
        state[f"first_conv.{kind}"] = state[f"first_conv.{kind}"].astype(np.float64) * factor**power
    assert detect_pixels(state).margin == pytest.approx(detect_pixels(stem()).margin)
    assert detect_pixels(state).fit_normalised.mean_error == pytest.approx(
        detect_pixels(stem()).fit_normalised.mean_error
    )


def test_detect_pixels_prediction_is_exact_for_the_statistics_themselves() -> None:
    patches = json.loads((ROOT / "src/weightnet/zoo/patch_statistics.json").read_text())
    weight = np.random.default_rng(0).normal(0, 0.1, (24, 3, 3, 3))
    mean = weight.reshape(24, 27) @ ((np.array(patches["mean"]) - np.repeat(MEAN_BGR, 9)) / np.repeat(STD_BGR, 9))
    scaled = weight.reshape(24, 27) / np.repeat(STD_BGR, 9)
    variance = np.einsum("oi,ij,oj->o", scaled, np.array(patches["covariance"]), scaled)
    decision = detect_pixels(
        {
            "first_conv.0.weight": weight,
            "first_conv.0.bias": np.full(24, 3.0),
            "first_conv.1.running_mean": mean + 3.0,
            "first_conv.1.running_var": variance,
        }
    )
    assert decision.fit_normalised is not None
    assert decision.fit_normalised.variance_error == pytest.approx(0, abs=1e-9)
    assert decision.fit_normalised.mean_error == pytest.approx(0, abs=1e-9)
    assert decision.margin == pytest.approx(8.1, abs=0.05)


def test_detect_pixels_ignores_channels_put_to_sleep() -> None:
    state = stem()
    state["first_conv.0.weight"] = state["first_conv.0.weight"].copy()
    state["first_conv.1.running_var"] = state["first_conv.1.running_var"].copy()
    state["first_conv.0.weight"][:3] = 1e-20
    state["first_conv.1.running_var"][:3] = [0, 1e-30, np.nan]
    assert detect_pixels(state).normalised is True


def changed(**entries: object) -> State:
    """The committed stem with some entries replaced; None removes one."""
    state = stem()
    for kind, value in entries.items():
        key = f"first_conv.{kind.replace('__', '.').removeprefix('_')}"
        if value is None:
            del state[key]
        else:
            state[key] = np.asarray(value)
    return state


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, "no stem"),
        (changed(_0__weight=None), "no stem"),
        (changed(_1__running_var=None), "no stem"),
        (changed(_0__weight=np.ones((8, 1, 3, 3))), "three colours"),
        (changed(_0__weight=np.ones((8, 3, 7, 7))), "three colours"),
        (changed(_1__running_var=np.ones(9)), "three colours"),
        (changed(_1__running_mean=np.zeros(8), _1__running_var=np.ones(8)), "never updated"),
        (changed(_1__running_var=np.full(8, np.nan)), "too few"),
        (changed(_1__running_var=np.zeros(8)), "too few"),
        (changed(_1__running_var=np.full(8, -1.0)), "too few"),
        (changed(_0__weight=np.zeros((8, 3, 3, 3))), "too few"),
        (changed(_0__weight=np.full((8, 3, 3, 3), np.inf)), "too few"),
        (changed(_0__weight=np.full((8, 3, 3, 3), 1e300)), "too few"),
    ],
)
def test_detect_pixels_is_undecided_where_the_stem_does_not_tell(state: State, reason: str) -> None:
    decision = detect_pixels(state)
    assert decision.normalised is None
    assert decision.margin == 0
    assert reason in decision.reason


@pytest.mark.parametrize("factor", [1 / 255, 57 / 255, 7.0, 255.0])
def test_detect_pixels_is_undecided_for_pixels_scaled_otherwise(factor: float) -> None:
    state = stem()
    state["first_conv.1.running_var"] = state["first_conv.1.running_var"] * factor**2
    decision = detect_pixels(state)
    assert decision.normalised is None
    assert "neither" in decision.reason
    assert decision.fit_raw is not None


def test_patch_statistics_are_those_of_photos() -> None:
    mean, covariance = calibration._patch_statistics()
    assert mean.shape == (27,)
    assert covariance.shape == (27, 27)
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-3)
    assert np.linalg.eigvalsh(covariance).min() > 0.05  # rounding has left it positive definite
    np.testing.assert_allclose(mean.reshape(3, 9).mean(axis=1), MEAN_BGR, atol=8)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance).reshape(3, 9).mean(axis=1)), STD_BGR, rtol=0.3)


def test_make_patch_statistics_orders_numbers_as_a_convolution_does() -> None:
    crop_HW3 = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    patches = runpy.run_path(str(SCRIPT))["patches_of"](crop_HW3)
    assert patches.shape == (2 * 3, 27)
    np.testing.assert_array_equal(patches[4].reshape(3, 3, 3), crop_HW3[1:4, 1:4].transpose(2, 0, 1))


def test_make_patch_statistics_measures_a_folder(tmp_path: Path) -> None:
    import cv2

    (tmp_path / "class").mkdir()
    photos = [np.ascontiguousarray(photo[:, :, ::-1]) for photo in (skimage.data.chelsea(), skimage.data.coffee())]
    for index, photo in enumerate(photos):
        cv2.imwrite(str(tmp_path / f"class/{index}.png"), photo)
    command = [
        sys.executable,
        str(SCRIPT),
        str(tmp_path),
        "--source",
        "two photos",
        "--out",
        str(tmp_path / "out.json"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    got = json.loads((tmp_path / "out.json").read_text())
    crops = [Preprocess().crop_uint8(photo).astype(np.float64) for photo in photos]
    assert (got["photos"], got["patches"], got["source"]) == (2, 2 * 222 * 222, "two photos")
    centre = np.concatenate([crop[1:-1, 1:-1].reshape(-1, 3) for crop in crops])
    np.testing.assert_allclose(np.array(got["mean"]).reshape(3, 9)[:, 4], centre.mean(axis=0), atol=1e-3)
    covariance = np.array(got["covariance"]).reshape(3, 9, 3, 9)[:, 4, :, 4]
    np.testing.assert_allclose(covariance, np.cov(centre.T, bias=True), atol=1e-2)


def test_make_patch_statistics_refuses_a_folder_without_photos(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--source", "none", "--out", str(tmp_path / "out.json")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "must hold photos" in result.stderr

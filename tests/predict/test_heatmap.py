import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import NetworkSpec
from weightnet.predict.heatmap import class_activation, make_heatmap, map_region, seen_region

SPEC = NetworkSpec((16, 32, 64), stage_repeats=(1, 1, 1), stem_channels=8, head_channels=32, num_classes=3)


@pytest.fixture(scope="module")
def network() -> ShuffleNetV2:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ShuffleNetV2(SPEC).eval()
        with torch.no_grad():
            for parameter in made.classifier.parameters():
                parameter.normal_()
    return made


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_mean_of_the_map_and_bias_make_the_logit(network, rows, columns, seed):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((1, 32, rows, columns)).astype(np.float32)
    weights, bias = (parameter.detach().numpy() for parameter in network.classifier[0].parameters())
    with torch.inference_mode():
        logits = network.forward_head(torch.from_numpy(features))[0].numpy()
    for k in range(3):
        values = class_activation(features[0], weights[k])
        assert (values.shape, values.dtype) == ((rows, columns), np.float32)
        assert values.mean() + bias[k] == pytest.approx(logits[k], abs=1e-4)


@given(st.integers(20, 300), st.integers(20, 300), st.integers(32, 96), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_seen_region_is_what_the_preprocessing_cuts_out(height, width, crop, margin):
    preprocess = Preprocess(resize=crop + margin, crop=crop, mean=None, std=None)
    ramps = np.indices((height, width))[::-1] / np.array([[[width]], [[height]]]) * 255  # across, down
    photo = np.stack([*ramps, ramps[0]], 2).astype(np.uint8)
    crop_HW3 = preprocess.crop_uint8(photo)
    seen = seen_region(preprocess, height, width)
    for channel, low, high in ((0, seen.left, seen.right), (1, seen.top, seen.bottom)):
        cut = crop_HW3[:, :, channel].mean(axis=channel)
        # A ramp's first and last levels say where the cut begins and ends, to about a pixel of the photo.
        tolerance = 2 + 255 / min(height, width) + 255 / preprocess.resize
        assert cut[0] == pytest.approx(255 * low, abs=tolerance)
        assert cut[-1] == pytest.approx(255 * high, abs=tolerance)


@pytest.mark.parametrize("crop", [223, 224, 230])
def test_cells_lie_where_their_receptive_fields_have_their_centres(crop):
    network = ShuffleNetV2(dataclasses.replace(SPEC, M=0, G=0)).eval()
    network.maxpool = torch.nn.AvgPool2d(3, 2, 1)  # the same place, without a choice among equals
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "weight" in name:
                parameter.fill_(0.1)
    x = torch.ones(1, 3, crop, crop, requires_grad=True)
    features = network.forward_features(x)
    box = map_region(seen_region(Preprocess(resize=crop, crop=crop), crop, crop), crop, *features.shape[2:])
    for cell in (2, 3, 4):
        (gradient,) = torch.autograd.grad(features[0, :, cell, cell].sum(), x, retain_graph=True)
        influence = gradient[0].sum((0, 1)).numpy()
        centre = np.average(np.arange(crop) + 0.5, weights=influence) / crop
        drawn = box.left + (cell + 0.5) / features.shape[3] * (box.right - box.left)
        assert drawn == pytest.approx(centre, abs=1e-4)


def test_heatmap_as_data_for_json():
    features = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    made = make_heatmap(
        features,
        np.array([1, -1], np.float32),
        index=7,
        preprocess=Preprocess(resize=64, crop=64),
        height_px=64,
        width_px=128,
    )
    assert made.to_dict() == {
        "index": 7,
        "rows": 2,
        "columns": 2,
        "values": [[-4.0, -4.0], [-4.0, -4.0]],
        "box": {"left": 0.25 - 15.5 / 128, "top": -15.5 / 64, "right": 0.25 + 48.5 / 128, "bottom": 48.5 / 64},
        "seen": {"left": 0.25, "top": 0.0, "right": 0.75, "bottom": 1.0},
    }

"""Files that take photos as they are after the crop: the network's numbers, and its answers in every engine."""

import copy
import dataclasses

import numpy as np
import onnxruntime
import openvino
import pytest
import skimage.data
import torch

from weightnet.errors import UsageError, WeightsError
from weightnet.export import files
from weightnet.export.model import export_model
from weightnet.predict.classifier import Classifier
from weightnet.predict.engines import open_engine
from weightnet.predict.metrics import softmax
from weightnet.zoo.cards import read_card
from weightnet.zoo.describe import preprocess_for

BGR = np.ascontiguousarray(skimage.data.chelsea()[:, :, ::-1])
WAYS = [(".onnx", "onnxruntime"), (".onnx", "openvino"), (".xml", "openvino")]
KINDS = {"BGR": {}, "RGB": {"channel_order": "RGB", "mean": (120.0, 110.0, 90.0)}, "raw": {"mean": None, "std": None}}


def kind_of(network, kind):
    network = copy.deepcopy(network)
    preprocess = dataclasses.replace(network.card.preprocess, **KINDS[kind])
    network.card = dataclasses.replace(network.card, preprocess=preprocess)
    return network


def run(path, pixels):
    """Run an exported file in its own runtime, by this test's own lines."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(None, {"input": pixels}), strict=True))
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {value.get_any_name(): array for value, array in compiled({"input": pixels}).items()}


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("kind", KINDS)
def test_file_of_pixels_gives_the_networks_numbers(small, tmp_path, kind, suffix):
    network = kind_of(small("plain" if kind == "raw" else "r1"), kind)
    path = tmp_path / f"net{suffix}"
    export_model(network, path, preprocessing=True)
    preprocess = network.card.preprocess
    pixels = preprocess.crop_uint8(BGR)
    with torch.no_grad():
        logits = copy.deepcopy(network).double()(torch.from_numpy(preprocess(BGR)[None]).double()).numpy()
    for count in (1, 3):
        outputs = run(path, np.repeat(pixels[None], count, 0))
        assert list(outputs) == ["logits", "probabilities"]
        size = np.abs(logits).max()
        np.testing.assert_allclose(outputs["logits"], np.repeat(logits, count, 0), rtol=0, atol=1e-4 * size)
        np.testing.assert_allclose(outputs["probabilities"], softmax(outputs["logits"]), atol=1e-5)


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_classifier_gives_the_same_answers_for_a_file_of_pixels(small, tmp_path, suffix, engine):
    network = kind_of(small("r2 four blocks"), "RGB")
    path = tmp_path / f"net{suffix}"
    export_model(network, path, preprocessing=True, outputs=["pre_logits", "class_weights"])
    (got,), (expected,) = Classifier(path, engine=engine)(BGR), Classifier(network)(BGR)
    assert [score.index for score in got.top] == [score.index for score in expected.top]
    for one, other in zip(got.top, expected.top, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-5)
    runner = open_engine(path, engine=engine)
    assert runner.outputs == ("logits", "pre_logits", "class_weights", "probabilities")
    for count in (2, 0):
        x = np.zeros((count, 3, 64, 40), np.float32)
        outputs = runner.run_outputs(x, ["pre_logits", "probabilities"])
        assert [value.shape for value in outputs.values()] == [(count, 32), (count, 10)]


def test_card_of_a_file_of_pixels_says_that_it_takes_them_raw(small, tmp_path):
    network = kind_of(small("plain"), "RGB")
    card = export_model(network, tmp_path / "net.onnx", preprocessing=True)
    entry = card.notes["exports"][".onnx"]
    assert entry["preprocessing"] == network.card.preprocess.to_dict()
    assert entry["outputs"] == list(entry["largest_error"]) == ["logits", "probabilities"]
    raw = dataclasses.replace(network.card.preprocess, channel_order="BGR", mean=None, std=None)
    assert read_card(tmp_path / "net.json").preprocess == preprocess_for(tmp_path / "net.onnx") == raw


def test_file_of_pixels_and_another_do_not_share_a_card(small, tmp_path):
    export_model(small("plain"), tmp_path / "net.onnx", preprocessing=True)
    export_model(small("plain"), tmp_path / "net.xml", preprocessing=True)
    with pytest.raises(UsageError, match=r"card's place must be free\. Got out=.*net\.xml"):
        export_model(small("plain"), tmp_path / "net.xml")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("inside", "taken"), [(True, "any x 64 x 64 x 3"), (False, "any x 3 x 64 x 64")])
def test_engine_refuses_the_card_of_the_other_kind(small, tmp_path, engine, inside, taken):
    for name, preprocessing in (("one", inside), ("other", not inside)):
        export_model(small("plain"), tmp_path / f"{name}.onnx", preprocessing=preprocessing)
    (tmp_path / "other.json").write_bytes((tmp_path / "one.json").read_bytes())
    with pytest.raises(WeightsError, match=rf"must take \(input: {taken}\).* takes \(input: other numbers\)"):
        open_engine(tmp_path / "other.onnx", engine=engine)


@pytest.mark.parametrize("changed", [{"std": (57.0, 57.0, 57.0)}, {"mean": (100.0, 116.0, 123.0)}])
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_export_refuses_to_write_a_file_that_normalises_otherwise(small, tmp_path, monkeypatch, suffix, changed):
    add_preprocessing = files.add_preprocessing

    def add_wrongly(model, preprocess):
        add_preprocessing(model, dataclasses.replace(preprocess, **changed))

    monkeypatch.setattr(files, "add_preprocessing", add_wrongly)
    with pytest.raises(WeightsError, match="nothing was written"):
        export_model(small("r1"), tmp_path / f"net{suffix}", preprocessing=True)
    assert list(tmp_path.iterdir()) == []


def test_export_says_which_files_have_no_preprocessing_inside(small, make_network, tmp_path):
    with pytest.raises(UsageError, match=r"must be \.onnx or \.xml\. Got out=.*net\.mnn"):
        export_model(small("plain"), tmp_path / "net.mnn", preprocessing=True)
    grey = make_network(dataclasses.replace(small("plain").spec, in_channels=1))
    with pytest.raises(UsageError, match=r"must take 3 channels .* Got in_channels=1"):
        export_model(grey, tmp_path / "net.onnx", preprocessing=True)
    assert list(tmp_path.iterdir()) == []

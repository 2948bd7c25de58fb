from importlib.util import find_spec

import cv2
import onnx
import pytest
import skimage.data

from weightnet.zoo.cards import read_card


@pytest.mark.parametrize(
    ("suffix", "runtime"),
    [
        (".onnx", "onnxruntime"),
        (".xml", "openvino"),
        pytest.param(".mnn", "mnn", marks=pytest.mark.skipif(not find_spec("MNN"), reason="needs MNN")),
    ],
)
def test_export_writes_a_model_for_predict_and_shows_its_gist(weightnet, run_folder, photos, suffix, runtime):
    outcome = weightnet("export", run_folder, f"net{suffix}", "--outputs", "features", "pre_logits")
    assert (outcome.code, outcome.err) == (0, "")
    first, size, outputs, checked, error = outcome.out.splitlines()
    assert first == f"net{suffix}: tiny"
    assert size.endswith(" MB, fp32")
    assert outputs == "  outputs     logits, pre_logits, features"
    assert checked.startswith(f"  checked in  {runtime} ")
    assert error.startswith("  error       logits ")
    assert error.endswith(" of the largest value (allowed: 1e-04)")
    assert read_card("net.json").classes[2].label == "[red]fox[/red]"

    rows = weightnet("predict", "a.png", "--model", f"net{suffix}", "--json").rows
    expected = weightnet("predict", "a.png", "--model", run_folder, "--json").rows
    assert [score["label"] for score in rows[0]["top"]] == [score["label"] for score in expected[0]["top"]]
    for got, wanted in zip(rows[0]["top"], expected[0]["top"], strict=True):
        assert got["probability"] == pytest.approx(wanted["probability"], abs=1e-5)


@pytest.mark.parametrize(("suffix", "files"), [(".onnx", ["net.onnx"]), (".xml", ["net.xml", "net.bin"])])
def test_export_gives_its_report_as_json(weightnet, run_folder, photos, suffix, files):
    report = weightnet("export", run_folder, f"net{suffix}", "--precision", "fp16", "--json").rows
    names = ["path", "bytes", "precision", "outputs", "largest_error", "allowed_error", "checked_in", "exporter"]
    assert list(report) == names
    assert (report["path"], report["precision"], report["outputs"]) == (f"net{suffix}", "fp16", ["logits"])
    assert report["bytes"] == sum((photos / name).stat().st_size for name in files)


@pytest.mark.parametrize(("form", "products"), [("feature", 0), ("matmul", 1)])
def test_export_computes_in_the_form_that_is_asked_for(weightnet, run_folder, photos, form, products):
    assert weightnet("export", run_folder, "net.onnx", "--form", form).code == 0
    kinds = {node.op_type for node in onnx.load("net.onnx").graph.node}
    assert ("MatMul" in kinds) == bool(products)
    rows = weightnet("predict", "a.png", "--model", "net.onnx", "--json").rows
    expected = weightnet("predict", "a.png", "--model", run_folder, "--json").rows
    assert rows[0]["top"][0]["probability"] == pytest.approx(expected[0]["top"][0]["probability"], abs=1e-5)


def test_export_puts_the_preprocessing_inside(weightnet, run_folder, photos):
    report = weightnet("export", run_folder, "net.onnx", "--preprocessing", "--json").rows
    assert report["outputs"] == ["logits", "probabilities"]
    assert report["preprocessing"]["channel_order"] == "BGR"
    rows = weightnet("predict", "a.png", "--model", "net.onnx", "--json").rows
    expected = weightnet("predict", "a.png", "--model", run_folder, "--json").rows
    assert rows[0]["top"][0]["probability"] == pytest.approx(expected[0]["top"][0]["probability"], abs=1e-5)


def test_export_calibrates_on_photos_and_says_so(weightnet, photos):
    coffee = skimage.data.coffee()[:, :, ::-1]
    for number in range(32):
        cv2.imwrite(f"photo{number}.jpg", coffee[5 * number :, 8 * number :])
    options = ("--precision", "int8", "--calibration", "photo*.jpg", "missing.jpg")
    outcome = weightnet("export", "default", "net.xml", *options)
    assert (outcome.code, outcome.err) == (0, "")
    *_, error, calibrated = outcome.out.splitlines()
    assert error.endswith(" of the root mean square (allowed: 3e-01)")
    assert calibrated.startswith("  calibrated  on 32 photos (1 more could not be read); same class as the network: ")
    assert weightnet("predict", "photo0.jpg", "--model", "net.xml", "--json").rows[0]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "net.onnx"], "unknown model: "),
        (["run", "net.tflite"], "usage: The output's suffix must be one of .onnx, .xml, .pt2, .pte, .mnn. Got"),
        (["run", "no/such/folder/net.onnx"], "usage: The output's folder must exist"),
        (["run", "net.onnx", "--precision", "int8"], "usage: precision must be fp32 or fp16 for .onnx"),
        (["run", "net.xml", "--precision", "int8"], "usage: calibration must be given for int8"),
        (["run", "net.xml", "--calibration", "a.jpg"], "usage: calibration must go with precision='int8'"),
        (["run", "net.xml", "--precision", "int8", "--calibration", "a.jpg"], "usage: calibration must be at least 32"),
        (["run", "net.onnx", "--outputs", "probabilities"], "usage: "),
        (["shufflenet_v2_x0_5.plain", "net.onnx"], "usage: Published weights must exist"),
    ],
)
def test_export_says_what_it_cannot_do(weightnet, run_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    outcome = weightnet("export", *(run_folder if word == "run" else word for word in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"weightnet: {message}")
    assert list(tmp_path.iterdir()) == []


def test_predict_says_what_is_wrong_with_an_exported_file(weightnet, photos):
    (photos / "net.onnx").write_bytes(b"no model")
    outcome = weightnet("predict", "a.png", "--model", "net.onnx")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("weightnet: weights: An exported file must have its card beside it. Got net.onnx")

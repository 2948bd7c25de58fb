"""Exported files are models: the answers are those of the network, and what is wrong with a file is said."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
import torch

from weightnet.errors import MissingDependencyError, UsageError, WeightsError
from weightnet.export.model import export_model
from weightnet.predict.classifier import Classifier
from weightnet.predict.engines import TorchEngine, open_engine
from weightnet.predict.exported import in_pieces
from weightnet.predict.exported_onnxruntime import OnnxRuntimeEngine
from weightnet.predict.exported_openvino import OpenVinoEngine
from weightnet.predict.interface import OUTPUTS
from weightnet.zoo.cards import embedded_models, write_card

from .conftest import BATCH, WAYS

SIZES = [1, 5, 2, 4] * 5


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_engine_of_an_exported_file_gives_the_networks_logits(exported, tiny_network, suffix, engine):
    runner = open_engine(exported / f"net{suffix}", engine=engine, device="cpu")
    with torch.no_grad():
        expected = tiny_network(torch.from_numpy(BATCH)).numpy()
    for count in (5, 1, 3, 0):
        logits = runner.run(BATCH[:count])
        assert (logits.dtype, logits.shape) == (np.float32, (count, 5))
        np.testing.assert_allclose(logits, expected[:count], atol=1e-4)


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_engine_of_an_exported_file_gives_the_outputs_that_it_was_exported_with(tiny_network, tmp_path, suffix, engine):
    export_model(tiny_network, tmp_path / f"net{suffix}", outputs=OUTPUTS)
    runner, reference = open_engine(tmp_path / f"net{suffix}", engine=engine), open_engine(tiny_network)
    assert runner.outputs == OUTPUTS
    for count in (5, 1, 0):
        expected = reference.run_outputs(BATCH[:count], OUTPUTS)
        for names in (OUTPUTS, ("features",), ("class_weights", "logits")):
            outputs = runner.run_outputs(BATCH[:count], names)
            assert tuple(outputs) == names
            for name, values in outputs.items():
                assert (values.shape, values.dtype) == (expected[name].shape, np.float32)
                np.testing.assert_allclose(values, expected[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_engine_of_an_exported_file_says_how_to_export_an_output_that_it_lacks(exported, suffix, engine):
    runner = open_engine(exported / f"net{suffix}", engine=engine)
    assert runner.outputs == ("logits", "pre_logits")
    with pytest.raises(UsageError, match=r"gives \(logits, pre_logits\)\. .* again with `--outputs features`"):
        runner.run_outputs(BATCH, ["logits", "features"])


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", [(2, 3, 31, 40), (2, 1, 64, 64), (3, 64, 64)])
def test_engine_refuses_a_batch_that_no_network_takes(engine, shape):
    with pytest.raises(UsageError, match=r"batch of shape \(B, 3, H, W\) with H and W of at least 32 px\. Got shape="):
        open_engine("default", engine=engine, device="cpu").run(np.zeros(shape, np.float32))


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_classifier_gives_the_same_answers_in_every_engine(tmp_path, suffix, engine):
    path = tmp_path / f"default{suffix}"
    export_model("default", path)
    photos = [skimage.data.chelsea()[..., ::-1], skimage.data.coffee()[..., ::-1], skimage.data.astronaut()]
    photos = [np.ascontiguousarray(photo) for photo in photos]
    expected = Classifier("default", engine="torch", device="cpu")(photos, k=112)
    got = Classifier(path, engine=engine, batch_size=2)(photos, k=112)
    for one, two in zip(got, expected, strict=True):
        assert [score.label for score in one.top[:5]] == [score.label for score in two.top[:5]]
        probabilities = [{score.label: score.probability for score in answer.top} for answer in (one, two)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5, rel=0)


def test_classifier_gives_nearly_the_same_answers_in_half_precision(tmp_path):
    card = export_model("default", tmp_path / "half.onnx", precision="fp16", outputs=["pre_logits", "features"])
    assert max(card.notes["exports"][".onnx"]["largest_error"].values()) < 5e-3  # as docs/deploy.md says
    photo = np.ascontiguousarray(skimage.data.coffee()[..., ::-1])
    one, two = (Classifier(model, device="cpu")(photo)[0].top[0] for model in (tmp_path / "half.onnx", "default"))
    assert one.label == two.label
    assert one.probability == pytest.approx(two.probability, abs=0.01)


def test_engine_is_chosen_by_the_file(exported, tiny_network):
    chosen = {name: type(open_engine(exported / f"net.{name}")) for name in ("onnx", "xml")}
    assert chosen == {"onnx": OnnxRuntimeEngine, "xml": OpenVinoEngine}
    assert type(open_engine(str(exported / "net.onnx"), engine="openvino")) is OpenVinoEngine
    assert type(open_engine(tiny_network)) is TorchEngine


@pytest.mark.parametrize(
    ("model", "engine"),
    [("net.onnx", "torch"), ("net.xml", "torch"), ("net.xml", "onnxruntime"), ("run", "onnxruntime")],
)
def test_engine_refuses_a_model_that_it_does_not_run(exported, monkeypatch, model, engine):
    monkeypatch.chdir(exported)
    with pytest.raises(
        UsageError, match=rf"must be one that runs the model: .* Got engine='{engine}', model='{model}'"
    ):
        open_engine(model, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "onnxruntime", "openvino"])
def test_embedded_model_runs_in_every_engine_with_the_same_answers(engine):
    photos = [np.ascontiguousarray(photo[..., ::-1]) for photo in (skimage.data.chelsea(), skimage.data.coffee())]
    expected = Classifier("default", engine="torch", device="cpu")
    got = Classifier("default", engine=engine)
    assert got.card == expected.card
    for one, two in zip(got(photos, k=112), expected(photos, k=112), strict=True):
        probabilities = [{score.label: score.probability for score in answer.top} for answer in (one, two)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5, rel=0)


def test_embedded_models_give_all_outputs_exported_and_in_pytorch():
    for name in embedded_models():
        chosen = {engine: open_engine(name, engine=engine) for engine in ("auto", "torch", "openvino")}
        kinds = {"auto": OnnxRuntimeEngine, "torch": TorchEngine, "openvino": OpenVinoEngine}
        assert {engine: type(runner) for engine, runner in chosen.items()} == kinds
        assert {runner.outputs for runner in chosen.values()} == {OUTPUTS}


def test_embedded_model_runs_in_pytorch_where_the_device_needs_it():
    with pytest.raises(UsageError, match=r"that this PyTorch can use here: .* Got device='cuda:99'"):
        open_engine("default", device="cuda:99")
    with pytest.raises(UsageError, match=r"device must be auto or cpu in onnxruntime\. Got device='cuda'"):
        open_engine("default", engine="onnxruntime", device="cuda")


def test_engine_refuses_a_network_in_an_engine_of_files(tiny_network):
    with pytest.raises(UsageError, match="Got engine='openvino', model=a ShuffleNetV2"):
        open_engine(tiny_network, engine="openvino")


def test_engine_of_an_exported_file_has_no_gpu(exported):
    with pytest.raises(UsageError, match=r"device must be auto or cpu in onnxruntime\. Got device='cuda'"):
        open_engine(exported / "net.onnx", device="cuda")


def test_run_folder_named_like_a_file_is_a_run_folder(copied, tiny_network, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "run.onnx"
    folder.mkdir()
    save_file(tiny_network.state_dict(), folder / "weights.safetensors")
    write_card(tiny_network.card, folder / "weights.json")
    assert type(open_engine(folder)) is TorchEngine


@pytest.mark.parametrize(
    ("suffix", "package", "requirement"),
    [
        (".onnx", "onnxruntime", "onnxruntime"),
        (".xml", "openvino", r"'weightnet\[openvino\]'"),
        (".xml", "openvino.frontend", r"'weightnet\[openvino\]'"),
        (".pt2", "torch", r"'weightnet\[torch\]'"),
        (".pte", "executorch", r"'weightnet\[executorch\]'"),
        (".mnn", "MNN", r"'weightnet\[mnn\]'"),
    ],
)
def test_engine_says_how_to_install_a_missing_package(copied, monkeypatch, suffix, package, requirement):
    (copied / f"net{suffix}").touch()
    monkeypatch.setitem(sys.modules, package, None)
    named = {"torch": "PyTorch", "openvino.frontend": "openvino"}.get(package, package)
    with pytest.raises(MissingDependencyError, match=rf"needs {named}.*pip install {requirement}$"):
        open_engine(copied / f"net{suffix}")


def test_openvino_engine_gives_pieces_in_order_and_goes_on_after_an_error(exported, monkeypatch):
    engine = OpenVinoEngine(exported / "net.xml")
    x = np.random.default_rng(0).standard_normal((21, 3, 32, 32), np.float32)
    monkeypatch.setattr(engine, "_largest", 2)
    alone = np.concatenate([engine.run(x[at : at + 1]) for at in range(21)])
    np.testing.assert_allclose(engine.run(x), alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    make = engine._requests

    def fail_late(shape, *, alone):
        if shape[0] == 1:  # the last piece
            raise RuntimeError("Check failed")
        return make(shape, alone=alone)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_requests", fail_late)
        with pytest.raises(WeightsError, match="Check failed"):
            engine.run(x)
    np.testing.assert_allclose(engine.run(x), alone, rtol=0, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize(
    ("photos", "cores", "largest", "sizes"),
    [
        (5, 1, 8, [5]),
        (21, 1, 8, [8, 8, 5]),
        (5, 2, 8, [3, 2]),
        (21, 2, 8, [8, 8, 5]),
        (15, 1, 16, [8, 7]),  # too few for the largest piece: sizes that other batches have too
        (35, 1, 16, [16, 16, 3]),
        (30, 2, 16, [8, 8, 8, 6]),
        (31, 2, 16, [16, 15]),
    ],
)
def test_in_pieces_gives_each_core_its_share(monkeypatch, photos, cores, largest, sizes):
    monkeypatch.setattr("weightnet.predict.exported.usable_cores", lambda: cores)
    x = np.arange(photos)
    pieces = in_pieces(x, largest)
    assert [len(piece) for piece in pieces] == sizes
    np.testing.assert_array_equal(np.concatenate(pieces), x)


def test_openvino_engine_keeps_the_last_ten_shapes(exported):
    engine = OpenVinoEngine(exported / "net.xml")
    for size in (*range(32, 42), 32, 42):
        engine.run(np.zeros((1, 3, size, size), np.float32))
    assert [shape[2] for shape, _ in engine._requests_of] == [*range(34, 42), 32, 42]
    kept = engine._requests_of[(1, 3, 34, 34), True]
    engine.run(np.zeros((1, 3, 34, 34), np.float32))
    assert engine._requests_of[(1, 3, 34, 34), True] is kept


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_engine_runs_a_batch_in_pieces_and_in_order(exported, suffix, engine):
    opened = open_engine(exported / f"net{suffix}", engine=engine)
    batch = np.random.default_rng(1).normal(size=(23, 3, 32, 32)).astype(np.float32)
    one_by_one = [opened.run_outputs(batch[at : at + 1], opened.outputs) for at in range(len(batch))]
    together = opened.run_outputs(batch, opened.outputs)
    for name in opened.outputs:
        want = np.concatenate([outputs[name] for outputs in one_by_one])
        np.testing.assert_allclose(together[name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_engine_is_run_by_several_threads(exported, tiny_network, suffix, engine):
    opened, expected = open_engine(exported / f"net{suffix}", engine=engine), open_engine(tiny_network).run(BATCH)
    with ThreadPoolExecutor(4) as threads:
        for count, logits in zip(SIZES, threads.map(lambda count: opened.run(BATCH[:count]), SIZES), strict=True):
            np.testing.assert_allclose(logits, expected[:count], atol=1e-4)


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_exported_file_is_run_without_pytorch(exported, suffix, engine):
    code = (
        "import sys, numpy as np, weightnet\n"
        f"classifier = weightnet.Classifier({str(exported / f'net{suffix}')!r}, engine={engine!r})\n"
        "assert classifier(np.zeros((50, 50, 3), np.uint8))[0].status == 'ok'\n"
        "print(*{'torch', 'onnx'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("", "")

"""Exported files are models: the answers are those of the network, and what is wrong with a file is said."""

import dataclasses
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import skimage.data
import torch
from onnx import TensorProto, helper, numpy_helper

from weightnet.errors import MissingDependencyError, UsageError, WeightsError
from weightnet.export.model import export_model
from weightnet.predict.classifier import Classifier
from weightnet.predict.engines import TorchEngine, open_engine
from weightnet.predict.exported import OUTPUTS, OnnxRuntimeEngine
from weightnet.predict.exported_openvino import OpenVinoEngine
from weightnet.zoo.cards import embedded_models, read_card, write_card

BATCH = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
SIZES = [1, 5, 2, 4] * 5
needs_mnn = pytest.mark.skipif(not find_spec("MNN"), reason="needs MNN")
WAYS = [
    (".onnx", "onnxruntime"),
    (".onnx", "openvino"),
    (".xml", "openvino"),
    pytest.param(".mnn", "mnn", marks=needs_mnn),
]


@pytest.fixture(scope="module")
def exported(tiny_network, tmp_path_factory) -> Path:
    """A folder with the small network as net.onnx, net.xml and net.mnn."""
    folder = tmp_path_factory.mktemp("exported")
    for suffix in (".onnx", ".xml", *[".mnn"] * bool(find_spec("MNN"))):
        export_model(tiny_network, folder / f"net{suffix}", outputs=["pre_logits"])
    return folder


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


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


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engine_refuses_a_file_whose_further_outputs_do_not_fit_its_card(copied, engine):
    model = onnx.load(copied / "net.onnx")
    model.graph.output.append(helper.make_tensor_value_info("first_conv", TensorProto.FLOAT, None))
    for output in model.graph.output:
        if output.name == "pre_logits":
            model.graph.output.remove(output)
    for node in model.graph.node:
        for names in (node.input, node.output):
            renamed = {"pre_logits": "pooled", "first_conv": "pre_logits"}
            names[:] = [renamed.get(name, name) for name in names]
    model.graph.output[-1].name = "pre_logits"
    (copied / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match=r"further outputs must be \(pre_logits: any x 32\), .* gives \(pre"):
        open_engine(copied / "net.onnx", engine=engine)


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


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_engine_refuses_a_file_without_its_card(copied, suffix, engine):
    (copied / "net.json").unlink()
    with pytest.raises(WeightsError, match=rf"must have its card beside it. Got .*net\{suffix} without net.json"):
        open_engine(copied / f"net{suffix}", engine=engine)


@pytest.mark.parametrize("damage", ["empty", "text", "half", "other format"])
@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_engine_refuses_a_broken_file_and_says_so_once(copied, capfd, suffix, engine, damage):
    path = copied / f"net{suffix}"
    data = path.read_bytes()
    other = (copied / ("net.xml" if suffix == ".onnx" else "net.onnx")).read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"no model\n" * 99, "half": data[: len(data) // 2], "other format": other}[damage]
    )
    with pytest.raises(WeightsError, match=r"An exported file must (be one that its runtime runs|take )") as raised:
        open_engine(path, engine=engine)
    assert len(str(raised.value)) < 600
    assert capfd.readouterr() == ("", "")


def test_onnxruntime_prints_nothing_of_a_file_with_a_damaged_name(copied, capfd):
    path = copied / "net.onnx"
    path.write_bytes(path.read_bytes().replace(b"stages", b"\x9etages", 1))
    with pytest.raises(WeightsError, match="must be one that its runtime runs"):
        open_engine(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("engine", "node"),
    [("onnxruntime", "first_conv"), ("openvino", "stages.1.blocks.0.conv2"), ("openvino", "classifier")],
)
def test_engine_refuses_a_file_that_does_not_fit_together(copied, capfd, engine, node):
    model = onnx.load(copied / "net.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == f"{node}.weight")
    array = numpy_helper.to_array(weight)
    array = array[:, :, :2, :2] if node == "first_conv" else array[:-1]
    weight.CopyFrom(numpy_helper.from_array(array.copy(), weight.name))
    (copied / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match=r"must be one that its runtime runs. Got .*net\.onnx: "):
        open_engine(copied / "net.onnx", engine=engine).run(BATCH)
    assert capfd.readouterr() == ("", "")


def test_openvino_engine_says_which_file_could_not_be_compiled(exported, monkeypatch):
    engine = OpenVinoEngine(exported / "net.xml")

    def fail(*_, alone):
        raise RuntimeError("Check 'size' failed\n\n")

    monkeypatch.setattr(engine, "_requests", fail)
    with pytest.raises(WeightsError, match=r"Got .*net\.xml: Check 'size' failed\. Export the model again"):
        engine.run(BATCH)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_engine_refuses_an_xml_file_without_its_weights(copied, damage):
    weights = copied / "net.bin"
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="must be one that its runtime runs"):
        open_engine(copied / "net.xml")


@pytest.mark.parametrize(("suffix", "engine"), WAYS)
def test_engine_refuses_the_card_of_another_model(copied, suffix, engine):
    card = read_card(copied / "net.json")
    spec = dataclasses.replace(card.network, num_classes=4)
    write_card(dataclasses.replace(card, network=spec, classes=card.classes[:4]), copied / "net.json")
    with pytest.raises(
        WeightsError, match=r"give \(logits: any x 4\), .* gives \(logits: any x 5, pre_logits: any x 32"
    ):
        open_engine(copied / f"net{suffix}", engine=engine)


STRANGERS = {
    "other names": ({"image": [None, 3, 32, 32]}, {"scores": [None, 5]}),
    "one photo": ({"input": [1, 3, 32, 32]}, {"logits": [1, 5]}),
    "other size": ({"input": [None, 3, 224, 224]}, {"logits": [None, 5]}),
    "channels last": ({"input": [None, 32, 32, 3]}, {"logits": [None, 5]}),
    "two inputs": ({"input": [None, 3, 32, 32], "mask": [None, 5]}, {"logits": [None, 5]}),
    "bytes": ({"input": [None, 3, 32, 32]}, {"logits": [None, 5]}),
    "vectors": ({"input": [None, 5]}, {"logits": [None, 5]}),
}


def stranger(name: str) -> bytes:
    """An intact ONNX file that is none of ours: its output is a constant for each photo."""
    inputs, outputs = STRANGERS[name]
    kind = TensorProto.UINT8 if name == "bytes" else TensorProto.FLOAT
    (logits,) = outputs
    first = next(iter(inputs))
    nodes = [
        helper.make_node("Shape", [first], ["size"], end=1),
        helper.make_node("Concat", ["size", "five"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], [logits]),
    ]
    graph = helper.make_graph(
        nodes,
        "stranger",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [helper.make_tensor("five", TensorProto.INT64, [1], [5])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", STRANGERS)
def test_engine_refuses_a_file_of_another_model(copied, name, engine):
    (copied / "net.onnx").write_bytes(stranger(name))
    with pytest.raises(WeightsError, match=r"must take \(input: any x 3 x 32 x 32\) and give \(logits: any x 5\), as"):
        open_engine(copied / "net.onnx", engine=engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("absolute", [False, True])
def test_engine_reads_no_file_of_another_folder_for_an_onnx_file(copied, tmp_path, absolute, engine):
    """An .onnx file may name files that hold its weights; a stranger's must not make us read any."""
    model = onnx.load(copied / "net.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "classifier.weight")
    secret = tmp_path / "secret.bin"
    secret.write_bytes(tensor.raw_data)
    fields = {"location": str(secret) if absolute else "../secret.bin", "length": str(secret.stat().st_size)}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in fields.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (copied / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match="must be one that its runtime runs"):
        open_engine(copied / "net.onnx", engine=engine)


def test_openvino_engine_gives_pieces_in_order_and_goes_on_after_an_error(exported, monkeypatch):
    engine = OpenVinoEngine(exported / "net.xml")
    x = np.random.default_rng(0).standard_normal((21, 3, 32, 32), np.float32)
    monkeypatch.setattr("weightnet.predict.exported.PIECE", 2)
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

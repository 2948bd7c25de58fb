"""Exported files that are damaged, incomplete or of another model are refused, and what is wrong with them is said."""

import dataclasses

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from weightnet.errors import WeightsError
from weightnet.predict.engines import open_engine
from weightnet.predict.exported_openvino import OpenVinoEngine
from weightnet.zoo.cards import read_card, write_card

from .conftest import BATCH, WAYS


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

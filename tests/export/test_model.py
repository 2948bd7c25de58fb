"""Exported files give the network's numbers in their runtime, or are not written."""

import copy
import dataclasses
import sys
from importlib.util import find_spec

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from safetensors.torch import save_file

from weightnet.errors import MissingDependencyError, UnknownModelError, UsageError, WeightsError
from weightnet.export import files
from weightnet.export import model as model_module
from weightnet.export.model import export_model
from weightnet.images.labels import ClassLabel
from weightnet.nn.fold import fold
from weightnet.nn.variants import VARIANTS
from weightnet.predict.engines import open_engine, open_exported
from weightnet.predict.interface import OUTPUTS
from weightnet.zoo.cards import read_card, write_card

NAMES = ("plain", "r1", "r1 one block", "r2 four blocks", "r3 one block", "r9 one block")
needs_mnn = pytest.mark.skipif(not find_spec("MNN"), reason="needs MNN")
SUFFIXES = (".onnx", ".xml", *[".mnn"] * bool(find_spec("MNN")))
SHAPES = ((1, 3, 64, 64), (5, 3, 64, 64), (3, 3, 33, 97))


def run(path, x):
    """Run an exported file in its own runtime, by this test's own lines."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(None, {"input": x}), strict=True))
    if path.suffix == ".pt2":
        return {
            name: value.detach().numpy() for name, value in torch.export.load(path).module()(torch.tensor(x)).items()
        }
    if path.suffix == ".mnn":
        return run_in_mnn(path, x)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {value.get_any_name(): array for value, array in compiled({"input": x}).items()}


def run_in_mnn(path, x):
    import MNN.expr
    import MNN.nn

    photos = MNN.expr.placeholder(list(x.shape), MNN.expr.NCHW, MNN.expr.float)
    photos.write(x)
    module = MNN.nn.load_module_from_file(str(path), ["input"], list(OUTPUTS))
    arrays = [MNN.expr.convert(value, MNN.expr.NCHW).read().copy() for value in module.forward([photos])]
    return dict(zip(OUTPUTS, arrays, strict=True))


@torch.no_grad()
def exact(network, x):
    network = copy.deepcopy(network).double()
    features = network.forward_features(x)
    pre_logits, logits = network.forward_head(features, pre_logits=True), network.forward_head(features)
    outputs = {"logits": logits, "pre_logits": pre_logits, "features": features}
    outputs["class_weights"] = network.get_parameter("classifier.0.weight")
    return {name: value.numpy() for name, value in outputs.items()}


def assert_equal(path, network, x, *, tolerance):
    outputs, expected = run(path, x.float().numpy()), exact(network, x)
    assert list(outputs) == list(expected)
    for name, value in expected.items():
        assert outputs[name].shape == value.shape
        np.testing.assert_allclose(outputs[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", NAMES)
def test_export_gives_the_networks_numbers(small, make_pictures, tmp_path, name, suffix):
    path = tmp_path / f"net{suffix}"
    export_model(small(name), path, outputs=OUTPUTS)
    for shape in SHAPES:
        assert_equal(path, small(name), make_pictures(*shape), tolerance=1e-4)


@pytest.mark.parametrize("form", ["feature", "matmul"])
@pytest.mark.parametrize("name", ["r1", "r3 one block"])
def test_export_takes_folded_networks_of_either_form(small, make_pictures, tmp_path, name, form):
    export_model(fold(small(name), form=form), tmp_path / "net.onnx", outputs=OUTPUTS)
    for shape in SHAPES:
        assert_equal(tmp_path / "net.onnx", small(name), make_pictures(*shape), tolerance=1e-4)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("shufflenet_v2_x0_5", ".onnx"),
        ("shufflenet_v2_x0_5.wn8x", ".xml"),
        ("shufflenet_v2_x1_0.wn4x", ".onnx"),
        *(
            pytest.param(name, suffix, marks=pytest.mark.full)
            for name in VARIANTS
            for suffix in SUFFIXES
        ),
    ],
)  # fmt: skip
def test_export_gives_the_numbers_of_the_zoos_networks(make_network, make_pictures, tmp_path, name, suffix):
    network = make_network(VARIANTS[name].spec)
    path = tmp_path / f"net{suffix}"
    card = export_model(network, path, outputs=OUTPUTS)
    assert max(card.notes["exports"][suffix]["largest_error"].values()) < 1e-4
    assert_equal(path, network, make_pictures(2, 3, 64, 96), tolerance=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_export_in_half_precision_is_half_as_large_and_near(small, make_pictures, tmp_path, suffix):
    network = small("r3 one block")
    sizes = {}
    for precision in ("fp32", "fp16"):
        path = tmp_path / precision / f"net{suffix}"
        path.parent.mkdir()
        export_model(network, path, precision=precision, outputs=OUTPUTS)
        sizes[precision] = path.with_suffix(".bin" if suffix == ".xml" else suffix).stat().st_size
    assert_equal(tmp_path / "fp16" / f"net{suffix}", network, make_pictures(*SHAPES[1]), tolerance=5e-2)
    assert sizes["fp32"] - sizes["fp16"] > 0.4 * sum(p.nbytes for p in fold(network).parameters())


def test_export_for_bfloat16_computes_in_it_where_the_processor_can(small, make_pictures, tmp_path, monkeypatch):
    network, path = small("r1"), tmp_path / "net.xml"
    export_model(network, path, precision="bf16", outputs=OUTPUTS)
    assert_equal(path, network, make_pictures(*SHAPES[1]), tolerance=0.1)
    engine = open_exported(path)
    monkeypatch.setattr("weightnet.predict.exported.usable_cores", lambda: 1)
    engine.run(np.zeros((16, 3, 64, 64), np.float32))
    (((batch, *_), _alone),), ((request, *_),) = engine._requests_of.keys(), engine._requests_of.values()
    precision = request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string()
    can = "BF16" in engine._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    # Maps half as large: twice as many photos at once.
    assert (precision, batch) == (("bf16", 16) if can else ("f32", 8))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_export_takes_other_numbers_of_channels(small, make_network, make_pictures, tmp_path, suffix):
    network = make_network(dataclasses.replace(small("r1").spec, in_channels=1, num_classes=3))
    path = tmp_path / f"net{suffix}"
    export_model(network, path, outputs=OUTPUTS)
    assert_equal(path, network, make_pictures(2, 1, 40, 50), tolerance=1e-4)


def test_export_takes_a_network_in_training_and_leaves_it_so(small, make_pictures, tmp_path):
    network = copy.deepcopy(small("r1")).train()
    before = copy.deepcopy(network.state_dict())
    export_model(network, tmp_path / "net.onnx", outputs=OUTPUTS)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert_equal(tmp_path / "net.onnx", small("r1"), make_pictures(*SHAPES[0]), tolerance=1e-4)


@pytest.mark.parametrize(
    ("suffix", "precision"),
    [
        (".onnx", "fp32"),
        (".onnx", "fp16"),
        (".xml", "fp32"),
        (".xml", "fp16"),
        (".xml", "bf16"),
        pytest.param(".mnn", "fp16", marks=needs_mnn),
    ],
)
def test_export_refuses_to_write_a_file_that_is_wrong(small, tmp_path, monkeypatch, suffix, precision):
    build_graph = files.build_graph

    def build_wrongly(*args, **options):
        graph = build_graph(*args, **options)
        bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "stages.1.blocks.1.bias1")
        bias.raw_data = bytes(len(bias.raw_data))
        return graph

    monkeypatch.setattr(files, "build_graph", build_wrongly)
    (tmp_path / f"net{suffix}").write_bytes(b"old")
    with pytest.raises(WeightsError, match="nothing was written"):
        export_model(small("r1"), tmp_path / f"net{suffix}", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == [f"net{suffix}"]
    assert (tmp_path / f"net{suffix}").read_bytes() == b"old"


def test_export_refuses_to_write_a_program_that_is_wrong(small, tmp_path, monkeypatch):
    program = files._program

    def program_wrongly(network, wanted, *, is_open):
        network = copy.deepcopy(network)
        torch.nn.init.zeros_(network.get_parameter("stages.1.blocks.1.bias1"))
        return program(network, wanted, is_open=is_open)

    monkeypatch.setattr(files, "_program", program_wrongly)
    with pytest.raises(WeightsError, match="nothing was written"):
        export_model(small("r1"), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_export_says_that_the_place_cannot_be_written(small, tmp_path, monkeypatch, suffix):
    def fail(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_module, "write_atomically", fail)
    with pytest.raises(WeightsError, match=r"The output must be writable\. .*No space left"):
        export_model(small("plain"), tmp_path / f"net{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_export_never_leaves_an_old_xml_beside_a_new_bin(small, tmp_path, monkeypatch):
    write_atomically = model_module.write_atomically

    def stop_after_bin(path, data):
        if path.suffix == ".xml":
            raise KeyboardInterrupt
        write_atomically(path, data)

    export_model(small("plain"), tmp_path / "net.xml")
    monkeypatch.setattr(model_module, "write_atomically", stop_after_bin)
    with pytest.raises(KeyboardInterrupt):
        export_model(small("r1"), tmp_path / "net.xml")
    assert not (tmp_path / "net.xml").exists()


def test_export_writes_the_card_and_what_was_checked(small, tmp_path):
    network = copy.deepcopy(small("r1"))
    labels = tuple(ClassLabel(f"thing {index}") for index in range(10))
    network.card = dataclasses.replace(network.card, classes=labels, notes={"said": "before"})
    card = export_model(network, tmp_path / "net.onnx", precision="fp16", outputs=["features"])
    assert read_card(tmp_path / "net.json") == card
    assert dataclasses.replace(card, notes={"said": "before"}) == network.card
    entry = card.notes["exports"][".onnx"]
    assert (entry["precision"], entry["outputs"]) == ("fp16", ["logits", "features"])
    assert entry["checked_in"] == f"onnxruntime {onnxruntime.__version__}"
    assert 0 < entry["largest_error"]["features"] <= entry["allowed_error"]


def test_export_names_a_network_without_a_card(small, tmp_path):
    network = copy.deepcopy(small("plain"))
    network.card = None
    card = export_model(network, tmp_path / "net.onnx")
    assert (card.name, card.network, card.classes[2].label) == ("network", network.spec, "class 2")


def test_export_of_several_kinds_shares_one_card(small, tmp_path):
    save_file(small("r1").state_dict(), tmp_path / "net.safetensors")
    write_card(small("r1").card, tmp_path / "net.json")
    for suffix in SUFFIXES:
        export_model(tmp_path / "net.safetensors", tmp_path / f"net{suffix}")
    assert list(read_card(tmp_path / "net.json").notes["exports"]) == list(SUFFIXES)


def test_export_refuses_the_place_of_another_models_card(small, tmp_path):
    export_model(small("r1"), tmp_path / "net.onnx")
    before = (tmp_path / "net.json").read_bytes()
    with pytest.raises(UsageError, match=r"net.json is the card of another model, net.onnx. Choose another name"):
        export_model(small("plain"), tmp_path / "net.xml")
    assert (tmp_path / "net.json").read_bytes() == before
    card = export_model(small("plain"), tmp_path / "net.onnx")  # the older file goes, and its card
    assert read_card(tmp_path / "net.json") == card


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("net.pt", {}, r"suffix must be one of \.onnx"),
        ("net", {}, r"suffix must be one of \.onnx"),
        ("no/net.onnx", {}, "folder must exist"),
        ("folder.onnx", {}, "must be a file"),
        ("net.onnx", {"precision": "int8"}, r"precision must be fp32 or fp16 for \.onnx\. Got precision='int8'"),
        ("net.onnx", {"precision": "bf16"}, r"precision must be fp32 or fp16 for \.onnx\. Got precision='bf16'"),
        ("net.pt2", {"precision": "fp16"}, r"precision must be fp32 for \.pt2\. Got precision='fp16'"),
        (
            "net.onnx",
            {"outputs": ["probabilities"]},
            "must be names from logits, pre_logits, features, class_weights",
        ),
        ("net.onnx", {"outputs": "logits"}, "outputs must be names from"),
    ],
)
def test_export_refuses_what_it_cannot_do(small, tmp_path, out, options, message):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UsageError, match=message):
        export_model(small("plain"), tmp_path / out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def test_export_refuses_other_models(tmp_path):
    with pytest.raises(UsageError, match=r"must be a network of this package .* Got model=Linear"):
        export_model(torch.nn.Linear(1, 1), tmp_path / "net.onnx")  # type: ignore[arg-type]
    with pytest.raises(UnknownModelError):
        export_model("shufflenet_v3", tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("suffix", "package", "requirement"),
    [
        (".onnx", "onnxruntime", "onnxruntime"),
        (".xml", "openvino.frontend", r"'weightnet\[openvino\]'"),
        (".pte", "executorch", r"'weightnet\[executorch\]'"),
        (".mnn", "MNN", r"'weightnet\[mnn\]'"),
    ],
)
def test_export_says_which_runtime_is_missing(small, tmp_path, monkeypatch, suffix, package, requirement):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install {requirement}$"):
        export_model(small("plain"), tmp_path / f"net{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["r1 one block", pytest.param("r2 four blocks", marks=pytest.mark.full)])
def test_export_program_gives_the_networks_numbers(small, make_pictures, tmp_path, name):
    path = tmp_path / "net.pt2"
    export_model(small(name), path, outputs=OUTPUTS)
    for shape in SHAPES:
        assert_equal(path, small(name), make_pictures(*shape), tolerance=1e-4)
    engine = open_exported(path)
    for count in (3, 1, 0):
        x = np.zeros((count, 3, 64, 40), np.float32)
        assert [len(engine.run_outputs(x, [name])[name]) for name in OUTPUTS] == [count, count, count, 10]
    with pytest.raises(UsageError, match=r"photos for a \.pt2 file must be over 32 px\. Got shape=\(1, 3, 32, 40\)"):
        engine.run(np.zeros((1, 3, 32, 40), np.float32))
    with pytest.raises(UsageError, match=r"device must be auto or cpu in a \.pt2 file"):
        open_engine(path, device="cuda")


def test_export_program_refuses_a_network_for_photos_of_one_last_pixel(small, tmp_path):
    network = copy.deepcopy(small("plain"))
    preprocess = dataclasses.replace(network.card.preprocess, crop=32)
    network.card = dataclasses.replace(network.card, preprocess=preprocess)
    with pytest.raises(UsageError, match=r"The crop must be over 32 px for \.pt2\. Got crop=32"):
        export_model(network, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_the_form_that_mnn_cannot_run(small, tmp_path):
    with pytest.raises(UsageError, match=r"form must be auto or feature for \.mnn\. Got form='matmul'"):
        export_model(small("r1"), tmp_path / "net.mnn", form="matmul")
    with pytest.raises(UsageError, match=r"Fold the network that it was made of, with form='feature'"):
        export_model(fold(small("r1")), tmp_path / "net.mnn")
    assert list(tmp_path.iterdir()) == []


@needs_mnn
def test_export_says_what_mnn_cannot_convert(small, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CONVERT_MNN", "print('no such operator')")
    with pytest.raises(WeightsError, match=r"must be one that MNN takes\. Got: no such operator\. Write an \.onnx"):
        export_model(small("plain"), tmp_path / "net.mnn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "taken"), [(".onnx", "net.json"), (".xml", "net.json"), (".xml", "net.bin")])
def test_export_overwrites_nothing_that_is_not_its_own(small, tmp_path, suffix, taken):
    (tmp_path / taken).write_text('{"name": "not a card"}')
    with pytest.raises(UsageError, match=rf"must be free. Got .*{taken}"):
        export_model(small("r1"), tmp_path / f"net{suffix}")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(taken, '{"name": "not a card"}')]


def test_export_overwrites_no_card_of_weights_of_other_kinds(small, tmp_path):
    write_card(small("plain").card, tmp_path / "net.json")
    (tmp_path / "net.pkl").touch()
    with pytest.raises(UsageError, match=r"net.json is the card of another model, net.pkl"):
        export_model(small("r1"), tmp_path / "net.onnx")


def test_export_knows_the_models_own_card_again(small, tmp_path):
    network = copy.deepcopy(small("r1"))
    network.card = dataclasses.replace(network.card, notes={"sizes": (1, 2)})  # a list, once it was read
    for suffix in (".onnx", ".xml"):
        export_model(network, tmp_path / f"net{suffix}")
    assert list(read_card(tmp_path / "net.json").notes["exports"]) == [".onnx", ".xml"]


def test_export_takes_outputs_that_are_all_zero(small, tmp_path):
    network = copy.deepcopy(small("r1"))
    for parameter in network.classifier.parameters():
        torch.nn.init.zeros_(parameter)
    export_model(network, tmp_path / "net.onnx", outputs=["class_weights"])
    assert not run(tmp_path / "net.onnx", np.zeros((1, 3, 64, 64), np.float32))["logits"].any()


def test_openvino_reads_arrays_however_they_lie_in_memory(small, tmp_path):
    export_model(small("r1"), tmp_path / "net.xml")
    engine = open_exported(tmp_path / "net.xml")
    x = np.random.default_rng(0).standard_normal((5, 3, 64, 64), np.float32)
    read_only, channels_last = x.copy(), np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b" " + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    expected = engine.run(x.copy())
    for laid_out in (read_only, channels_last, x.repeat(2, 0)[::2], unaligned):
        np.testing.assert_array_equal(engine.run(laid_out), expected)
    np.testing.assert_array_equal(engine.run(np.broadcast_to(x[:1], x.shape)), engine.run(x[:1].repeat(5, 0)))

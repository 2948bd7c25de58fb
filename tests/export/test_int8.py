"""Files of 8-bit integers: they compute in them, give the network's numbers on photos, or are not written."""

import copy
import dataclasses
import itertools

import cv2
import numpy as np
import openvino
import pytest
import skimage.data

from weightnet import load
from weightnet.errors import UsageError, WeightsError
from weightnet.export import files, int8, parity
from weightnet.export.model import export_model
from weightnet.images.transforms import Preprocess
from weightnet.nn.fold import fold
from weightnet.nn.variants import NetworkSpec
from weightnet.predict.classifier import Classifier
from weightnet.predict.engines import open_exported
from weightnet.predict.interface import OUTPUTS
from weightnet.zoo.cards import read_card


def crops(count):
    """Pieces of photos, as OpenCV has them."""
    pieces = [
        photo[y : y + 160, x : x + 160, ::-1]
        for photo in (skimage.data.chelsea(), skimage.data.coffee())
        for y in range(0, photo.shape[0] - 160, 40)
        for x in range(0, photo.shape[1] - 160, 60)
    ]
    return pieces[:count]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, piece in enumerate(crops(36)):
        assert cv2.imwrite(str(folder / f"{number:02}.png"), piece)
    return folder


@pytest.fixture(scope="module")
def trained():
    """The embedded network, at its own size."""
    return load("default", pretrained=True).eval()


@pytest.fixture(scope="module")
def exported(trained, photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.xml"
    export_model(trained, path, precision="int8", calibration=photos, outputs=OUTPUTS)
    return path


def rounded(model):
    """The convolutions of the default network that are computed in integers."""
    convs = int8.convolutions(model)
    return [conv for conv in convs if not conv.get_friendly_name().startswith(("stages.0.", "stages.1."))]


def test_int8_answers_as_the_network_does(trained, exported, photos):
    paths = sorted(map(str, photos.iterdir()))
    got, expected = (Classifier(model)(paths, k=1) for model in (exported, trained))
    assert [row.status for row in got] == ["ok"] * 36
    pairs = list(zip(got, expected, strict=True))
    assert sum(a.top[0].index == b.top[0].index for a, b in pairs) >= 33
    assert np.mean([abs(a.top[0].probability - b.top[0].probability) for a, b in pairs]) < 0.05


@pytest.mark.parametrize("form", ["auto", "feature"])
def test_int8_computes_convolutions_in_integers_and_the_rest_in_bfloat16_where_it_can(
    trained, exported, photos, tmp_path, form
):
    path, in_floating_point = exported, ("stages.0.", "stages.1.")  # of the default, a narrow network, by products
    if form == "feature":
        path, in_floating_point = tmp_path / "net.xml", ()
        export_model(trained, path, precision="int8", form=form, calibration=photos)
    engine = open_exported(path)
    engine.run(np.zeros((1, 3, 96, 96), np.float32))
    ((request, *_),) = engine._requests_of.values()
    steps = request.get_compiled_model().get_runtime_model().get_ordered_ops()
    kinds = {step.get_friendly_name(): step.get_rt_info() for step in steps}
    made = {
        name: info["primitiveType"].astype(str)
        for name, info in kinds.items()
        if "Convolution" in info["layerType"].astype(str)
    }
    assert len(made) == (40 if form == "auto" else 94)
    assert {name for name, kind in made.items() if not kind.endswith("I8")} == {
        name for name in made if name.startswith(in_floating_point)
    }
    pooled = kinds["max_pool2d"]["primitiveType"].astype(str)
    assert pooled.endswith("I8") == (form == "feature")  # of what the first convolution rounds, where others take it
    can = "BF16" in engine._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    hint = request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string()
    assert hint == ("bf16" if can else "f32")


@pytest.mark.parametrize(("channels", "kept"), [(16, True), (64, False)])
def test_int8_selects_the_maps_of_plain_networks_and_keeps_the_first_stage_of_narrow_ones(
    make_network, make_pictures, channels, kept
):
    network = make_network(NetworkSpec((channels, 128, 256), 0, 0, 0.0, (2, 3, 2), 8, 32, 10))
    folded = fold(network, form=int8.int8_form(network.spec), select=True)
    graph = openvino.Core().read_model(files.build_graph(folded, ["logits"], openvino=True).SerializeToString())
    model = int8.quantise(graph, make_pictures(8, 3, 64, 64).float().numpy(), kept=int8.kept_stages(folded))
    floating = {
        conv.get_friendly_name()
        for conv in int8.convolutions(model)
        if conv.input_value(1).get_node().get_type_name() != "Multiply"
    }
    assert floating == {
        conv.get_friendly_name()
        for conv in int8.convolutions(model)
        if kept and conv.get_friendly_name().startswith("stages.0.")
    }
    kinds = [step.get_type_name() for step in model.get_ordered_ops()]
    assert kinds.count("Select") == 8  # two for each block but the first of a stage


def test_int8_keeps_the_weights_of_convolutions_as_bytes(trained, exported):
    model = openvino.Core().read_model(exported)
    kernels = [conv.input_value(1).get_node() for conv in rounded(model)]
    stored = [kernel.input_value(0).get_node().input_value(0).get_node() for kernel in kernels]
    assert {node.get_output_element_type(0).to_string() for node in stored} == {"i8"}
    assert sum(np.prod(node.get_output_shape(0)) for node in stored) > 0.3 * sum(
        p.numel() for p in trained.parameters()
    )


def test_int8_keeps_the_other_weights_in_half_precision(trained, exported, tmp_path):
    constants = [
        node for node in openvino.Core().read_model(exported).get_ordered_ops() if node.get_type_name() == "Constant"
    ]
    large = {node.get_output_element_type(0).to_string() for node in constants if node.data.size >= 1024}
    assert large == {"i8", "f16"}
    export_model(trained, tmp_path / "net.xml", precision="bf16", outputs=OUTPUTS)
    assert exported.with_suffix(".bin").stat().st_size < (tmp_path / "net.bin").stat().st_size


def test_int8_files_fit_processors_that_sum_up_two_products_in_16_bits(exported):
    """Those without VNNI, where larger weights give other numbers, and no error."""
    largest = []
    for conv in rounded(openvino.Core().read_model(exported)):
        stored = conv.input_value(1).get_node().input_value(0).get_node().input_value(0).get_node()
        axis = 2 if conv.get_type_name() == "GroupConvolution" else 1
        neighbours = np.moveaxis(stored.data.astype(int), axis, 0)
        for one, other in itertools.zip_longest(neighbours[::2], neighbours[1::2], fillvalue=np.zeros((), int)):
            largest.append(max((np.maximum(s * one, 0) + np.maximum(s * other, 0)).max() for s in (1, -1)))
    assert 255 * max(largest) <= np.iinfo(np.int16).max
    assert max(largest) >= 127  # no range is given away


def test_int8_card_says_what_was_checked(exported):
    entry = read_card(exported.with_suffix(".json")).notes["exports"][".xml"]
    assert (entry["precision"], entry["outputs"]) == ("int8", list(OUTPUTS))
    assert entry["calibration"] == {"photos": 36, "unreadable": 0}
    assert entry["largest_error"].pop("class_weights") == 0
    assert all(0 < error < entry["allowed_error"] for error in entry["largest_error"].values())
    assert entry["least_top1_agreement"] <= entry["top1_agreement"] <= 1


def test_int8_takes_the_preprocessing_inside(trained, exported, photos, tmp_path):
    path = tmp_path / "net.xml"
    export_model(trained, path, precision="int8", calibration=photos, preprocessing=True)
    paths = sorted(map(str, photos.iterdir()))[:4]
    got, expected = (list(Classifier(model).stream_logits(paths)) for model in (path, exported))
    for (_, a), (_, b) in zip(got, expected, strict=True):
        assert np.abs(a - b).max() < 0.1 * np.abs(b).max()


def rolled_scales(conv, reach, round_weights=int8._round_weights):
    round_weights(conv, reach)
    scaled = conv.input_value(1).get_node()
    scale = np.roll(scaled.input_value(1).get_node().data, 1, 0)
    scaled.input(1).replace_source_output(openvino.opset13.constant(np.ascontiguousarray(scale)).output(0))


def small_range(place, round_map=int8._round_map):
    place.low, place.high = place.low / 8, place.high / 8
    round_map(place)


@pytest.mark.parametrize(("step", "wrong"), [("_round_weights", rolled_scales), ("_round_map", small_range)])
def test_int8_refuses_to_write_a_file_of_wrong_scales(trained, photos, tmp_path, monkeypatch, step, wrong):
    monkeypatch.setattr(int8, step, wrong)
    with pytest.raises(
        WeightsError, match=r"within 0\.3 of their root mean square.* off in logits.*nothing was written"
    ):
        export_model(trained, tmp_path / "net.xml", precision="int8", calibration=photos)
    assert list(tmp_path.iterdir()) == []


def test_int8_refuses_to_write_a_file_that_swaps_classes(trained, photos, tmp_path, monkeypatch):
    build_graph = files.build_graph

    def build_swapped(network, *args, **options):
        network = copy.deepcopy(network)
        for values in (network.classifier.weight, network.classifier.bias):
            values.data = values.data.roll(1, 0)
        return build_graph(network, *args, **options)

    monkeypatch.setattr(files, "build_graph", build_swapped)
    with pytest.raises(WeightsError, match=r"agrees on \d%; nothing was written"):
        export_model(trained, tmp_path / "net.xml", precision="int8", calibration=photos)


def test_int8_refuses_to_write_a_file_that_names_other_classes_though_its_numbers_are_near(
    trained, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(parity, "LEAST_AGREEMENT", 1.01)  # which none reaches
    with pytest.raises(WeightsError, match="off in nothing and agrees on "):
        export_model(trained, tmp_path / "net.xml", precision="int8", calibration=photos)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "out", "options", "message"),
    [
        ("r1", "net.xml", {"calibration": None}, "calibration must be given for int8"),
        ("r1", "net.xml", {"precision": "bf16"}, "calibration must go with precision='int8'"),
        ("r1", "net.onnx", {}, r"precision must be fp32 or fp16 for \.onnx"),
        (
            "r2 four blocks",
            "net.xml",
            {},
            r"one kernel for each block of inputs \(r = 1\).* mix the weights.* M=8, G=4",
        ),
        ("r1", "net.xml", {"form": "matmul"}, "Got M=2, G=2, form=matmul. Choose bf16"),
    ],
)
def test_int8_refuses_what_it_is_not_for(small, photos, tmp_path, name, out, options, message):
    with pytest.raises(UsageError, match=message):
        export_model(small(name), tmp_path / out, **{"precision": "int8", "calibration": photos, **options})
    assert list(tmp_path.iterdir()) == []


def test_int8_refuses_a_network_of_other_channels(small, make_network, photos, tmp_path):
    network = make_network(dataclasses.replace(small("r1").spec, in_channels=1))
    with pytest.raises(UsageError, match=r"must take 3 channels to be calibrated on photos\. Got in_channels=1"):
        export_model(network, tmp_path / "net.xml", precision="int8", calibration=photos)


def test_calibration_counts_what_cannot_be_read(photos):
    broken = [photos / "missing.jpg", "no/photo.png"]
    read, unreadable = int8.read_calibration([photos, *broken], Preprocess(resize=40, crop=32))
    assert (len(read), unreadable) == (36, 2)
    assert {(crop.shape, crop.dtype.name) for crop in read} == {((32, 32, 3), "uint8")}


def test_calibration_takes_256_photos_evenly(photos, monkeypatch):
    paths = [f"{number}.jpg" for number in range(512)]
    monkeypatch.setattr(int8, "read_image", lambda path: np.full((8, 8, 3), int(path[:-4]) // 2, np.uint8))
    read, _ = int8.read_calibration(paths, Preprocess(resize=8, crop=8))
    assert [crop[0, 0, 0] for crop in read] == list(range(256))


def test_calibration_refuses_too_few_photos_and_inputs_without_any(photos, tmp_path):
    with pytest.raises(
        UsageError, match=r"at least 32 photos\. Got 10, and 1 that cannot be read \(missing: a photo must"
    ):
        int8.read_calibration([str(photos / "0*.png"), "missing"], Preprocess())
    with pytest.raises(UsageError, match=r"calibration must name photos\. Got .*: no photo is in this folder\."):
        int8.read_calibration([photos, tmp_path], Preprocess())
    with pytest.raises(UsageError, match=r"at least 32 photos\. Got 0\. Give more"):
        int8.read_calibration([], Preprocess())


def test_joined_maps_share_a_range_that_holds_each(small, make_pictures):
    model = openvino.Core().read_model(files.build_graph(fold(small("r1")), ["logits"]).SerializeToString())
    places = int8.places_where_made(int8.convolutions(model))
    int8._calibrate(model, places, make_pictures(4, 3, 64, 64).float().numpy(), 0.0)
    joined = int8._joined_places(places)
    assert sorted(map(id, places)) == sorted(id(place) for members in joined for place in members)
    assert max(map(len, joined)) > 1
    assert all(len({(place.low, place.high) for place in members}) == 1 for members in joined)
    assert all(place.low <= 0 < place.high or place.low >= 0 for place in places)

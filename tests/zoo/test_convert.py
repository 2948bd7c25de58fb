"""Conversion: nothing is lost on the way there and back."""

import dataclasses
import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from weightnet import __version__
from weightnet.errors import UsageError, WeightsError
from weightnet.images.labels import ClassLabel
from weightnet.images.transforms import MEAN_BGR, Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import NetworkSpec
from weightnet.zoo.cards import Card, read_card, write_card
from weightnet.zoo.convert import convert
from weightnet.zoo.megengine import read_megengine
from weightnet.zoo.state import read_state
from weightnet.zoo.weights import load

TINY = Path(__file__).parents[1] / "data/megengine/tiny.pkl"
TINY_RAW = TINY.with_name("tiny_rawcal.pkl")


def small_network(spec: NetworkSpec) -> ShuffleNetV2:
    """A small network whose every number is another."""
    network = ShuffleNetV2(spec)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 1)
    return network


def test_convert_writes_safetensors_with_a_card(tmp_path: Path) -> None:
    card = convert(TINY, tmp_path / "tiny.safetensors")
    assert read_card(tmp_path / "tiny.json") == card
    expected, got = read_state(TINY), load_file(tmp_path / "tiny.safetensors")
    assert expected.keys() == got.keys()
    assert all(np.array_equal(expected[name], got[name]) for name in expected)
    assert card.notes["pixels"]["normalised"] is True
    assert card.made_by["converted_from"] == {
        "file": "tiny.pkl",
        "sha256": hashlib.sha256(TINY.read_bytes()).hexdigest(),
        "converter": f"weightnet {__version__}",
    }


def test_converted_file_loads_as_the_original_does(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "tiny.safetensors")
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(load(tmp_path / "tiny.safetensors")(x), load(TINY)(x))


@pytest.mark.parametrize("suffix", [".pkl", ".model"])
def test_convert_there_and_back_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    convert(TINY, tmp_path / "there.safetensors")
    convert(tmp_path / "there.safetensors", tmp_path / f"back{suffix}")
    assert (tmp_path / f"back{suffix}").read_bytes() == TINY.read_bytes()
    assert not (tmp_path / "back.json").exists()


def test_convert_of_the_reference_checkpoint_there_and_back_gives_the_same_bytes(shared: Path, tmp_path: Path) -> None:
    source = shared / "reference/shufflenet_v2_x0_5.pkl"
    convert(source, tmp_path / "there.safetensors")
    convert(tmp_path / "there.safetensors", tmp_path / "back.pkl")
    assert (tmp_path / "back.pkl").read_bytes() == source.read_bytes()


def test_convert_there_and_back_keeps_the_layout_of_old_files(tmp_path: Path) -> None:
    """Their bytes differ: the original wrote another pickle protocol then."""
    source = TINY.with_name("tiny_mge051_py38.pkl")
    convert(source, tmp_path / "there.safetensors")
    convert(tmp_path / "there.safetensors", tmp_path / "back.pkl")
    convert(source, tmp_path / "direct.pkl")
    want = read_megengine(source)
    assert want["features.0.bn1.running_var"].ndim == 4
    for name in ("back.pkl", "direct.pkl"):
        got = read_megengine(tmp_path / name)
        assert got.keys() == want.keys()
        assert all(got[key].shape == want[key].shape and np.array_equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(("M", "G"), [(0, 0), (1, 1), (2, 2), (4, 1), (8, 2)])
def test_convert_of_any_network_to_the_original_and_back_keeps_every_number(tmp_path: Path, M: int, G: int) -> None:
    spec = NetworkSpec((16, 32, 64), M, G, stage_repeats=(1, 2, 1), stem_channels=8, head_channels=16, num_classes=3)
    torch.save(small_network(spec).state_dict(), tmp_path / "network.pt")
    convert(tmp_path / "network.pt", tmp_path / "network.pkl")
    expected, got = read_state(tmp_path / "network.pt"), read_state(tmp_path / "network.pkl")
    assert expected.keys() == got.keys()
    assert all(np.array_equal(expected[name], got[name]) for name in expected)
    assert load(tmp_path / "network.pkl").spec == spec


def test_converted_depthwise_convolutions_have_the_five_axes_of_the_original(tmp_path: Path) -> None:
    spec = NetworkSpec((16, 32, 64), stage_repeats=(1, 1, 1), stem_channels=8, head_channels=16, num_classes=3)
    torch.save(small_network(spec).state_dict(), tmp_path / "network.pt")
    convert(tmp_path / "network.pt", tmp_path / "network.pkl")
    state = pickle.loads((tmp_path / "network.pkl").read_bytes())
    assert state["features.0.conv2.weight"].shape == (8, 1, 1, 3, 3)
    assert state["features.0.conv1.weight"].shape == (8, 8, 1, 1)


def test_convert_keeps_the_sources_card(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "mine.pkl")
    spec = dataclasses.replace(load(TINY).spec, dropout=0.5)
    card = Card(
        "mine",
        spec,
        tuple(ClassLabel(f"thing {i}") for i in range(10)),
        Preprocess(resize=64, crop=48, interpolation="area"),
        measured={"top1": 0.5},
        made_by={"command": "weightnet train"},
        notes={"weights_sha256": "that of mine.pkl", "known": True},
    )
    write_card(card, tmp_path / "mine.json")
    converted = convert(tmp_path / "mine.pkl", tmp_path / "other.safetensors")
    assert converted.made_by["command"] == "weightnet train"
    assert dataclasses.replace(converted, made_by=card.made_by, notes=card.notes) == card
    assert converted.notes == {"known": True}
    assert load(tmp_path / "other.safetensors").card == converted


@pytest.mark.parametrize(("pixels", "mean"), [("auto", None), ("raw", None), ("normalised", MEAN_BGR)])
def test_convert_lets_the_caller_overrule_the_statistics(
    tmp_path: Path, pixels: str, mean: tuple[float, float, float] | None
) -> None:
    card = convert(TINY_RAW, tmp_path / "w.safetensors", pixels=pixels)  # type: ignore[arg-type]
    assert card.preprocess.mean == mean
    assert card.notes["pixels"]["normalised"] is (mean is not None)
    assert ("option" in card.notes["pixels"]["decided_by"]) == (pixels != "auto")


def test_convert_lets_the_caller_overrule_a_card_and_keeps_its_sizes(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "mine.pkl")
    first = convert(TINY, tmp_path / "first.safetensors")
    write_card(dataclasses.replace(first, preprocess=Preprocess(resize=64, crop=48)), tmp_path / "mine.json")
    card = convert(tmp_path / "mine.pkl", tmp_path / "second.safetensors", pixels="raw")
    assert card.preprocess == Preprocess(resize=64, crop=48, mean=None, std=None)


@pytest.mark.parametrize(
    ("out", "options", "rule"),
    [
        ("w.onnx", {}, "suffix"),
        ("w", {}, "suffix"),
        ("missing/w.safetensors", {}, "folder must exist"),
        ("folder.safetensors", {}, "must be a file"),
        ("w.pkl", {"pixels": "raw"}, "pixels must be auto"),
        ("w.safetensors", {"pixels": "both"}, "pixels must be auto, normalised or raw"),
        ("source.pkl", {}, "another file than the source"),
        ("link.pkl", {}, "another file than the source"),
    ],
)
def test_convert_refuses_an_output_that_cannot_be(tmp_path: Path, out: str, options: dict[str, str], rule: str) -> None:
    shutil.copy(TINY, tmp_path / "source.pkl")
    (tmp_path / "link.pkl").symlink_to("source.pkl")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=rule):
        convert(tmp_path / "source.pkl", tmp_path / out, **options)  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "source.pkl").read_bytes() == TINY.read_bytes()


def test_convert_overwrites_no_file_that_is_not_a_card(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "not a card"}')
    with pytest.raises(UsageError, match=r"card's place must be free. Got .*package.json is no model card"):
        convert(TINY, tmp_path / "package.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["package.json"]


def test_convert_leaves_the_card_of_an_exported_file_true(tmp_path: Path) -> None:
    card = convert(TINY, tmp_path / "m.safetensors")
    (tmp_path / "m.onnx").write_bytes(b"exported")
    exported = {".onnx": {"precision": "fp32"}}
    write_card(dataclasses.replace(card, notes={**card.notes, "exports": exported}), tmp_path / "m.json")
    assert convert(TINY, tmp_path / "m.safetensors").notes["exports"] == exported
    classes = tuple(ClassLabel(f"other {number}") for number in range(len(card.classes)))
    write_card(dataclasses.replace(card, classes=classes), tmp_path / "m.json")
    with pytest.raises(UsageError, match=r"m\.json is the card of another model, m\.onnx"):
        convert(TINY, tmp_path / "m.safetensors")
    assert read_card(tmp_path / "m.json").classes == classes


@pytest.mark.parametrize("name", ["caf\udce9", "a\nb", "x" * 220])
def test_convert_takes_files_of_any_name(tmp_path: Path, name: str) -> None:
    try:
        shutil.copy(TINY, tmp_path / f"{name}.pkl")
    except OSError:
        pytest.skip("this file system has no such names")
    convert(tmp_path / f"{name}.pkl", tmp_path / f"{name}.safetensors")
    assert load(tmp_path / f"{name}.safetensors").card.made_by["file"].isprintable()


def test_convert_beside_the_source_keeps_what_its_card_says(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "w.pkl")
    card = convert(TINY, tmp_path / "first.safetensors")
    write_card(dataclasses.replace(card, name="mine"), tmp_path / "w.json")
    convert(tmp_path / "w.pkl", tmp_path / "w.safetensors")
    assert read_card(tmp_path / "w.json").name == "mine"
    assert load(tmp_path / "w.pkl").card.name == load(tmp_path / "w.safetensors").card.name == "mine"


def test_convert_of_a_damaged_file_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "source.pkl").write_bytes(TINY.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"source\.pkl"):
        convert(tmp_path / "source.pkl", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["source.pkl"]


def test_convert_tells_safetensors_from_pickles_by_more_than_the_first_byte(tmp_path: Path) -> None:
    """The first byte of a safetensors file is the header's length modulo 256: 0x80, as in a pickle, for one in 32."""
    network = small_network(NetworkSpec((16, 32, 64), 2, 2, stage_repeats=(1, 1, 1), stem_channels=8, head_channels=16))
    arrays = {name: value.numpy() for name, value in network.state_dict().items() if "tracked" not in name}
    for padding in range(256):
        data = save(arrays, {"padding": " " * padding})
        if data[0] == 0x80:
            break
    assert data[0] == 0x80
    (tmp_path / "like_a_pickle.safetensors").write_bytes(data)
    assert convert(tmp_path / "like_a_pickle.safetensors", tmp_path / "out.safetensors").network == network.spec

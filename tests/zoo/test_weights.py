"""Loading: every format, strictly."""

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from weightnet.errors import UnknownModelError, UsageError, WeightsError, WeightsWarning
from weightnet.images.transforms import Preprocess
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import VARIANTS
from weightnet.zoo import cards, hub
from weightnet.zoo.cards import Card, numbered_classes, write_card
from weightnet.zoo.describe import card_for, preprocess_for
from weightnet.zoo.state import read_state, spec_from_state, variant_name
from weightnet.zoo.weights import load

from .conftest import TINY, TINY_CARD, TINY_RAW, TINY_SPEC, Tensors, save_torch


def assert_same_weights(network: nn.Module, expected: Tensors) -> None:
    got = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


# What is built


def test_load_of_a_name_gives_a_new_network_in_training_mode() -> None:
    network = load("shufflenet_v2_x0_5.plain", num_classes=7, in_channels=4)
    assert network.training
    assert network.card is None
    assert network.spec == dataclasses.replace(VARIANTS["shufflenet_v2_x0_5.plain"].spec, num_classes=7, in_channels=4)
    assert load("shufflenet_v2_x0_5.plain").num_classes == 1000


def test_load_of_a_file_gives_a_trained_network_with_its_card(tensors: Tensors) -> None:
    network = load(TINY)
    assert not network.training
    assert network.spec == TINY_SPEC
    assert network.card.network == TINY_SPEC
    assert network.card.classes == numbered_classes(10)
    assert_same_weights(network, tensors)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network(torch.zeros(2, 3, 40, 40)).shape == (2, 10)


def test_load_of_a_file_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    load(TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_network_can_be_trained() -> None:
    network = load(TINY).train()
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert int(network.first_conv[1].num_batches_tracked) == 1  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("name", VARIANTS)
def test_spec_from_state_knows_every_row_by_its_shapes(name: str) -> None:
    for changes in ({}, {"num_classes": 10, "in_channels": 1}):
        spec = dataclasses.replace(VARIANTS[name].spec, **changes)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in ShuffleNetV2(spec).state_dict().items()}
        state = {entry: np.broadcast_to(np.float32(0), shape) for entry, shape in shapes.items()}
        assert spec_from_state(state) == spec
        assert variant_name(spec) == name


# Formats: the content decides, not the name


@pytest.mark.parametrize(
    "write",
    [
        save_safetensors,
        save_torch,
        lambda tensors: save_torch({"state_dict": tensors, "epoch": 3, "loss": 0.5}),
        lambda tensors: save_torch({name: nn.Parameter(value) for name, value in tensors.items()}),
        lambda tensors: save_torch(load(TINY).state_dict()),
        lambda tensors: save_torch({name: value.double() for name, value in tensors.items()}),
        lambda tensors: save_safetensors({name: value.double() for name, value in tensors.items()}),
        lambda tensors: TINY.read_bytes(),
    ],
    ids=["safetensors", "torch", "state_dict", "parameters", "counters", "torch64", "safetensors64", "megengine"],
)
def test_load_reads_every_format_under_any_name(
    tensors: Tensors, tmp_path: Path, write: Callable[[Tensors], bytes]
) -> None:
    (tmp_path / "weights.bin").write_bytes(write(tensors))
    assert_same_weights(load(tmp_path / "weights.bin"), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [save_safetensors, save_torch])
def test_load_widens_short_floats_to_float32(
    tensors: Tensors, tmp_path: Path, dtype: torch.dtype, write: Callable[[Tensors], bytes]
) -> None:
    short = {name: value.to(dtype) for name, value in tensors.items()}
    (tmp_path / "short").write_bytes(write(short))
    assert_same_weights(load(tmp_path / "short"), {name: value.float() for name, value in short.items()})


def test_load_of_original_checkpoints_of_any_format(shared: Path) -> None:
    expected = read_state(shared / "reference/tiny.pkl")
    for path in [*(shared / "reference/old_format").glob("tiny_*.pkl")]:
        if "keepvar" in path.name:
            with pytest.raises(WeightsError, match="keep_var"):
                load(path)
            continue
        network = load(path)
        assert_same_weights(network, {name: torch.from_numpy(array) for name, array in expected.items()})


def test_load_of_the_original_half_size_network(shared: Path) -> None:
    network = load("shufflenet_v2_x0_5", pretrained=shared / "reference/shufflenet_v2_x0_5.pkl")
    assert network.card.name == "shufflenet_v2_x0_5"
    assert network.card.classes[281].label == "tabby"
    assert network.card.notes["pixels"]["normalised"] is True
    assert load(shared / "reference/shufflenet_v2_x0_5.pkl").spec == VARIANTS["shufflenet_v2_x0_5"].spec


# Cards, folders, embedded models


def test_load_takes_the_card_beside_the_file(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "mine.pkl")
    write_card(TINY_CARD, tmp_path / "mine.json")
    assert load(tmp_path / "mine.pkl").card == TINY_CARD
    assert card_for(tmp_path / "mine.pkl") == TINY_CARD
    assert preprocess_for(str(tmp_path / "mine.pkl")).crop == 48


def test_load_takes_dropout_from_the_card(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "mine.pkl")
    write_card(
        dataclasses.replace(TINY_CARD, network=dataclasses.replace(TINY_SPEC, dropout=0.5)), tmp_path / "mine.json"
    )
    assert load(tmp_path / "mine.pkl").dropout.p == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"stage_repeats": (2, 2, 2)},
        {"stage_repeats": (2, 3, 10**6)},
        {"stage_channels": (16, 32, 1 << 20)},
        {"head_channels": 1 << 20},
        {"M": 4},
        {"M": 0, "G": 0},
        {"in_channels": 1},
    ],
)
def test_load_refuses_a_card_of_another_network(tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copy(TINY, tmp_path / "mine.pkl")
    card = dataclasses.replace(TINY_CARD, network=dataclasses.replace(TINY_SPEC, **changes))
    write_card(card, tmp_path / "mine.json")
    with pytest.raises(WeightsError, match=r"mine\.pkl"):
        load(tmp_path / "mine.pkl")


def test_load_refuses_a_card_of_more_classes_than_the_weights(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "mine.pkl")
    spec = dataclasses.replace(TINY_SPEC, num_classes=11)
    write_card(Card("tiny", spec, numbered_classes(11)), tmp_path / "mine.json")
    with pytest.raises(WeightsError, match=r"classifier\.0\.weight \(10, 96\), not \(11, 96\)"):
        load(tmp_path / "mine.pkl")


def test_load_of_a_name_refuses_weights_whose_card_describes_another_network(tmp_path: Path) -> None:
    spec = dataclasses.replace(VARIANTS["shufflenet_v2_x0_5"].spec, num_classes=2)
    (tmp_path / "half.safetensors").write_bytes(save_safetensors(ShuffleNetV2(spec).state_dict()))
    write_card(TINY_CARD, tmp_path / "half.json")
    with pytest.raises(WeightsError, match="card"):
        load("shufflenet_v2_x0_5", pretrained=tmp_path / "half.safetensors")


def test_load_of_a_run_folder(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(WeightsError, match=r"weights\.safetensors"):
        load(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(save_safetensors(tensors))
    write_card(TINY_CARD, tmp_path / "weights.json")
    assert load(tmp_path).card == TINY_CARD
    assert preprocess_for(tmp_path) == TINY_CARD.preprocess


def test_load_of_an_embedded_model_by_its_name(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "EMBEDDED", tmp_path)
    half = {name: value.half() for name, value in tensors.items()}
    (tmp_path / "pocket.safetensors").write_bytes(save_safetensors(half))
    write_card(TINY_CARD, tmp_path / "pocket.json")
    assert hub.list_models()[-1] == "pocket"
    for pretrained in (False, True):
        assert_same_weights(load("pocket", pretrained=pretrained), {k: v.float() for k, v in half.items()})
    assert preprocess_for("pocket") == TINY_CARD.preprocess


@pytest.mark.parametrize("name", sorted(cards.embedded_models()))
def test_embedded_models_load_and_fit_their_card(name: str) -> None:
    network = load(name)
    assert network.card.name == name
    assert network(torch.zeros(1, 3, network.card.preprocess.crop, network.card.preprocess.crop)).isfinite().all()


# Strictness


def test_load_lists_missing_and_unexpected_entries_with_their_shapes(tensors: Tensors, tmp_path: Path) -> None:
    tensors["classifier.1.weight"] = torch.zeros(2, 3)
    del tensors["features.1.reduce.bias"], tensors["features.6.bn3.running_var"]
    (tmp_path / "w.safetensors").write_bytes(save_safetensors(tensors))
    with pytest.raises(WeightsError) as raised:
        load(tmp_path / "w.safetensors")
    message = str(raised.value)
    assert "w.safetensors" in message
    assert "2 missing: features.1.reduce.bias (16,), features.6.bn3.running_var (32,)" in message
    assert "1 unexpected: classifier.1.weight (2, 3)" in message


def test_load_lists_both_shapes_of_an_ill_shaped_entry(tensors: Tensors, tmp_path: Path) -> None:
    tensors["features.2.bn2.bias"] = torch.zeros(17)
    (tmp_path / "w.pt").write_bytes(save_torch(tensors))
    with pytest.raises(WeightsError, match=r"1 of another shape: features\.2\.bn2\.bias \(17,\), not \(16,\)"):
        load(tmp_path / "w.pt")


def test_load_of_a_name_refuses_another_networks_weights() -> None:
    with pytest.raises(
        WeightsError,
        match=r"235 missing: .*and 225 more; 28 unexpected: .*; 181 of another shape: first_conv\.0\.weight",
    ):
        load("shufflenet_v2_x0_5", pretrained=TINY)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
def test_load_refuses_numbers_that_float32_cannot_hold_by_their_name(
    tensors: Tensors, tmp_path: Path, value: float
) -> None:
    tensors["conv_last.0.bias"] = tensors["conv_last.0.bias"].double()
    tensors["conv_last.0.bias"][5] = value
    for name, content in {"w.safetensors": save_safetensors(tensors), "w.pt": save_torch(tensors)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=r"conv_last\.0\.bias"):
            load(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_load_refuses_numbers_that_are_not_floating_point_by_their_name(
    tensors: Tensors, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors["conv_last.0.bias"] = tensors["conv_last.0.bias"].to(dtype)
    for name, content in {"w.safetensors": save_safetensors(tensors), "w.pt": save_torch(tensors)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=r"conv_last\.0\.bias|ByteStorage|ComplexFloatStorage"):
            load(tmp_path / name)


# Another head, another stem


def test_load_with_other_classes_has_a_new_classifier_and_says_so(tensors: Tensors) -> None:
    with pytest.warns(WeightsWarning, match="classifier is new and untrained: 4 classes, where the weights have 10"):
        network = load(TINY, num_classes=4)
    assert not network.training
    assert network.card.classes == numbered_classes(4)
    assert network.card.preprocess == load(TINY).card.preprocess
    assert network.num_classes == network.card.network.num_classes == 4
    body = {name: value for name, value in tensors.items() if not name.startswith("classifier")}
    torch.testing.assert_close({name: network.state_dict()[name] for name in body}, body, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::weightnet.errors.WeightsWarning")
def test_load_with_other_sizes_forgets_what_the_trained_network_was_measured_at(tmp_path: Path) -> None:
    network = load(TINY)
    (tmp_path / "weights.safetensors").write_bytes(save_safetensors(network.state_dict()))
    write_card(dataclasses.replace(network.card, measured={"top1": 0.5}, known_from=0.5), tmp_path / "weights.json")
    assert load(tmp_path).card.known_from == 0.5
    for changed in (load(tmp_path, num_classes=4), load(tmp_path, in_channels=1)):
        assert (changed.card.measured, changed.card.known_from) == ({}, None)


def test_load_with_the_weights_own_sizes_says_nothing(tensors: Tensors) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_weights(load(TINY, num_classes=10, in_channels=3), tensors)


def test_load_with_one_channel_sums_the_kernels_and_says_so() -> None:
    with pytest.warns(WeightsWarning, match="adapted from 3 to 1 input channels"):
        grey = load(TINY, in_channels=1)
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    want = load(TINY).double()(x.expand(2, 3, 32, 32))
    atol = 2e-5 * want.abs().max().item()  # the kernels were summed in float32
    torch.testing.assert_close(grey.double()(x), want, rtol=0, atol=atol)
    assert grey.card.network.in_channels == 1


@pytest.mark.parametrize("in_channels", [2, 4, 6, 7])
def test_load_with_more_channels_repeats_the_kernels_and_keeps_their_sum(in_channels: int) -> None:
    with pytest.warns(WeightsWarning, match=f"adapted from 3 to {in_channels} input channels"):
        network = load(TINY, in_channels=in_channels)
    weight, old = network.first_conv[0].weight, load(TINY).first_conv[0].weight
    for channel in range(in_channels):
        torch.testing.assert_close(weight[:, channel] * in_channels / 3, old[:, channel % 3])  # type: ignore[index]
    assert network(torch.zeros(1, in_channels, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("sizes", [{"num_classes": 0}, {"in_channels": 0}, {"num_classes": 2.5}, {"in_channels": "3"}])
def test_load_refuses_impossible_sizes(sizes: dict[str, Any]) -> None:
    for name in ("shufflenet_v2_x0_5", TINY):
        with pytest.raises(UsageError, match=next(iter(sizes))):
            load(name, **sizes)


# Pixels


def test_load_of_weights_for_raw_pixels_says_so() -> None:
    with pytest.warns(WeightsWarning, match=r"tiny_rawcal\.pkl want raw 0\.\.255 pixels"):
        network = load(TINY_RAW)
    assert network.card.notes["pixels"]["normalised"] is False
    assert network.card.notes["pixels"]["margin"] > 4
    assert preprocess_for(network) == preprocess_for(TINY_RAW) == Preprocess(mean=None, std=None)


def test_load_of_weights_that_do_not_tell_takes_the_pages_pixels(tmp_path: Path) -> None:
    (tmp_path / "new.safetensors").write_bytes(save_safetensors(ShuffleNetV2(TINY_SPEC).state_dict()))
    network = load(tmp_path / "new.safetensors")
    assert network.card.notes["pixels"]["normalised"] is None
    assert preprocess_for(network) == Preprocess()


def test_card_beside_the_file_overrides_what_the_weights_tell(tmp_path: Path) -> None:
    shutil.copy(TINY_RAW, tmp_path / "mine.pkl")
    write_card(TINY_CARD, tmp_path / "mine.json")
    assert preprocess_for(load(tmp_path / "mine.pkl")) == TINY_CARD.preprocess


def test_preprocess_for_a_name_follows_the_published_weights_once_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path)
    assert preprocess_for("shufflenet_v2_x0_5") == preprocess_for("shufflenet_v2_x2_0.wn4x") == Preprocess()
    shutil.copy(TINY_RAW, tmp_path / "snetv2_0.5x_wnet1x_M2G2.model")
    assert preprocess_for("shufflenet_v2_x0_5") == Preprocess(mean=None, std=None)


def test_preprocess_for_a_network_without_a_card_is_the_pages() -> None:
    assert preprocess_for(ShuffleNetV2(TINY_SPEC)) == Preprocess()


# Names


@pytest.mark.parametrize("name", ["shufflenet_v2_x05", "no/such/file.pkl", "", "a\0b", "x" * 5000])
def test_load_of_an_unknown_name_says_where_names_are_listed(name: str) -> None:
    with pytest.raises(UnknownModelError, match=r"weightnet models"):
        load(name)


def test_load_of_a_name_nearly_right_gives_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match=r"Did you mean shufflenet_v2_x1_0\.wn4x, .* or "):
        load("shufflenet_v2_x1_0.wn8x")


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5.plain", "shufflenet_v2_x0_5.wn8x", "shufflenet_v2_x2_0.wn4x"])
def test_load_of_weights_that_nobody_published_says_what_to_do(name: str) -> None:
    with pytest.raises(UsageError, match=r"nobody published.*pretrained=PATH"):
        load(name, pretrained=True)


def test_load_of_a_file_refuses_other_weights_for_it() -> None:
    with pytest.raises(UsageError, match="pretrained must be left out"):
        load(TINY, pretrained=TINY_RAW)


@pytest.mark.parametrize("name", ["network.onnx", "network.xml"])
def test_load_of_an_exported_file_says_what_takes_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<?xml version='1.0'?><net/>" if name.endswith("xml") else b"\x08\x08\x12\x05torch")
    with pytest.raises(WeightsError, match=rf"{name} cannot be loaded\. An exported file.*evaluate"):
        load(tmp_path / name)

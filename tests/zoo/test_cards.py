"""Model cards: what goes in comes out, and nothing else gets in."""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from weightnet.errors import UsageError, WeightsError
from weightnet.images.labels import ClassLabel
from weightnet.images.transforms import Preprocess
from weightnet.nn.variants import VARIANTS, NetworkSpec
from weightnet.zoo import cards
from weightnet.zoo.cards import (
    Card,
    default_classes,
    embedded_models,
    read_card,
    read_file,
    write_atomically,
    write_card,
)

CARD = Card(
    name="pets",
    network=NetworkSpec((48, 96, 192), M=2, G=2, dropout=0.25, num_classes=2),
    classes=(ClassLabel("cat", "n02121808", 281), ClassLabel("Hündchen")),
    preprocess=Preprocess(resize=128, crop=112, interpolation="area", mean=None, std=None),
    measured={"top1": 0.5, "photos": 10},
    made_by={"command": "weightnet train"},
    terms="CC0",
    notes={"pixels": {"normalised": None}},
    known_from=0.25,
)


@pytest.fixture
def fields() -> dict[str, Any]:
    """The card's fields, to be spoilt."""
    return copy.deepcopy(CARD.to_dict())


def test_card_written_and_read_is_the_same(tmp_path: Path) -> None:
    write_card(CARD, tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == CARD


def test_card_of_only_the_required_fields_takes_defaults(fields: dict[str, Any]) -> None:
    required = {name: fields[name] for name in ("name", "network", "classes", "preprocess")}
    assert Card.from_dict(required).terms == ""


def test_card_of_every_variant_survives_json() -> None:
    for name, variant in VARIANTS.items():
        card = Card(name, variant.spec, default_classes(1000))
        assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("classes",), [{"label": "cat"}]),
        (("classes",), [{"label": "cat"}, {"label": "cat"}]),
        (("classes",), {"label": "cat"}),
        (("classes", 0), "cat"),
        (("classes", 0, "label"), 7),
        (("classes", 0, "label"), ""),
        (("classes", 0, "label"), "cat\x1b[2J"),
        (("classes", 0, "label"), "c" * 201),
        (("classes", 0, "wnid"), 1),
        (("classes", 0, "imagenet_index"), "281"),
        (("classes", 0, "imagenet_index"), True),
        (("classes", 0, "colour"), "black"),
        (("name",), None),
        (("name",), "a\nb"),
        (("network",), [48, 96, 192]),
        (("network", "num_classes"), 10**9),
        (("network", "num_classes"), 2.0),
        (("network", "stage_channels"), [48, 96]),
        (("network", "stage_channels"), [48, 96, 10**9]),
        (("network", "stage_channels"), [48, 96, "192"]),
        (("network", "stage_channels"), [[48], 96, 192]),
        (("network", "stage_repeats"), [4, 10**12, 4]),
        (("network", "dropout"), math.nan),
        (("network", "dropout"), "0.2"),
        (("network", "M"), 3),
        (("network", "depth"), 50),
        (("preprocess", "std"), [math.nan, 1, 1]),
        (("preprocess", "std"), [0, 1, 1]),
        (("preprocess", "crop"), 10**9),
        (("preprocess", "crop"), "112"),
        (("preprocess", "gamma"), 1),
        (("measured",), [0.5]),
        (("terms",), {}),
        (("weights",), "elsewhere.pkl"),
        (("known_from",), "0.5"),
        (("known_from",), True),
        (("known_from",), 1.01),
        (("known_from",), -0.01),
        (("known_from",), math.nan),
    ],
)
def test_card_that_lies_is_refused(
    fields: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], value: object
) -> None:
    part: Any = fields
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (tmp_path / "card.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"card\.json"):
        read_card(tmp_path / "card.json")


@pytest.mark.parametrize("name", ["name", "network", "classes", "preprocess"])
def test_card_without_a_field_is_refused_by_its_name(fields: dict[str, Any], name: str) -> None:
    del fields[name]
    with pytest.raises(WeightsError, match=rf"missing=\['{name}'\]"):
        Card.from_dict(fields)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"card"', b"\xff\xfe", b"[" * 200_000, b"1" * 5000])
def test_card_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"card\.json"):
        read_card(tmp_path / "card.json")


def test_card_with_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    card = Card("one", NetworkSpec((48, 96, 192), num_classes=1), (ClassLabel("cat"),), measured={"top1": math.nan})
    with pytest.raises(UsageError, match="JSON"):
        write_card(card, tmp_path / "card.json")
    assert not list(tmp_path.iterdir())


def test_default_classes_of_1000_are_those_of_imagenet() -> None:
    assert default_classes(1000)[281] == ClassLabel("tabby", "n02123045", 281)
    assert default_classes(3)[2] == ClassLabel("class 2")


def test_embedded_models_are_the_weights_that_have_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "EMBEDDED", tmp_path)
    for name in ("two.safetensors", "two.json", "one.safetensors", "one.json", "bare.safetensors", "lone.json"):
        (tmp_path / name).touch()
    assert embedded_models() == {"one": tmp_path / "one.safetensors", "two": tmp_path / "two.safetensors"}


def test_write_atomically_gives_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"data")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_write_atomically_keeps_the_old_file_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_read_file_refuses_what_is_no_ordinary_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (os.devnull, tmp_path / "pipe", tmp_path, tmp_path / "absent", "a\0b"):
        with pytest.raises(WeightsError):
            read_file(path, max_bytes=10)


def test_read_file_refuses_a_file_above_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", max_bytes=5) == b"12345"
    with pytest.raises(WeightsError, match="at most 4 bytes"):
        read_file(tmp_path / "file", max_bytes=4)

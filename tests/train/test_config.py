"""The options of a training run."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from weightnet.errors import UnknownModelError, UsageError
from weightnet.train.config import TrainConfig, read_options

REQUIRED = {"data": "photos", "out": "run"}


def options_of(tmp_path: Path, text: str, encoding: str = "utf-8") -> Mapping[str, Any]:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding=encoding)
    return read_options(path)


def test_defaults_are_the_originals_recipe() -> None:
    config = TrainConfig(**REQUIRED, batch_size=1024)
    assert config.peak_learning_rate == 0.5
    assert (config.momentum, config.weight_decay, config.label_smoothing) == (0.9, 4e-5, 0.1)
    assert (config.train_size, config.min_scale, config.jitter) == (224, 0.08, 0.4)
    assert (config.resize, config.crop, config.interpolation) == (256, 224, "linear")
    assert config.epochs * (1_281_167 // 1024) == pytest.approx(300_000, rel=0.01)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("epochs", 0, "at least 1"),
        ("epochs", 1.0, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", "3", "a whole number"),
        ("evaluate_every", 0, "at least 1"),
        ("batch_size", 1, "at least 2"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", float("inf"), "a finite number"),
        ("learning_rate", "0.1", "a finite number"),
        ("momentum", 1.0, "below 1"),
        ("momentum", -0.1, "at least 0"),
        ("ema_decay", 1.0, "below 1"),
        ("ema_decay", -1e-9, "at least 0"),
        ("label_smoothing", 1.0, "below 1"),
        ("weight_decay", -1e-5, "at least 0"),
        ("balance", 1.01, "from 0 to 1"),
        ("jitter", 1.01, "from 0 to 1"),
        ("jitter", -0.01, "from 0 to 1"),
        ("min_scale", 0.0, "above 0"),
        ("min_scale", 1.01, "at most 1"),
        ("train_size", 31, "from 32 to 2048 px"),
        ("crop", 31, "from 32 to 2048 px"),
        ("crop", 257, "at most resize"),
        ("resize", 4096, "at most 2048"),
        ("first_train_size", 31, "0, or from 32 px to train_size"),
        ("first_train_size", 225, "0, or from 32 px to train_size"),
        ("cache", -1, "0, or at least train_size"),
        ("cache", 223, "0, or at least train_size"),
        ("workers", -1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("checkpoint_minutes", -0.1, "at least 0"),
        ("interpolation", "cubic", "one of linear, area"),
        ("precision", "16", "one of 32-true, bf16-mixed, 16-mixed"),
        ("device", "gpu", "one of auto, cpu, cuda"),
        ("train_size", 2049, "from 32 to 2048 px"),
        ("batch_size", 2**63, "at most 1,000,000,000"),
        ("learning_rate", 1e300, "at most 1e\\+30"),
        ("terms", None, "text"),
        ("pretrained", 1, "text"),
        ("data", Path("photos"), "text"),
        ("data", "caf\udce9", "text"),
        ("out", "a\0b", "text"),
        pytest.param("learning_rate", 10**400, "at most", id="learning_rate-401 digits"),
    ],
)
def test_config_refuses_a_value_and_says_the_rule(name: str, value: object, rule: str) -> None:
    with pytest.raises(UsageError, match=rule) as error:
        TrainConfig(**{**REQUIRED, name: value})  # type: ignore[arg-type]
    assert f"Got {name}={value!r}" in str(error.value) or f"{name}={value}" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9999, "jitter": 1, "balance": 1, "min_scale": 1, "label_smoothing": 0},
        {"momentum": 0, "weight_decay": 0, "checkpoint_minutes": 0, "learning_rate": 1},
        {"cache": 224, "seed": 2**80, "batch_size": 2, "resize": 32, "crop": 32},
    ],
)
def test_config_takes_the_bounds(options: dict[str, Any]) -> None:
    config = TrainConfig(**REQUIRED, **options)
    assert all(getattr(config, name) == value for name, value in options.items())


def test_config_names_the_nearest_network() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean shufflenet_v2_x0_5"):
        TrainConfig(**REQUIRED, model="shufflenet_v2_05")


def test_from_options_names_the_nearest_option() -> None:
    with pytest.raises(UsageError, match=r"Got 'epoch'\. Did you mean epochs"):
        TrainConfig.from_options({**REQUIRED, "epoch": 3})


@pytest.mark.parametrize("name", ["data", "out"])
def test_from_options_asks_for_the_folders(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be given"):
        TrainConfig.from_options({**REQUIRED, name: None})


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "+1e-3", ".1e-2", "0.001", "1.e-3"])
def test_read_options_takes_every_way_to_write_a_number(tmp_path: Path, text: str) -> None:
    options = options_of(tmp_path, f"learning_rate: {text}")
    assert TrainConfig.from_options({**REQUIRED, **options}).learning_rate == 0.001


@pytest.mark.parametrize("text", ["1e3x", "e3", "x0_5", "n02084071", "1e"])
def test_read_options_keeps_text_that_only_looks_like_a_number(tmp_path: Path, text: str) -> None:
    assert options_of(tmp_path, f"terms: {text}") == {"terms": text}


def test_read_options_takes_an_empty_file(tmp_path: Path) -> None:
    assert options_of(tmp_path, "# nothing\n") == {}


@pytest.mark.parametrize(
    "text",
    [
        "- epochs",
        "epochs",
        "1: 2",
        "epochs: [",
        "!!python/object:os.system {}",
        "seed: 2024-13-01",
        "[" * 1500,
        "freeze: !!bool maybe",
        'epochs: !!int ""',
        "seed: !!timestamp foo",
        'a: "\\UFFFFFFFF"',
        "- &a [1, 1]\n- &b [*a, *a]\n- [*b, *b]",
    ],
)
def test_read_options_refuses_what_is_no_mapping_of_options(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="configuration file"):
        options_of(tmp_path, text)


def test_read_options_refuses_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="configuration file"):
        options_of(tmp_path, "terms: café", encoding="latin-1")


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_read_options_refuses_what_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="configuration file"):
        read_options(tmp_path / name)


def test_config_survives_yaml(tmp_path: Path) -> None:
    config = TrainConfig(**REQUIRED, weight_decay=4e-5, terms="photos: © nobody\nfree", pretrained=None)
    text = yaml.safe_dump(dataclasses.asdict(config), allow_unicode=True)
    assert TrainConfig.from_options(options_of(tmp_path, text)) == config


def test_config_module_needs_no_torch() -> None:
    code = "import sys, weightnet.train.config; sys.exit('torch' in sys.modules or 'lightning_fabric' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

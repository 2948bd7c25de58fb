import dataclasses
import json
import sys
import types

import cv2
import numpy as np
import pytest

from weightnet.cli.train import Flags
from weightnet.train.config import TrainConfig
from weightnet.zoo.cards import read_card


@pytest.fixture
def fitted(run_folder, monkeypatch) -> list:
    """What `fit` was called with; it trains nothing."""
    calls = []

    def fit(config, *, resume, report):
        calls.append((config, resume))
        step = {"step": 1, "total_steps": 2, "epoch": 1, "loss": 2.5, "photos_per_s": 10.0, "unreadable": 0}
        report(types.SimpleNamespace(**step, measured=None, taught=(64, 72)))
        report(types.SimpleNamespace(**step, measured=None, taught=None))
        report(types.SimpleNamespace(**step, measured={"photos": 3, "top1": 1 / 3}))
        return read_card(run_folder / "weights.json")

    monkeypatch.setitem(sys.modules, "weightnet.train.loop", types.SimpleNamespace(fit=fit))
    return calls


def test_train_takes_every_field_of_the_configuration_as_a_flag():
    assert [field.name for field in dataclasses.fields(Flags)] == [f.name for f in dataclasses.fields(TrainConfig)]
    assert set(dataclasses.asdict(Flags()).values()) == {None}


def test_train_gives_the_defaults_to_fit(weightnet, fitted):
    outcome = weightnet("train", "--data", "photos", "--out", "run")
    assert fitted == [(TrainConfig(data="photos", out="run"), False)]
    assert outcome == (0, "run: top1 0.2500\n", "epoch 1: photos 3, top1 0.3333\n")


def test_train_puts_flags_before_the_file_and_the_file_before_defaults(weightnet, fitted, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("data: photos\nout: run\nepochs: 7\nbatch_size: 64\nema_decay: 0.5\n")
    assert weightnet("train", "--config", file, "--batch-size", 32, "--resume", "--ema-decay", 0).code == 0
    assert fitted == [(TrainConfig(data="photos", out="run", epochs=7, batch_size=32, ema_decay=0), True)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs: 3", "Did you mean epochs?"),
        ("epochs: three", "epochs must be a whole number"),
        ("[1, 2]", "must map option names to values"),
        ("a: b: c", "must be readable YAML"),
        ("epochs: 3", "out must be given"),
    ],
)
def test_train_says_what_is_wrong_in_the_file(weightnet, fitted, tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    more = [] if message == "out must be given" else ["--out", "run"]
    outcome = weightnet("train", "--config", file, "--data", "photos", *more)
    assert (outcome.code, outcome.out, fitted) == (2, "", [])
    assert outcome.err.startswith("weightnet: usage: ")
    assert message in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data must be given"),
        (["--epochs", "0"], "epochs must be"),
        (["--precision", "8-bit"], '"32-true"'),
        (["--config", "missing.yaml"], "missing.yaml must be readable YAML"),
        (["photos"], "Unused Tokens"),
    ],
)
def test_train_says_what_is_wrong_with_the_flags(weightnet, fitted, arguments, message):
    folders = [] if not arguments else ["--data", "photos", "--out", "run"]
    outcome = weightnet("train", *folders, *arguments)
    assert (outcome.code, outcome.out, fitted) == (2, "", [])
    assert message in outcome.err


def test_train_reports_missing_data_with_exit_code_1(weightnet, tmp_path):
    outcome = weightnet("train", "--data", tmp_path / "no", "--out", tmp_path / "run")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("weightnet: data: ")


@pytest.mark.full
def test_train_makes_a_model_that_predict_takes(weightnet, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, label in enumerate(("dark", "light")):
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for index in range(8):
                picture = rng.integers(0, 60, (48, 48, 3)) + 180 * number
                cv2.imwrite(str(folder / f"{index}.png"), picture.astype(np.uint8))
    (tmp_path / "photos" / "train" / "light" / "9.png").write_bytes(b"no photo")
    run = tmp_path / "run"
    sizes = ["--train-size", 32, "--resize", 32, "--crop", 32, "--workers", 0, "--device", "cpu"]
    arguments = ["--data", tmp_path / "photos", "--out", run, "--epochs", 1, "--batch-size", 8, *sizes]
    outcome = weightnet("train", *arguments)
    assert outcome.code == 0
    assert outcome.out.startswith(f"{run}: ")
    assert f"1 photos could not be read and are left out, see {run / 'unreadable.csv'}" in outcome.err
    answered = weightnet("predict", tmp_path / "photos" / "val", "--model", run, "--json")
    assert answered.code == 0
    assert {score["label"] for row in json.loads(answered.out) for score in row["top"]} == {"dark", "light"}
    assert weightnet("train", *arguments).code == 1
    assert weightnet("train", *arguments, "--resume").code == 0

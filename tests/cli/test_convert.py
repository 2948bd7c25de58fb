import json

import pytest
from safetensors.torch import load_file, save_file

from weightnet.zoo.cards import read_card


@pytest.fixture
def bare(run_folder, tmp_path):
    """The run folder's weights without their card."""
    path = tmp_path / "bare.safetensors"
    path.write_bytes((run_folder / "weights.safetensors").read_bytes())
    return path


def test_convert_writes_weights_and_card_and_shows_its_gist(weightnet, run_folder, tmp_path):
    out = tmp_path / "out.safetensors"
    outcome = weightnet("convert", run_folder, out)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        f"{out}: tiny",
        "  network     ShuffleNetV2 16/32/64, WeightNet M=2 G=2",
        "  classes     5 (cat, dog, [red]fox[/red], ...)",
        "  input       BGR, short edge 40, crop 32, area",
        "  pixels      normalised by mean and std (as the card of the source says)",
    ]
    assert read_card(tmp_path / "out.json").preprocess.crop == 32
    assert weightnet("convert", out, tmp_path / "back.pkl").code == 0
    assert weightnet("convert", tmp_path / "back.pkl", tmp_path / "again.safetensors").code == 0


def test_convert_shows_that_the_statistics_cannot_tell(weightnet, bare, tmp_path):
    state = load_file(bare)
    state["first_conv.1.running_mean"].zero_()
    state["first_conv.1.running_var"].fill_(1)  # as at the beginning
    save_file(state, bare)
    outcome = weightnet("convert", bare, tmp_path / "out.safetensors")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].startswith("  pixels      normalised by mean and std; margin 0.0 nats; ")


def test_convert_shows_the_pixel_decision_with_its_margin(weightnet, bare, tmp_path):
    state = load_file(bare)
    sums = state["first_conv.0.weight"].abs().sum((1, 2, 3))
    state["first_conv.0.weight"] = state["first_conv.0.weight"].abs()
    state["first_conv.1.running_mean"] = 114 * sums
    state["first_conv.1.running_var"] = (57 * sums) ** 2
    save_file(state, bare)
    out = tmp_path / "out.safetensors"
    last = weightnet("convert", bare, out).out.splitlines()[-1]
    decision = json.loads((tmp_path / "out.json").read_text())["notes"]["pixels"]
    assert decision["margin"] > 2
    assert last == f"  pixels      raw 0..255; margin {decision['margin']} nats; {decision['decided_by']}"
    last = weightnet("convert", bare, out, "--pixels", "normalised").out.splitlines()[-1]
    assert last.startswith("  pixels      normalised by mean and std; margin ")


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("missing.pkl", "out.safetensors", "unknown model: "),
        ("run", "out.onnx", "usage: The output's suffix must be .safetensors"),
        ("run", "no/such/folder/out.safetensors", "usage: The output's folder must exist"),
    ],
)
def test_convert_says_what_it_cannot_do(weightnet, run_folder, tmp_path, monkeypatch, source, out, message):
    monkeypatch.chdir(tmp_path)
    outcome = weightnet("convert", run_folder if source == "run" else source, out)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"weightnet: {message}")
    assert list(tmp_path.iterdir()) == []

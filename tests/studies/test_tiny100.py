"""The study: what it starts from, what it makes of its runs, and that its page's results are those of its runs."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import weightnet

FOLDER = Path(__file__).parents[2] / "studies" / "tiny100"


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "study.py"))


def test_ports_start_from_kernels_of_a_standard_deviation_of_one(study: dict[str, Any], tmp_path: Path) -> None:
    start = study["ports_start"]("shufflenet_v2_x0_5", 0, tmp_path / "start.safetensors")
    ports = weightnet.load(start)
    torch.manual_seed(0)
    ours = weightnet.load("shufflenet_v2_x0_5", num_classes=study["CLASSES"])
    for name, weight in ports.named_parameters():
        own = ours.get_parameter(name)
        if "wn_fc2" in name:
            assert weight.std().item() == pytest.approx(1, abs=0.1)
            assert own.std().item() < 0.2
        else:
            assert torch.equal(weight, own)


def test_paired_difference_has_the_interval_of_students_t(study: dict[str, Any]) -> None:
    top1 = {"plain": [0.20, 0.22, 0.21], "weightnet_1x": [0.23, 0.26, 0.25]}
    runs = [{"arm": arm, "seed": seed, "top1": value} for arm, by in top1.items() for seed, value in enumerate(by)]
    pair = study["paired"](runs, "weightnet_1x", "plain")
    assert pair["mean"] == pytest.approx(0.11 / 3)
    # 4.303 standard errors of 0.03, 0.04, 0.04
    assert pair["interval_95"] == pytest.approx([0.11 / 3 - 0.014343, 0.11 / 3 + 0.014343], abs=1e-5)
    assert study["paired"](runs[:4], "weightnet_1x", "plain") is None  # one seed in both says nothing


def test_results_are_those_of_their_runs(study: dict[str, Any]) -> None:
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((FOLDER / "study.yaml").read_text(encoding="utf-8"))
    assert results == json.loads(json.dumps(study["summary"](settings, results["runs"])))
    got = [(run["arm"], run["seed"]) for run in results["runs"]]
    assert got == [(arm, seed) for arm in settings["arms"] for seed in settings["seeds"]]

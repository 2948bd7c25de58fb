"""The base install, which has no PyTorch: played by a Python that finds none; `.ci/check_base.py` has a real one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAT = ROOT / "examples" / "cat.png"

WITHOUT_EXTRAS = """
import sys

EXTRAS = {"fastapi", "jaxtyping", "lightning_fabric", "matplotlib", "onnx", "openvino", "pyarrow", "torch"}

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


def base(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter of the base, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT_EXTRAS + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def weightnet(*arguments: object) -> subprocess.CompletedProcess[str]:
    return base("from weightnet.cli import main\nsys.exit(main())", *arguments)


def test_base_predicts() -> None:
    done = weightnet("predict", CAT, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["status"], row["top"][0]["label"]) == ("ok", "cat")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_base_classifies_many(tmp_path: Path, form: str) -> None:
    done = weightnet("classify-many", CAT, "--out", tmp_path / "answers", "--format", form)
    assert (done.returncode, done.stdout) == (0, "images 1, ok 1, errors 0, partitions 1\n"), done.stderr
    assert "cat" in (tmp_path / f"answers/part-00000.{form}").read_text(encoding="utf-8")


def test_base_evaluates_with_a_report(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "photo.png").symlink_to(CAT)
    report = tmp_path / "report.html"
    done = weightnet("evaluate", "default", tmp_path / "photos", "--json", "--report", report)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top1"] == 0.5
    assert "<html" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "command", ["", "classify-many", "convert", "evaluate", "export", "models", "predict", "serve", "train"]
)
def test_base_shows_all_help(command: str) -> None:
    done = weightnet(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "weightnet" in done.stdout


def test_base_has_what_needs_no_network_in_python() -> None:
    done = base(
        "import weightnet\n"
        f"top = weightnet.Classifier()({str(CAT)!r})[0].top[0]\n"
        "assert 'default' in weightnet.list_models()\n"
        "size = weightnet.transforms.Resize(256).output_size\n"
        "print(top.label, size, weightnet.preprocess_for('default').crop, weightnet.NetworkSpec((48, 96, 192)).G)"
    )
    assert (done.stdout, done.stderr) == ("cat 256 176 0\n", "")


@pytest.mark.parametrize(
    ("arguments", "what", "extra"),
    [
        (["predict", CAT, "--engine", "torch"], "The model 'default'", "torch"),
        (["predict", CAT, "--model", "shufflenet_v2_x0_5"], "The model 'shufflenet_v2_x0_5'", "torch"),
        (["evaluate", "default", ROOT / "examples", "--engine", "torch"], "The model 'default'", "torch"),
        (["convert", "default", "out.pkl"], "`weightnet convert`", "torch"),
        (["export", "default", "out.onnx"], "`weightnet export`", "export"),
        (["train", "--data", ROOT, "--out", "out"], "`weightnet train`", "train"),
    ],
)
def test_base_says_what_to_install_for_what_needs_pytorch(arguments: list[object], what: str, extra: str) -> None:
    done = weightnet(*arguments)
    said = f"weightnet: missing package: {what} needs PyTorch. Install it by: pip install 'weightnet[{extra}]'\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_base_says_of_a_wrong_name_that_it_is_wrong() -> None:
    done = weightnet("predict", CAT, "--model", "defualt")
    assert done.returncode == 2
    assert "Did you mean default?" in done.stderr


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        *((name, "torch") for name in ("ShuffleNetV2", "WeightNet2d", "complexity", "convert", "fold", "functional")),
        *((name, "torch") for name in ("load", "set_form")),
        ("export_model", "export"),
    ],
)
def test_base_says_of_a_public_name_that_it_needs_pytorch(name: str, extra: str) -> None:
    done = base(f"import weightnet\ntry: weightnet.{name}\nexcept weightnet.MissingDependencyError as e: print(e)")
    said = f"weightnet.{name} needs PyTorch. Install it by: pip install 'weightnet[{extra}]'\n"
    assert (done.stdout, done.stderr) == (said, "")


def test_base_says_of_the_hub_pages_modules_that_they_need_pytorch() -> None:
    done = base("import weightnet.compat")
    assert "MissingDependencyError: weightnet.compat needs PyTorch. Install it by:" in done.stderr

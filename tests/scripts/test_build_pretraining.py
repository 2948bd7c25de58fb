"""The data set for pre-training: which photos it keeps, and in which class."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_pretraining.py"
spec = importlib.util.spec_from_file_location("build_pretraining", SCRIPT)
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small Everyday-112 and two collections, of which the script reads names and bytes alone."""
    monkeypatch.chdir(tmp_path)
    files = {
        "everyday/train/cat/1.jpg": "cat",
        "everyday/val/ant/2.jpg": "ant",
        "mini/train/n02219486/3.jpg": "ant of ImageNet",
        "mini/test/n01440764/4.jpg": "tench",
        "mini/test/n02123045/5.jpg": "tabby",
        "tiny/n02123045/images/6.JPEG": "tabby",
        "tiny/n02123045/boxes.txt": "no photo",
    }
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    Path("everyday/classes.csv").write_text(
        "folder,label,wnid,imagenet_index\ncat,cat,n02121620,\nant,ant,n02219486,310\nn01440764,tench,n01440764,0\n"
    )
    return ["--everyday", "everyday", "--photos", "mini", "tiny", "--out", "out"]


def run(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    script.main()


def test_build_joins_classes_and_leaves_out_imagenette(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(options, monkeypatch)
    kept = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    in_any_split = {name.split("/", 1)[1] for name in kept}
    assert in_any_split == {"cat/1.jpg", "ant/2.jpg", "ant/0_3.jpg", "n02123045/0_5.jpg"}
    assert {"train/cat/1.jpg", "val/ant/2.jpg"} <= kept
    by_split = [sum(name.startswith(split) for name in kept) for split in ("train", "val")]
    assert capsys.readouterr().out == "train: {} photos, val: {} photos\n".format(*by_split)


def test_build_adds_kinds_of_the_classes_to_train_alone(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        Path(f"mini/train/n02219486/more{number}.jpg").write_text(str(number))
    Path("mini/train/n02114548").mkdir()
    Path("mini/train/n02114548/wolf.jpg").write_text("wolf")
    run([*options, "--kinds", "2"], monkeypatch)
    kept = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    added = {"train/ant/0_3.jpg", "train/ant/0_more0.jpg", "train/cat/0_5.jpg"}
    assert kept == {"classes.csv", "train/cat/1.jpg", "val/ant/2.jpg"} | added


def test_build_puts_two_of_a_hundred_aside(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1000):
        Path(f"mini/train/n02219486/more{number}.jpg").write_text(str(number))
    run(options, monkeypatch)
    assert 5 <= len(list(Path("out/val/ant").glob("0_*"))) <= 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("out").mkdir(), "new folder"),
        (lambda: Path("mini/train/n02219486").rename("mini/train/ant"), "wnid"),
        (lambda: Path("mini/train/n02219486").rename("mini/train/n00000001"), "ImageNet class"),
        (lambda: Path("everyday/classes.csv").write_bytes(b"\xff"), "CSV"),
        (lambda: Path("everyday/classes.csv").unlink(), "classes.csv"),
    ],
)
def test_build_refuses_what_it_is_not_made_for(
    options: list[str], monkeypatch: pytest.MonkeyPatch, change: object, message: str
) -> None:
    assert callable(change)
    change()
    with pytest.raises(SystemExit, match=message):
        run(options, monkeypatch)
    assert not list(Path("out").glob("*")), "nothing is left"
    assert not Path("out.partial").exists()

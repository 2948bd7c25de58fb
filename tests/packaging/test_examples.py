"""The files in examples/ are what their README says."""

import hashlib
import runpy
import sys
from pathlib import Path

import pytest
import skimage

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_cat_is_the_file_of_scikit_image() -> None:
    original = Path(skimage.__file__).parent / "data" / "chelsea.png"
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (original, EXAMPLES / "cat.png")]
    assert digests[0] == digests[1]


def test_predict_script_names_the_cat_and_reports_a_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no photo")
    monkeypatch.setattr(sys, "argv", ["predict.py", str(EXAMPLES / "cat.png"), str(bad)])
    runpy.run_path(str(EXAMPLES / "predict.py"), run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{EXAMPLES / 'cat.png'}: cat (")
    assert first.endswith("%)")
    assert second.startswith(f"{bad}: a photo must be a JPEG, PNG,")

"""The public surface of the package: what is there, and that nothing heavy comes with it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import weightnet

FIXED_NAMES = {
    "Classifier",
    "NetworkSpec",
    "Prediction",
    "Preprocess",
    "ShuffleNetV2",
    "WeightNet2d",
    "complexity",
    "convert",
    "functional",
    "list_models",
    "load",
    "preprocess_for",
    "set_form",
    "transforms",
}


def python(code: str) -> str:
    """Run code in a new interpreter and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import weightnet; dir(weightnet); weightnet.UsageError", set()),
        ("import weightnet; weightnet.list_models(); weightnet.Preprocess", {"numpy"}),
        ("import weightnet; weightnet.Classifier", {"numpy"}),
    ],
)
def test_import_brings_nothing_heavy(code: str, allowed: set[str]) -> None:
    heavy = {"torch", "numpy", "cv2", "PIL", "requests", "pooch", "rich", "lightning"}
    loaded = python(f"import sys; {code}; print(*sys.modules)").split()
    assert heavy.intersection(loaded) <= allowed


def test_all_names_are_there_and_each_is_in_its_home() -> None:
    assert FIXED_NAMES <= set(weightnet.__all__) <= set(dir(weightnet))
    for name in weightnet.__all__:
        assert getattr(weightnet, name) is not None


def test_names_for_type_checkers_are_those_of_the_running_program() -> None:
    tree = ast.parse(Path(weightnet.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    checked = {
        alias.name: str(node.module).removeprefix("weightnet").removeprefix(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked == weightnet._HOMES


def test_submodules_can_be_reached_without_importing_them() -> None:
    assert python("import weightnet; print(weightnet.transforms.Resize(256).output_size)") == "256"
    assert python("import weightnet; print(weightnet.functional.generate_kernels.__name__)") == "generate_kernels"


def test_every_error_class_is_public() -> None:
    from weightnet import errors

    classes = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    assert classes - {"nearest", "needs_torch"} <= set(weightnet.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'resnet50'"):
        weightnet.resnet50  # noqa: B018

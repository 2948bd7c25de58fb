"""What the package declares is what it is: versions, pins, types, and that the tests check shapes."""

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import weightnet
from weightnet.nn import functional as WF

ROOT = Path(__file__).parents[2]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def requirements() -> list[Requirement]:
    project = pyproject()["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "weightnet"]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_pinned_torch_is_the_one_that_the_readme_names() -> None:
    named = re.findall(r"torch==([\d.]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert named == [pins()["torch"]]


def test_version_is_the_same_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[([\d.]+)\]", changelog, re.MULTILINE)[1] == weightnet.__version__  # type: ignore[index]
    assert importlib.metadata.version("weightnet") == weightnet.__version__


def test_package_says_that_it_is_typed() -> None:
    assert Path(weightnet.__file__).with_name("py.typed").is_file()


def test_declared_pythons_have_a_classifier_each() -> None:
    project = pyproject()["project"]
    versions = [text.rpartition(" ")[2] for text in project["classifiers"] if " 3." in text]
    assert versions == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == ">=3.11"


def test_shapes_are_checked_while_testing() -> None:
    gates, bank = torch.ones(2, 6, 2, 1), torch.ones(6, 2, 1, 2, 1, 1)
    with pytest.raises(TypeCheckError):
        WF.weightnet_conv2d_reference(torch.ones(4, 3, 3), gates, bank)  # no batch
    with pytest.raises(TypeCheckError):
        WF.generate_kernels(torch.ones(2, 6, 3, 1), bank)  # another number of blocks

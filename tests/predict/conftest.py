"""A small network as a file for each runtime, and the ways to run them."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from weightnet.export.model import export_model

BATCH = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
needs_mnn = pytest.mark.skipif(not find_spec("MNN"), reason="needs MNN")
WAYS = [
    (".onnx", "onnxruntime"),
    (".onnx", "openvino"),
    (".xml", "openvino"),
    pytest.param(".mnn", "mnn", marks=needs_mnn),
]


@pytest.fixture(scope="module")
def exported(tiny_network, tmp_path_factory) -> Path:
    """A folder with the small network as net.onnx, net.xml and net.mnn."""
    folder = tmp_path_factory.mktemp("exported")
    for suffix in (".onnx", ".xml", *[".mnn"] * bool(find_spec("MNN"))):
        export_model(tiny_network, folder / f"net{suffix}", outputs=["pre_logits"])
    return folder


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))

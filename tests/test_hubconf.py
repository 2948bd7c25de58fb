"""The repository as a source for `torch.hub`."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from weightnet.nn.variants import VARIANTS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hubconf() -> ModuleType:
    """The file, imported as the hub imports it."""
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hub_lists_the_twelve_networks_and_nothing_else(hubconf: ModuleType) -> None:
    entries = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert sorted(entries) == sorted(name.replace(".", "_") for name in VARIANTS)  # by the rule of torch.hub.list


def test_hub_dependencies_are_importable(hubconf: ModuleType) -> None:
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v2_x0_5.plain", "shufflenet_v2_x0_5.wn8x"])
def test_hub_load_builds_the_network_of_that_name(name: str) -> None:
    network = torch.hub.load(str(ROOT), name.replace(".", "_"), source="local", num_classes=5, in_channels=1)
    assert (network.num_classes, network.spec.in_channels) == (5, 1)
    assert (network.spec.M, network.spec.G) == (VARIANTS[name].spec.M, VARIANTS[name].spec.G)


@pytest.mark.parametrize("name", VARIANTS)
def test_hub_entry_passes_on_what_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import weightnet

    monkeypatch.setattr(weightnet, "load", lambda *args, **options: (args, options))
    options = {"pretrained": "w.pkl", "num_classes": 3, "in_channels": 4, "progress": False}
    assert torch.hub.load(str(ROOT), name.replace(".", "_"), source="local", **options) == ((name,), options)


def test_hub_entry_says_which_row_it_is(hubconf: ModuleType) -> None:
    assert VARIANTS["shufflenet_v2_x1_0.wn4x"].title in hubconf.shufflenet_v2_x1_0_wn4x.__doc__
    assert hubconf.shufflenet_v2_x1_0_wn4x.__name__ == "shufflenet_v2_x1_0_wn4x"


def test_hub_works_from_a_clone_that_is_not_installed(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util, torch\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path = [p for p in sys.path if not p.endswith('src')]\n"
        "assert importlib.util.find_spec('weightnet') is None\n"
        f"network = torch.hub.load({str(ROOT)!r}, 'shufflenet_v2_x0_5_plain', source='local', num_classes=2)\n"
        "print(network(torch.zeros(2, 3, 32, 32)).shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert result.stdout == "torch.Size([2, 2])\n", result.stderr

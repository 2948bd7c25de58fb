"""Names of models and where their weights lie."""

import dataclasses
import sys
from pathlib import Path

import pytest

from weightnet.errors import DownloadError
from weightnet.nn.variants import VARIANTS
from weightnet.zoo import hub
from weightnet.zoo.cards import embedded_models
from weightnet.zoo.hub import PUBLISHED, cached_path, embedded_export, find_weights, list_models

from .conftest import BODY, Server


def test_list_models_gives_the_twelve_networks_first() -> None:
    assert list_models()[:12] == list(VARIANTS)
    assert list_models("*wn4x") == [f"shufflenet_v2_x{width}.wn4x" for width in ("1_0", "1_5", "2_0")]
    assert list_models("resnet*") == []


def test_published_checkpoints_are_the_four_of_the_original_authors() -> None:
    assert list(PUBLISHED) == [name for name in VARIANTS if "." not in name]
    assert PUBLISHED["shufflenet_v2_x1_5"].url == (
        "https://data.megengine.org.cn/models/weights/wnet/snetv2_1.5x_wnet1x_M2G2.model"
    )


def test_find_weights_of_a_name_looks_for_its_checkpoint_in_the_cache(cache: Path) -> None:
    cache.mkdir()
    (cache / "snetv2_2.0x_wnet1x_M2G2.model").write_bytes(b"\x80weights")
    assert find_weights("shufflenet_v2_x2_0") == cache / "snetv2_2.0x_wnet1x_M2G2.model"


def test_embedded_export_lies_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "embedded_models", lambda: {"one": tmp_path / "one.safetensors"})
    assert embedded_export("one") is None
    (tmp_path / "one.onnx").touch()
    assert embedded_export("one") == tmp_path / "one.onnx"
    assert embedded_export("two") is None


def test_every_embedded_model_is_there_exported_and_small() -> None:
    for name, weights in embedded_models().items():
        exported = embedded_export(name)
        assert exported is not None
        assert max(path.stat().st_size for path in (weights, exported)) < 4_000_000


def test_find_weights_of_an_address_downloads_it(server: Server, cache: Path) -> None:
    assert find_weights(server.url).read_bytes() == BODY


def test_find_weights_checks_a_published_checkpoint_of_known_hash(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dataclasses.replace(PUBLISHED["shufflenet_v2_x0_5"], url=server.url, sha256="0" * 64)
    monkeypatch.setitem(PUBLISHED, "shufflenet_v2_x0_5", known)
    with pytest.raises(DownloadError, match="not the expected 0000"):
        find_weights("shufflenet_v2_x0_5")


@pytest.mark.parametrize("name", ["..", "a/../../b", "", "%2e%2e%2fetc", "w" * 500, "w?x=1", "w\\..\\x", "\u00e4"])
def test_cached_path_of_any_address_lies_in_the_cache_folder(cache: Path, name: str) -> None:
    path = cached_path(f"http://host/{name}")
    assert path.parent == cache
    assert len(path.name) < 120
    assert path.resolve().parent == cache.resolve()


def test_cached_paths_of_different_addresses_differ() -> None:
    addresses = ["http://a/w.bin", "http://b/w.bin", "https://a/w.bin", "http://a/w.bin?v=2", "http://a/w_bin"]
    assert len({cached_path(address) for address in addresses}) == len(addresses)


def test_cache_folder_is_the_platforms_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert hub.cache_folder() == tmp_path / "weightnet"

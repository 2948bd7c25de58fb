"""Hostile weights files: a WeightsError that names the file, never anything else."""

import io
import json
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from weightnet.errors import WeightsError, WeightsWarning
from weightnet.zoo.state import read_state
from weightnet.zoo.weights import load

from .conftest import TINY, Tensors, save_torch


class Payload:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def packed_torch(tensors: Tensors) -> bytes:
    """A PyTorch file whose entries are compressed, the way to make few bytes into very many."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(save_torch(tensors))) as plain,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry.filename))
    return buffer.getvalue()


def safetensors_of_header(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def with_attributes(
    tensors: "OrderedDict[str, torch.Tensor]", **attributes: object
) -> "OrderedDict[str, torch.Tensor]":
    """A dict with attributes in the place of its methods, which a file keeps."""
    vars(tensors).update(attributes)
    return tensors


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x80",
    "web page": b"<!DOCTYPE html><html>not found</html>",
    "text": b"hello " * 100,
    "json": json.dumps({"a": 1}).encode(),
    "protocol 0": pickle.dumps({"a": 1}, protocol=0),
    "huge header": safetensors_of_header({"a": ENTRY}, bytes(8), length=1 << 62),
    "header past the end": safetensors_of_header({"a": ENTRY}, b"", length=10**6),
    "header is no json": safetensors_of_header(b"{" * 64),
    "header is deep": safetensors_of_header(b'{"a":' * 100_000),
    "data past the end": safetensors_of_header({"a": {**ENTRY, "data_offsets": [0, 1 << 40]}}, bytes(8)),
    "shape is not the data": safetensors_of_header({"a": {**ENTRY, "shape": [1 << 40, 1 << 40]}}, bytes(8)),
    "negative shape": safetensors_of_header({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
    "overlapping data": safetensors_of_header({"a": ENTRY, "b": ENTRY}, bytes(8)),
    "data left over": safetensors_of_header({"a": ENTRY}, bytes(16)),
    "nothing inside": safetensors_of_header({}),
    "sixty-five axes": safetensors_of_header({"a": {**ENTRY, "shape": [1] * 65, "data_offsets": [0, 4]}}, bytes(4)),
    "zip without pickle": save_torch({})[:4] + bytes(100),
    "empty dict": save_torch({}),
    "method that is none": save_torch(with_attributes(OrderedDict(a=torch.zeros(2)), get=1, values=2)),
    "list of tensors": save_torch([torch.zeros(2)]),
    "number": save_torch(3),
    "nested": save_torch({"state_dict": {"a": {"b": torch.zeros(1)}}}),
    "names are numbers": save_torch({1: torch.zeros(2)}),
    "whole module": save_torch(nn.Linear(2, 2)),
    "repeated number": save_torch({"a": torch.zeros(1).expand(1 << 40)}),
    "sparse": save_torch({"a": torch.zeros(4, 4).to_sparse()}),
    "legacy torch": (lambda b: (torch.save({"a": torch.zeros(2)}, b, _use_new_zipfile_serialization=False), b)[1])(
        io.BytesIO()
    ).getvalue(),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_load_refuses_a_file_that_is_no_network(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"hostile{suffix}"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(WeightsError, match="hostile"):
        load(path)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_load_runs_nothing_that_a_file_asks_for(tmp_path: Path, write: Callable[[object, Path], object]) -> None:
    write({"a": Payload(tmp_path / "was run")}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt"):
        load(tmp_path / "w.pt")
    assert not (tmp_path / "was run").exists()


def test_load_refuses_a_packed_torch_file(tensors: Tensors, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(packed_torch(tensors))
    with pytest.raises(WeightsError, match="uncompressed"):
        load(tmp_path / "w.pt")


def test_load_refuses_an_index_out_of_all_proportion(tmp_path: Path) -> None:
    many = {f"{index:08}": ENTRY for index in range(80_000)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps(many, protocol=2) * 4)
    for content in (safetensors_of_header(many, bytes(8)), buffer.getvalue()):
        (tmp_path / "w").write_bytes(content)
        with pytest.raises(WeightsError, match="list of names and shapes"):
            load(tmp_path / "w")


def test_load_refuses_a_script_archive(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            archive.writestr(name, b"\x80\x02}.")
    (tmp_path / "w.pt").write_bytes(buffer.getvalue())
    with pytest.raises(WeightsError, match=r"constants\.pkl"):
        load(tmp_path / "w.pt")


@pytest.mark.parametrize("write", [save_safetensors, save_torch, lambda tensors: TINY.read_bytes()])
def test_load_refuses_a_truncated_file_at_any_length(
    tensors: Tensors, tmp_path: Path, write: Callable[[Tensors], bytes]
) -> None:
    whole = write(tensors)
    for length in [*range(0, 40, 7), *np.linspace(41, len(whole) - 1, 20).astype(int)]:
        (tmp_path / "w").write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            load(tmp_path / "w")


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a few bytes, most of them in the first or last parts, where headers are."""
    mutated = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(len(data)) * rng.random() ** 4)
        mutated[place if rng.random() < 0.6 else -1 - place] = int(rng.integers(256))
    return bytes(mutated[: int(rng.integers(len(data)))] if rng.random() < 0.1 else mutated)


def load_mutants(folder: Path, tensors: Tensors, count: int) -> int:
    """Load mutated files; return how many were refused. Anything but success and WeightsError fails the test."""
    rng, refused = np.random.default_rng(0), 0
    originals = [save_safetensors(tensors), save_torch(tensors)]
    for index in range(count):
        (folder / "w").write_bytes(mutate(originals[index % 2], rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", WeightsWarning)
                load(folder / "w")
        except WeightsError:
            refused += 1
    return refused


def test_load_survives_mutated_files(tensors: Tensors, tmp_path: Path) -> None:
    assert load_mutants(tmp_path, tensors, 30) > 5


@pytest.mark.full
def test_load_survives_very_many_mutated_files(tensors: Tensors, tmp_path: Path) -> None:
    assert load_mutants(tmp_path, tensors, 5000) > 1000


def test_read_state_gives_arrays_of_their_own(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "w").write_bytes(save_safetensors(tensors))
    state: dict[str, npt.NDArray[np.float32]] = read_state(tmp_path / "w")
    assert all(array.flags.writeable and array.flags.c_contiguous for array in state.values())
    assert list(state) == list(read_state(tmp_path / "w"))

"""Reading, writing and reshaping MegEngine state dicts: what honest files must give, to the bit."""

import collections
import gzip
import hashlib
import os
import pickle
import pickletools
import stat
import struct
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest

from weightnet.errors import WeightsError
from weightnet.zoo.megengine import (
    DTYPES,
    MAX_NAME_CHARACTERS,
    read_megengine,
    to_megengine_layout,
    to_torch_layout,
    write_megengine,
)
from weightnet.zoo.pickle_machine import read_pickle

State = dict[str, npt.NDArray[np.generic]]
DATA = Path(__file__).parents[1] / "data/megengine"
# SHA-256 over the names and bytes of all arrays of tiny.pkl, as Python's own unpickler gives them.
TINY_SHA256 = "ce27c5d5ed0fe19ddfc63c4b92ebab2ccc2714e06053958f4a0cb78a3cc3ed3f"


def digest(state: State) -> str:
    """Hash names, types, shapes and bytes, in order."""
    sha256 = hashlib.sha256()
    for name, array in state.items():
        sha256.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return sha256.hexdigest()


def assert_same(got: State, expected: State) -> None:
    """Names, order, types, shapes and bits are equal."""
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype.newbyteorder("<"), name
        assert got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


# Reading


def test_read_megengine_gives_the_known_arrays_of_the_committed_file() -> None:
    state = read_megengine(DATA / "tiny.pkl")
    assert len(state) == 217
    assert digest(state) == TINY_SHA256


@pytest.mark.parametrize("as_bytes", [True, False])
def test_read_megengine_takes_bytes_and_paths(as_bytes: bool) -> None:
    path = DATA / "tiny_rawcal.pkl"
    state = read_megengine(path.read_bytes() if as_bytes else str(path))
    assert state["first_conv.0.weight"].shape == (8, 3, 3, 3)


def test_read_megengine_reads_old_files_in_their_own_shapes() -> None:
    old, new = read_megengine(DATA / "tiny_mge051_py38.pkl"), read_megengine(DATA / "tiny.pkl")
    assert old["first_conv.1.running_var"].shape == (1, 8, 1, 1)
    assert_same(to_torch_layout(old), to_torch_layout(new))


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
def test_read_megengine_equals_unpickling_for_every_reference_file(shared: Path) -> None:
    paths = sorted((shared / "reference").rglob("*.pkl"))
    honest = [path for path in paths if "keepvar" not in path.name]
    assert len(honest) >= 9
    for path in honest:
        # NumPy 1 cannot unpickle what NumPy 2 wrote; those files hold the state dict of tiny.pkl again.
        by_numpy_2 = "numpy2" in path.name
        assert_same(read_megengine(path), pickle.loads((DATA / "tiny.pkl" if by_numpy_2 else path).read_bytes()))


def test_read_megengine_refuses_kept_variables_and_says_how_to_save() -> None:
    with pytest.raises(WeightsError, match=r"keep_var=True.*megengine\.save\(module\.state_dict\(\), path\)"):
        read_megengine(DATA / "tiny_mge051_py38_keepvar.pkl")


def test_read_megengine_gives_writable_contiguous_arrays_of_their_own() -> None:
    data = (DATA / "tiny.pkl").read_bytes()
    state = read_megengine(data)
    for array in state.values():
        assert array.flags.owndata
        assert array.flags.writeable
        assert array.flags.c_contiguous
        assert array.flags.aligned
        array.fill(0)
    assert digest(read_megengine(data)) == TINY_SHA256


def test_read_megengine_opens_the_state_dict_of_a_training_checkpoint() -> None:
    inner = collections.OrderedDict(a=np.arange(6, dtype=np.float32).reshape(2, 3))
    checkpoint = {"step": 300_000, "lr": 0.5, "state_dict": inner, "best": [1, 2.5, None, True], 7: -(2**40)}
    assert_same(read_megengine(pickle.dumps(checkpoint)), inner)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_read_pickle_equals_unpickling_for_plain_values(protocol: int) -> None:
    numbers = [0, 255, 256, 65_535, 65_536, -1, 2**31, -(2**63), 2**63 - 1, 0.1, -1e300, True, False, None]
    value = {"numbers": numbers, "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "text": "\u0416" * 300, 5: {}}
    got = read_pickle(pickle.dumps(value, protocol=protocol))
    assert repr(got) == repr(value)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_read_megengine_keeps_the_axes_of_a_transposed_array(protocol: int) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)  # not its own inverse
    assert_same(read_megengine(pickle.dumps({"a": array}, protocol=protocol)), {"a": array})


def arrays_of_any_layout() -> st.SearchStrategy[npt.NDArray[np.generic]]:
    """C order, Fortran order, transposed and strided arrays of every type that a file may hold."""
    shapes = hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
    plain = hypothesis.extra.numpy.arrays(st.sampled_from(list(DTYPES.values())), shapes)
    layouts = st.sampled_from(
        (
            np.asarray,
            np.asfortranarray,
            np.transpose,
            lambda array: np.moveaxis(array, 0, -1) if array.ndim else array,
            lambda array: array[::-1] if array.ndim else array,
        )
    )
    return st.builds(lambda array, layout: layout(array), plain, layouts)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=MAX_NAME_CHARACTERS).filter(str.isprintable)
states = st.dictionaries(names, arrays_of_any_layout(), min_size=1, max_size=5)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(state=states, protocol=st.integers(2, 5))
def test_read_megengine_equals_what_was_pickled(state: State, protocol: int) -> None:
    # Protocol 2 spells empty bytes as a call of `bytes`, which no checkpoint needs.
    hypothesis.assume(protocol > 2 or all(array.size for array in state.values()))
    data = pickle.dumps(collections.OrderedDict(state), protocol=protocol)
    assert_same(read_megengine(data), state)


def test_read_megengine_refuses_every_truncation() -> None:
    data = pickle.dumps({"conv.weight": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)}, protocol=4)
    for length in range(len(data)):
        with pytest.raises(WeightsError):
            read_megengine(data[:length])


# Other files


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"PK\x03\x04" + bytes(50), "a ZIP archive, perhaps a PyTorch checkpoint"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "a PyTorch checkpoint in the format before 1.6"),
        (struct.pack("<Q", 20) + b'{"__metadata__":{}}   ', "a safetensors file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n  <html>", "a web page"),
        (gzip.compress(b"x", mtime=0), "a gzip archive"),
        (b"\x93NUMPY\x01\0", "a NumPy array file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (pickle.dumps({"a": 1}, protocol=0), "protocol 0 or 1"),
        (pickle.dumps({"a": 1}, protocol=1), "protocol 0 or 1"),
        (b"\x80\x06}.", "other data"),
        (b"hello", "other data"),
    ],
)
def test_read_megengine_says_what_another_file_looks_like(data: bytes, match: str) -> None:
    with pytest.raises(WeightsError, match=match):
        read_megengine(data)


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe", "device", "null"])
def test_read_megengine_names_a_path_that_is_no_readable_file(kind: str, tmp_path: Path) -> None:
    path = {"folder": tmp_path, "device": Path("/dev/zero"), "null": "a\0b"}.get(kind, tmp_path / kind)
    if kind == "pipe":
        os.mkfifo(tmp_path / kind)
    with pytest.raises(WeightsError, match="file"):
        read_megengine(path)


def test_read_megengine_refuses_a_file_of_more_than_a_gibibyte(tmp_path: Path) -> None:
    with (tmp_path / "large.pkl").open("wb") as file:
        file.write(b"\x80\x04")
        file.truncate((1 << 30) + 1)
    tracemalloc.start()
    with pytest.raises(WeightsError, match="1073741824"):
        read_megengine(tmp_path / "large.pkl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# Writing


@pytest.mark.parametrize("name", ["tiny.pkl", "tiny_rawcal.pkl"])
def test_write_megengine_gives_the_bytes_that_the_original_wrote(name: str, tmp_path: Path) -> None:
    write_megengine(read_megengine(DATA / name), tmp_path / "out.pkl")
    assert (tmp_path / "out.pkl").read_bytes() == (DATA / name).read_bytes()


def test_write_megengine_gives_the_original_bytes_with_data_outside_frames(shared: Path, tmp_path: Path) -> None:
    original = shared / "reference/shufflenet_v2_x0_5.pkl"  # some arrays are larger than a frame
    write_megengine(read_megengine(original), tmp_path / "out.pkl")
    assert (tmp_path / "out.pkl").read_bytes() == original.read_bytes()


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(state=states)
def test_write_megengine_round_trip_is_exact(state: State, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.pkl"
    write_megengine(state, path)
    assert_same(read_megengine(path), state)


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(state=states)
def test_write_megengine_is_read_by_pythons_unpickler(state: State, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "unpickle.pkl"
    write_megengine(state, path)
    unpickled = pickle.loads(path.read_bytes())
    assert type(unpickled) is collections.OrderedDict
    assert_same(unpickled, state)


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
def test_write_megengine_writes_many_entries_of_late_types_and_all_sizes(tmp_path: Path) -> None:
    state: State = {f"layer.{index}.bias": np.full(3, index, np.float32) for index in range(2_345)}
    # A type that first occurs late is referred to by a long memo index.
    state |= {f"late.{size}": np.ones((1, size), np.int8) for size in (1, 255, 256, 65_535, 65_536, 70_000)}
    write_megengine(state, tmp_path / "many.pkl")
    data = (tmp_path / "many.pkl").read_bytes()
    assert_same(read_megengine(data), state)
    assert_same(pickle.loads(data), state)
    assert [opcode.name for opcode, _, _ in pickletools.genops(data)].count("SETITEMS") == 3  # as CPython's pickler


def test_write_megengine_stores_big_endian_arrays_as_little_endian(tmp_path: Path) -> None:
    write_megengine({"a": np.arange(5, dtype=">f4")}, tmp_path / "out.pkl")
    assert_same(read_megengine(tmp_path / "out.pkl"), {"a": np.arange(5, dtype="<f4")})


def test_write_megengine_keeps_the_old_file_and_leaves_nothing_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match="No space left"):
        write_megengine({"a": np.zeros(3)}, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_megengine_gives_the_file_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_megengine({"a": np.zeros(3)}, tmp_path / "out.pkl")
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "out.pkl")]
    assert rights[0] == rights[1]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must hold"),
        ({"": np.zeros(1)}, "printable text"),
        ({"a\n": np.zeros(1)}, "printable text"),
        ({"a" * 251: np.zeros(1)}, "printable text"),
        ({"a": np.zeros(1, complex)}, "'a'.*complex128"),
        ({"a": np.zeros(1, object)}, "'a'.*object"),
        ({"a": [1.0]}, "'a'.*list"),
        ({"a": np.zeros((1,) * 9)}, "at most 8 axes"),
    ],
)
def test_write_megengine_refuses_what_it_could_not_read_back(state: State, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        write_megengine(state, tmp_path / "out.pkl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", ".", "absent/out.pkl"])
def test_write_megengine_names_a_path_that_cannot_be_written(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="writ"):
        write_megengine({"a": np.zeros(1)}, path)
    assert not list(tmp_path.iterdir())


# Layouts


def groups_of(state: State) -> dict[str, int]:
    """The groups of all grouped weights of a state dict in MegEngine's layout."""
    return {name: array.shape[0] for name, array in state.items() if array.ndim == 5}


@pytest.mark.parametrize("name", ["tiny.pkl", "tiny_mge051_py38.pkl"])
def test_layouts_there_and_back_give_the_same_file(name: str, tmp_path: Path) -> None:
    state = read_megengine(DATA / name)
    torch_state = to_torch_layout(state)
    back = to_megengine_layout(torch_state, groups=groups_of(state), old_statistics="mge051" in name)
    assert_same(back, state)


def test_to_torch_layout_gives_shapes_that_torch_layers_take() -> None:
    shapes = {name: array.shape for name, array in to_torch_layout(read_megengine(DATA / "tiny.pkl")).items()}
    assert shapes["first_conv.0.bias"] == (8,)
    assert shapes["features.0.reduce.bias"] == (16,)
    assert shapes["features.0.wnet1.wn_fc1.weight"] == (16, 16, 1, 1)
    assert shapes["features.0.wnet1.wn_fc2.weight"] == (64, 1, 1, 1)
    assert shapes["classifier.0.weight"] == (10, 96)


def test_to_torch_layout_keeps_the_order_inside_groups() -> None:
    weight = np.arange(2 * 3 * 4 * 5 * 5, dtype=np.float32).reshape(2, 3, 4, 5, 5)
    converted = to_torch_layout({"conv.weight": weight})["conv.weight"]
    np.testing.assert_array_equal(converted[1 * 3 + 2, 3], weight[1, 2, 3])


def test_to_torch_layout_flattens_batch_norm_weights_of_rank_4() -> None:
    state = {f"bn.{kind}": np.ones((1, 6, 1, 1)) for kind in ("weight", "bias", "running_mean", "running_var")}
    assert {array.shape for array in to_torch_layout(state).values()} == {(6,)}


def test_to_torch_layout_keeps_a_one_channel_convolution_of_rank_4() -> None:
    assert to_torch_layout({"conv.weight": np.ones((1, 6, 1, 1))})["conv.weight"].shape == (1, 6, 1, 1)


@pytest.mark.parametrize(
    "entry",
    [
        ("conv.weight", np.zeros((2, 3, 3))),
        ("conv.weight", np.zeros((1, 2, 3, 4, 5, 6))),
        ("conv.weight", np.zeros(())),
        ("conv.bias", np.zeros((2, 3))),
        ("conv.bias", np.zeros((1, 3, 2, 1))),
        ("bn.running_var", np.zeros((3, 1, 1))),
        ("conv.weight", np.zeros((2, 3, 1, 1), np.int32)),
        ("conv.mask", np.zeros(4, bool)),
    ],
    ids=lambda entry: f"{entry[0]}-{entry[1].dtype}-{entry[1].ndim}d",
)
def test_layouts_refuse_other_shapes_and_types_by_name(entry: tuple[str, npt.NDArray[np.generic]]) -> None:
    with pytest.raises(WeightsError, match=f"'{entry[0]}'"):
        to_torch_layout(dict([entry]))
    if entry[1].ndim != 5:
        with pytest.raises(WeightsError, match=f"'{entry[0]}'"):
            to_megengine_layout(dict([entry]), groups={})


def test_to_megengine_layout_drops_counters_and_gives_float32() -> None:
    state = {"bn.weight": np.ones(2, np.float16), "bn.num_batches_tracked": np.array(5)}
    converted = to_megengine_layout(state, groups={})
    assert list(converted) == ["bn.weight"]
    assert converted["bn.weight"].dtype == np.float32


def test_to_megengine_layout_leaves_batch_norm_and_linear_biases_flat() -> None:
    state = {"fc.weight": np.ones((4, 3)), "fc.bias": np.ones(4), "bn.weight": np.ones(5), "bn.bias": np.ones(5)}
    shapes = [array.shape for array in to_megengine_layout(state, groups={}).values()]
    assert shapes == [(4, 3), (4,), (5,), (5,)]


@pytest.mark.parametrize("groups", [{"conv.weight": 4}, {"conv.weight": 0}, {"absent.weight": 2}, {"bn.weight": 2}])
def test_to_megengine_layout_refuses_groups_that_do_not_fit(groups: dict[str, int]) -> None:
    state = {"conv.weight": np.ones((6, 1, 3, 3)), "bn.weight": np.ones(6)}
    with pytest.raises(WeightsError, match=f"{next(iter(groups))}"):
        to_megengine_layout(state, groups=groups)

"""Hostile and damaged files: a clear error, nothing run, little time and memory."""

import collections
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from weightnet.errors import WeightsError
from weightnet.zoo.megengine import read_megengine
from weightnet.zoo.pickle_machine import GLOBALS, MAX_OPCODES

HEADER = b"\x80\x04"
MIB = 1 << 20


def text(value: str) -> bytes:
    """Opcodes that push text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def binary(value: bytes) -> bytes:
    """Opcodes that push bytes."""
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value: int) -> bytes:
    """Opcodes that push an integer."""
    width = 9 if abs(value) >= 1 << 63 else 8
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little", signed=True)


def name(module: str, qualname: str) -> bytes:
    """Opcodes that push a global."""
    return f"c{module}\n{qualname}\n".encode()


RECONSTRUCT = name("numpy.core.multiarray", "_reconstruct")
EMPTY_ARRAY = RECONSTRUCT + name("numpy", "ndarray") + integer(0) + b"\x85" + binary(b"b") + b"\x87R"
PLAIN_STATE = b"(" + integer(3) + text("<") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
FLOAT32 = name("numpy", "dtype") + text("f4") + b"\x89\x88\x87R" + PLAIN_STATE


def shape_of(*sizes: int) -> bytes:
    """Opcodes that push a tuple of integers."""
    return b"(" + b"".join(map(integer, sizes)) + b"t"


def array(
    shape: bytes, dtype: bytes = FLOAT32, data: bytes = b"B\x04\0\0\0\0\0\0\0", fortran: bytes = b"\x89"
) -> bytes:
    """Opcodes that push an array, with any of its parts replaced."""
    return EMPTY_ARRAY + b"(" + integer(1) + shape + dtype + fortran + data + b"tb"


def dtype_of(code: str, state: bytes = PLAIN_STATE) -> bytes:
    """Opcodes that push a dtype."""
    return name("numpy", "dtype") + text(code) + b"\x89\x88\x87R" + state


def file_of(*values: bytes) -> bytes:
    """A whole file: a dict of the given values, named a, b, c, ..."""
    items = b"".join(text(chr(ord("a") + index)) + value for index, value in enumerate(values))
    return HEADER + name("collections", "OrderedDict") + b")R(" + items + b"u."


ONE = array(shape_of(1))
ARRAY_STATE = ONE.removeprefix(EMPTY_ARRAY).removesuffix(b"b")


def assert_refused(data: bytes, match: str = "Got", *, peak_bytes: int = 4 * MIB, cpu_s: float = 1.0) -> None:
    """The file is refused with a clear error, in little memory and time."""
    start = time.process_time()
    with pytest.raises(WeightsError):  # once for the time, which watching memory takes five times of
        read_megengine(data)
    assert time.process_time() - start < cpu_s
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=match) as caught:
            read_megengine(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < peak_bytes
    message = str(caught.value)
    assert len(message) < 700
    assert message.isprintable()
    assert ". Got " in message


def test_file_of_builds_what_the_reader_reads() -> None:
    state = read_megengine(file_of(ONE, array(shape_of(2, 1), data=binary(np.float32([1, 2]).tobytes()))))
    assert state["a"].tolist() == [0.0]
    assert state["b"].tolist() == [[1.0], [2.0]]


# Code


class Evil:
    """Pickles as a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_read_megengine_never_calls_what_a_pickle_names(protocol: int, tmp_path: Path) -> None:
    state = collections.OrderedDict(a=np.zeros(3, np.float32), b=Evil(tmp_path / "ran"))
    assert_refused(pickle.dumps(state, protocol=protocol), r"'(posix|nt)\.system'.*nothing was run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "qualname"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("__builtin__", "bytes"),
        ("numpy", "load"),
        ("numpy", "frombuffer"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct.__call__"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "defaultdict"),
        ("copyreg", "_reconstructor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("__main__", "OrderedDict"),
        ("", ""),
        ("a\x1b[2J", "b" * 900),
    ],
)
def test_read_megengine_refuses_all_other_globals(module: str, qualname: str) -> None:
    assert_refused(file_of(name(module, qualname)), "asks for global=")
    assert_refused(file_of(text(module) + text(qualname) + b"\x93"), "asks for global=")


def test_the_globals_that_have_stand_ins_are_these() -> None:
    assert sorted(GLOBALS) == [
        "_codecs.encode",
        "collections.OrderedDict",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.numeric._frombuffer",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.numeric._frombuffer",
        "numpy.dtype",
        "numpy.ndarray",
    ]


@pytest.mark.parametrize(
    "opcodes",
    [
        pytest.param(b"(ios\nsystem\n", id="INST"),
        pytest.param(b"(" + name("collections", "OrderedDict") + b"o", id="OBJ"),
        pytest.param(name("collections", "OrderedDict") + b")\x81", id="NEWOBJ"),
        pytest.param(name("collections", "OrderedDict") + b")}\x92", id="NEWOBJ_EX"),
        pytest.param(b"\x82\x01", id="EXT1"),
        pytest.param(b"\x83\x01\0", id="EXT2"),
        pytest.param(b"\x84\x01\0\0\0", id="EXT4"),
        pytest.param(b"Pos.system\n", id="PERSID"),
        pytest.param(b"NQ", id="BINPERSID"),
        pytest.param(b"\x97", id="NEXT_BUFFER"),
        pytest.param(binary(b"x") + b"\x98", id="READONLY_BUFFER"),
        pytest.param(b"N2", id="DUP"),
        pytest.param(b"NN0", id="POP"),
        pytest.param(b"N(N1", id="POP_MARK"),
        pytest.param(b"\x8f", id="EMPTY_SET"),
        pytest.param(b"(\x91", id="FROZENSET"),
        pytest.param(b"I" + b"9" * 500_000 + b"\n", id="INT of quadratic cost"),
        pytest.param(b"L" + b"9" * 500_000 + b"L\n", id="LONG of quadratic cost"),
        pytest.param(b"\x8b\xff\xff\xff\x7f", id="LONG4"),
        pytest.param(b"F1e999\n", id="FLOAT"),
        pytest.param(b"S'a'\n", id="STRING"),
        pytest.param(b"Va\\u0041\n", id="UNICODE"),
        pytest.param(b"T\xff\xff\xff\xff", id="BINSTRING"),
        pytest.param(b"Np0\n", id="PUT"),
        pytest.param(b"g0\n", id="GET"),
        pytest.param(b"\xff", id="unknown"),
    ],
)
def test_read_megengine_refuses_all_other_opcodes(opcodes: bytes) -> None:
    assert_refused(file_of(opcodes), "opcodes must be")


@pytest.mark.parametrize(
    ("opcodes", "match"),
    [
        (name("collections", "OrderedDict") + b")R}" + text("__class__") + name("numpy", "ndarray") + b"sb", "state"),
        (name("collections", "OrderedDict") + b"}b", "state"),
        (ONE + b"}b", "plain numbers"),
        (FLOAT32 + b"}b", "plain numbers"),
        (ONE + ARRAY_STATE + b"b", "plain numbers"),
        (ONE + b"r\xff\xff\xff\x7f", "memo indices"),
        (FLOAT32 + PLAIN_STATE, "plain numbers"),
        (name("numpy", "ndarray") + shape_of(10**9) + b"R", "another call of numpy.ndarray"),
        (name("numpy", "dtype") + text("f4") + b"\x85R", "another call of numpy.dtype"),
        (name("collections", "OrderedDict") + b"}\x85R", "another call of collections.OrderedDict"),
        (name("_codecs", "encode") + text("x") + text("unicode_escape") + b"\x86R", "another call of _codecs.encode"),
        (RECONSTRUCT + name("collections", "OrderedDict") + shape_of(0) + binary(b"b") + b"\x87R", "another call"),
        (RECONSTRUCT + name("numpy", "ndarray") + shape_of(10**9) + binary(b"b") + b"\x87R", "another call"),
        (text("os.system") + b")R", "known global"),
        (ONE + b")R", "known global"),
        (name("numpy", "dtype") + b"NR", "known global"),
        (name("numpy.core.numeric", "_frombuffer") + binary(b"x") + text("f4") + b")" + b"\x87R", "another call"),
    ],
)
def test_read_megengine_refuses_other_calls_and_states(opcodes: bytes, match: str) -> None:
    assert_refused(file_of(opcodes), match)


# Time and memory


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x04Nr\xff\xff\xff\x7f.", id="a memo index in nine bytes"),
        pytest.param(file_of(b"\x8e" + struct.pack("<Q", 1 << 62)), id="BINBYTES8"),
        pytest.param(file_of(b"\x96" + struct.pack("<Q", (1 << 64) - 1)), id="BYTEARRAY8"),
        pytest.param(file_of(b"\x8d" + struct.pack("<Q", 1 << 62)), id="BINUNICODE8"),
        pytest.param(file_of(b"B\xff\xff\xff\xff"), id="BINBYTES"),
        pytest.param(file_of(b"X\xff\xff\xff\xff"), id="BINUNICODE"),
        pytest.param(HEADER + b"\x95" + struct.pack("<Q", 1 << 62) + file_of(ONE)[2:], id="FRAME"),
        pytest.param(file_of(b"\x8a\xff" + b"\xff" * 255), id="LONG1"),
        pytest.param(file_of(b")" * 100_000 + b"\x85" * 50_000), id="deep tuples"),
        pytest.param(file_of(b"]\x94" + b"]\x94a" * 30_000), id="deep lists"),
        pytest.param(file_of(b"(" * 90_000 + b"t" * 90_000), id="deep marks"),
        pytest.param(file_of(b")\x94" + b"".join(b"h%c" % n + b"h%c\x86\x94" % n for n in range(200))), id="laughs"),
        pytest.param(file_of(b"]\x94h\x00a"), id="a list inside itself"),
        pytest.param(file_of(b"}\x94" + text("x") + b"h\x00s"), id="a dict inside itself"),
        pytest.param(HEADER + b"}\x94" + text("state_dict") + b"h\x00s.", id="a state dict inside itself"),
    ],
)
def test_read_megengine_refuses_bombs_cheaply(data: bytes) -> None:
    assert_refused(data, peak_bytes=4 * MIB + 100 * len(data))


@pytest.mark.parametrize("opcodes", [b"}\x94", b"C\0"])
def test_read_megengine_stops_after_a_fixed_number_of_opcodes(opcodes: bytes) -> None:
    data = HEADER + b"}\x94" + opcodes * MAX_OPCODES + b"."
    assert_refused(data, f"at most {MAX_OPCODES} opcodes", peak_bytes=64 * MIB, cpu_s=10)


def test_read_megengine_refuses_long_text_that_would_grow_in_memory() -> None:
    data = file_of(text("a" * 3 * MIB + "\U0001f600"))
    assert_refused(data, "long text must be array data", peak_bytes=MIB)


def test_read_megengine_refuses_encoding_one_text_again_and_again() -> None:
    again = name("_codecs", "encode") + b"h\0" + text("latin1") + b"\x86R\x94"
    data = file_of(b"](" + text("x" * MIB) + b"\x94" + again * 100 + b"e")
    assert_refused(data, "stored once", peak_bytes=8 * MIB)


def test_read_megengine_refuses_encoding_other_text_than_latin_1() -> None:
    call = name("_codecs", "encode") + text("\u0416") + text("latin1") + b"\x86R"
    assert_refused(file_of(call), "Latin-1")


def test_read_megengine_refuses_arrays_that_share_their_data() -> None:
    first = array(shape_of(MIB // 4), data=binary(bytes(MIB)) + b"\x94")
    again = array(shape_of(MIB // 4), data=b"h\0")
    assert_refused(file_of(first, *[again] * 20), "own data", peak_bytes=2 * MIB)
    assert_refused(file_of(first + b"\x94", *[b"h\x01"] * 20), "own data", peak_bytes=2 * MIB)


# Arrays


@pytest.mark.parametrize(
    "code", ["O", "O8", "V1000000000", "S5", "U3", "c8", "M8", "f16", "f4,f4", "(1000,1000)f4", ""]
)
def test_read_megengine_refuses_other_dtypes_by_name(code: str) -> None:
    assert_refused(file_of(array(shape_of(1), dtype_of(code))), r"dtype must be real numbers.*Got 'a'")


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, object),
        np.zeros(2, [("x", "f4"), ("y", "O")]),
        np.zeros(2, [("x", "f4", (1000,))]),
        np.zeros(2, "U5"),
        np.zeros(2, "S5"),
        np.zeros(2, "V8"),
        np.zeros(2, "M8[s]"),
        np.zeros(2, complex),
        np.zeros(2, np.longdouble),
        np.float32(3.0),
        np.ma.masked_array(np.zeros(2)),
        np.zeros(2).view(np.recarray),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.dtype}",
)
def test_read_megengine_refuses_what_numpy_pickles_beyond_plain_arrays(value: object) -> None:
    for protocol in range(2, 6):
        assert_refused(pickle.dumps({"a": value}, protocol=protocol))


@pytest.mark.parametrize("byte_order", [">", "=", "|", "", "<" * 300])
def test_read_megengine_refuses_other_byte_orders_by_name(byte_order: str) -> None:
    state = b"(" + integer(3) + text(byte_order) + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    assert_refused(file_of(array(shape_of(1), dtype_of("f4", state))), "Got 'a'")
    assert_refused(file_of(array(shape_of(1), dtype_of("f4", b""))), "byte order. Got 'a'")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_read_megengine_refuses_big_endian_arrays(protocol: int) -> None:
    assert_refused(pickle.dumps({"a": np.zeros(2, ">f4")}, protocol=protocol), "little-endian. Got 'a'")


@pytest.mark.parametrize(
    "sizes",
    [(2,), (0,), (-1,), (-1, -1), (1 << 62, 4), (0, 1 << 62), (0, 1 << 20, 1 << 20), (1 << 70,), (1,) * 9, (1,) * 65],
)
def test_read_megengine_refuses_shapes_that_do_not_fit_the_data(sizes: tuple[int, ...]) -> None:
    assert_refused(file_of(array(shape_of(*sizes))))


def test_read_megengine_refuses_empty_arrays_of_sizes_that_no_array_has() -> None:
    assert_refused(file_of(array(shape_of(0, *[1 << 30] * 4), data=binary(b""))), "elements. Got 'a'")


@pytest.mark.parametrize("item", [b"\x88", text("1"), b")", b"N", b"G\x3f\xf0\0\0\0\0\0\0", ONE])
def test_read_megengine_refuses_shapes_of_other_things_than_integers(item: bytes) -> None:
    assert_refused(file_of(array(b"(" + item + b"t")), "shape must be.*Got 'a'")
    assert_refused(file_of(array(integer(1))), "plain numbers")


@pytest.mark.parametrize("data", [binary(b""), binary(b"123"), binary(b"12345"), text("1234"), b"N", b"]", ONE])
def test_read_megengine_refuses_data_that_does_not_fit_the_shape(data: bytes) -> None:
    assert_refused(file_of(array(shape_of(1), data=data)))


@pytest.mark.parametrize("axes", [shape_of(0), shape_of(0, 0), shape_of(1, 2), shape_of(-1, 0), b"(NNt"], ids=range(5))
def test_read_megengine_refuses_axes_that_are_no_permutation(axes: bytes) -> None:
    buffer = name("numpy.core.numeric", "_frombuffer") + b"(" + binary(bytes(24)) + FLOAT32 + shape_of(2, 3)
    assert read_megengine(file_of(buffer + text("K") + shape_of(1, 0) + b"tR"))["a"].shape == (3, 2)
    assert_refused(file_of(buffer + text("K") + axes + b"tR"))
    assert_refused(file_of(buffer + text("A") + b"tR"), "another call")


# Structure


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "an empty file"),
        (HEADER, "whole"),
        (HEADER + b".", "operands"),
        (HEADER + b"N.", "dict of arrays. Got None"),
        (HEADER + b"}.", "an empty one"),
        (HEADER + ONE + b".", "Got an array"),
        (HEADER + b"(N.", "more than one"),
        (HEADER + b"}t.", "operands"),
        (HEADER + b"}NNu.", "operands"),
        (HEADER + b"}(Nu.", "pairs"),
        (HEADER + b"N(NNu.", "pairs"),
        (HEADER + b"Nh\0.", "set before"),
        (HEADER + b"N\x85\x86.", "operands"),
        (HEADER + b"}(" + text("a") + ONE + text("a") + ONE + b"u.", "unique. Got 'a' twice"),
        (HEADER + b"}" + text("a") + ONE + b"s" + text("a") + ONE + b"s.", "unique. Got 'a' twice"),
        (HEADER + b"}" + binary(b"a") + ONE + b"s.", "text. Got bytes"),
        (HEADER + b"})" + ONE + b"s.", "text. Got a tuple"),
        (HEADER + b"}\x88" + ONE + b"s.", "text. Got a bool"),
        (HEADER + b"}K\x01" + ONE + b"s.", "printable text"),
        (HEADER + b"}" + text("") + ONE + b"s.", "printable text"),
        (HEADER + b"}" + text("a\x1b[31m") + ONE + b"s.", "printable text"),
        (HEADER + b"}" + text("a" * 251) + ONE + b"s.", "printable text"),
        (HEADER + b"}X\x01\0\0\0\xff" + ONE + b"s.", "UTF-8"),
        (HEADER + b"}X\x03\0\0\0\xed\xa0\x80" + ONE + b"s.", "UTF-8"),
        (file_of(ONE, b"N"), "every entry must be an array. Got 'b': None"),
        (file_of(ONE, binary(b"x")), "Got 'b': bytes"),
        (file_of(ONE, b"}"), "Got 'b': a dict"),
        (file_of(EMPTY_ARRAY), "dtype must be.*Got 'a'"),
        (HEADER + b"}" + text("state_dict") + b"}s.", "an empty one"),
        (file_of(ONE) + b"\0", "1 bytes behind it"),
        (file_of(ONE) + file_of(ONE), "behind it"),
        (b"\x80\x05\x80\x06}.", "protocol=6"),
        (HEADER + b"NNa.", "to a list"),
        (file_of(b"\x8a\x09" + bytes(9)), "8 bytes"),
        (HEADER + b"N(NNe.", "to a list"),
        (HEADER + b"NN\x93.", "name must be text"),
        (HEADER + b"c" + b"x" * 2000 + b"\nx\n.", "longer"),
    ],
)
def test_read_megengine_refuses_broken_structure(data: bytes, match: str) -> None:
    assert_refused(data, match)

"""Writes a dict of arrays as the pickle that `megengine.save` writes: protocol 4, an ordered dict, NumPy 1's names.

Python's pickler cannot do it: under NumPy 2 it names `numpy._core`, which the NumPy that MegEngine runs with does not
know. The bytes are those of CPython's pickler under NumPy 1, frames and memo included, whatever wrote the arrays.

Source: `Modules/_pickle.c` of CPython 3.10 (frames, batches); `ndarray.__reduce__` and `dtype.__reduce__` of NumPy 1.
"""

import struct
from collections.abc import Hashable, Mapping
from typing import BinaryIO

import numpy as np

FRAME_BYTES = 64 * 1024  # a frame ends before the first value behind this; data of this size stands between frames
BATCH = 1_000  # entries that one opcode sets


def write_pickle(state: Mapping[str, np.ndarray], file: BinaryIO) -> None:
    """Write a dict of little-endian arrays of plain numbers.

    Args:
        state: name -> array.
        file: open for writing.

    >>> import io
    >>> from weightnet.zoo.pickle_machine import read_pickle
    >>> file = io.BytesIO()
    >>> write_pickle({"bias": np.arange(3, dtype=np.int8)}, file)
    >>> bytes(read_pickle(file.getvalue())["bias"].buffer)
    b'\\x00\\x01\\x02'
    """
    _Writer(file).write(state)


class _Writer:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = bytearray()
        self._memo: dict[Hashable, int] = {}  # what is written once and then referred to
        self._memo_count = 0

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        self._file.write(b"\x80\x04")
        self._global("collections", "OrderedDict")
        self._value(b")")
        self._frame += b"R"
        self._memoize()
        entries = list(state.items())
        for start in range(0, len(entries), BATCH):
            self._frame += b"("
            for name, array in entries[start : start + BATCH]:
                self._text(name)
                self._array(array)
            self._frame += b"u"
        self._frame += b"."
        self._end_frame()

    def _array(self, array: np.ndarray) -> None:
        """`_reconstruct(ndarray, (0,), b"b")`, then its state `(1, shape, dtype, is_fortran, data)`."""
        self._global("numpy.core.multiarray", "_reconstruct")
        self._global("numpy", "ndarray")
        self._shape((0,))
        if not self._recall(b"b"):
            self._data(b"b")
            self._memoize(b"b")
        self._frame += b"\x87"
        self._memoize()
        self._frame += b"R"
        self._memoize()
        self._value(b"(")
        self._integer(1)
        self._shape(array.shape)
        self._dtype(array.dtype)
        self._value(b"\x89")
        self._data(array.tobytes())
        self._memoize()
        self._frame += b"t"
        self._memoize()
        self._frame += b"b"

    def _dtype(self, dtype: np.dtype) -> None:
        """`dtype(code, False, True)`, then its state `(3, byte order, None, None, None, -1, -1, 0)`."""
        if self._recall(dtype):
            return
        self._global("numpy", "dtype")
        self._text(dtype.str[1:])
        self._value(b"\x89")
        self._value(b"\x88")
        self._frame += b"\x87"
        self._memoize()
        self._frame += b"R"
        self._memoize(dtype)
        self._value(b"(")
        self._integer(3)
        self._text(dtype.str[0])
        for value in (b"N", b"N", b"N", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"K\x00"):
            self._value(value)
        self._frame += b"t"
        self._memoize()
        self._frame += b"b"

    def _global(self, module: str, name: str) -> None:
        if self._recall((module, name)):
            return
        self._text(module)
        self._text(name)
        self._frame += b"\x93"
        self._memoize((module, name))

    def _text(self, text: str) -> None:
        if self._recall(text):
            return
        raw = text.encode()
        self._frame += struct.pack("<BB", 0x8C, len(raw)) if len(raw) < 256 else struct.pack("<cI", b"X", len(raw))
        self._frame += raw
        self._memoize(text)

    def _shape(self, shape: tuple[int, ...]) -> None:
        if not shape:
            self._value(b")")
            return
        if len(shape) > 3:
            self._value(b"(")
        for size in shape:
            self._integer(size)
        self._frame += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(shape), b"t")
        self._memoize()

    def _integer(self, value: int) -> None:
        code, pattern = (b"K", "<cB") if value < 256 else (b"M", "<cH") if value < 65536 else (b"J", "<ci")
        self._value(struct.pack(pattern, code, value))

    def _data(self, data: bytes) -> None:
        self._value(b"")
        header = struct.pack("<cB", b"C", len(data)) if len(data) < 256 else struct.pack("<cI", b"B", len(data))
        if len(data) < FRAME_BYTES:
            self._frame += header + data
            return
        self._end_frame()
        self._file.write(header)
        self._file.write(data)

    # The memo and the frames

    def _memoize(self, key: Hashable = None) -> None:
        self._frame += b"\x94"
        if key is not None:
            self._memo[key] = self._memo_count
        self._memo_count += 1

    def _recall(self, key: Hashable) -> bool:
        """Refer to what was memoized under `key`, if anything was."""
        index = self._memo.get(key)
        if index is not None:
            self._value(struct.pack("<cB", b"h", index) if index < 256 else struct.pack("<cI", b"j", index))
        else:
            self._value(b"")
        return index is not None

    def _value(self, code: bytes) -> None:
        """Begin a value: the only places where a frame may end."""
        if len(self._frame) >= FRAME_BYTES:
            self._end_frame()
        self._frame += code

    def _end_frame(self) -> None:
        if len(self._frame) >= 4:  # shorter ones stand without a frame
            self._file.write(struct.pack("<BQ", 0x95, len(self._frame)))
        self._file.write(self._frame)
        self._frame.clear()

"""A pickle reader that cannot run code: it walks the opcodes itself and only ever makes stand-ins of its own.

Python's unpickler looks names up and calls what it finds, and even with an allow-list nine bytes can make it allocate a
gigabyte. This one knows the few opcodes that a state dict of NumPy arrays needs, in pickle protocols 2 to 5. A global
becomes a member of `Global`, a call one of the few cases in `_call`; nothing is imported, looked up or called by name.
Every length is checked against the file before it is believed, the number of opcodes is bounded, and array data stays
a view of the file, so time and memory are bounded by the file's length.

Source: the opcodes are described in Python's `pickletools`; which of them occur was seen in files of MegEngine 0.5 to
1.13 with NumPy 1 and 2.
"""

import dataclasses
import enum
import struct
from collections.abc import Callable

import numpy as np

from weightnet.errors import WeightsError

MAX_OPCODES = 200_000  # about 20 are needed per array; this also bounds the stack and the memo
MAX_NAME_BYTES = 1_000
HIGHEST_PROTOCOL = 5
STOP = ord(".")
DAMAGED = "The file is damaged, or was made to do harm: get it again from where it came from."


class Global(enum.Enum):
    """Stand-ins for the globals that a state dict of arrays names; all others are refused."""

    ORDERED_DICT = "collections.OrderedDict"
    RECONSTRUCT = "numpy.core.multiarray._reconstruct"
    FROMBUFFER = "numpy.core.numeric._frombuffer"
    NDARRAY = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    ENCODE = "_codecs.encode"


# NumPy 2 renamed numpy.core to numpy._core.
GLOBALS: dict[str, Global] = {item.value: item for item in Global} | {
    item.value.replace("numpy.core", "numpy._core"): item for item in (Global.RECONSTRUCT, Global.FROMBUFFER)
}


@dataclasses.dataclass(slots=True, eq=False)
class DtypeRecord:
    """What the file says about an element type: NumPy's code (`f4`), and the byte order once it was given."""

    code: str
    byte_order: str | None = None


@dataclasses.dataclass(slots=True, eq=False)
class ArrayRecord:
    """What the file says about an array, not believed yet: `megengine` checks it and makes the array."""

    shape: tuple[object, ...] = ()
    dtype: DtypeRecord | None = None
    order: str = "C"
    axes: tuple[object, ...] | None = None
    buffer: memoryview | None = None


def kind_of(value: object) -> str:
    """Name what a value from a pickle is, in words and without looking inside it.

    >>> kind_of({}), kind_of(ArrayRecord()), kind_of(Global.DTYPE)
    ('a dict', 'an array', 'the name numpy.dtype')
    """
    if isinstance(value, Global):
        return f"the name {value.value}"
    words = {
        type(None): "None",
        ArrayRecord: "an array",
        DtypeRecord: "an array's dtype",
        memoryview: "bytes",
        str: "text",
        int: "an int",
    }
    return words.get(type(value), f"a {type(value).__name__}")


def read_pickle(data: bytes) -> object:
    """Return what a pickle of protocol 2 to 5 holds, made of plain Python values and the records above.

    Args:
        data: the whole file.

    Returns:
        A dict, list, tuple, text, number, None, `memoryview` of bytes in the file, `ArrayRecord` or `DtypeRecord`.

    Raises:
        WeightsError: for anything but a whole pickle made of the few opcodes and globals that arrays need.

    >>> import pickle
    >>> read_pickle(pickle.dumps({"step": 3, "names": ["a", "b"]}))
    {'step': 3, 'names': ['a', 'b']}
    """
    return _Machine(data).run()


class _Machine:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._view = memoryview(data)
        self._position = 0  # of the next byte
        self._opcode_position = 0
        self._stack: list[object] = []
        self._outer_stacks: list[list[object]] = []  # one for each open MARK
        self._memo: dict[int, object] = {}
        self._encoded_bytes = 0

    def run(self) -> object:
        operations = self._operations()
        for _ in range(MAX_OPCODES):
            self._opcode_position = self._position
            opcode = self._take(1)[0]
            if opcode == STOP:
                return self._stop()
            operation = operations.get(opcode)
            if operation is None:
                raise self._error("opcodes must be those of a state dict of arrays", f"opcode=0x{opcode:02x}")
            operation()
        raise self._error(f"a state dict must need at most {MAX_OPCODES} opcodes", "more of them")

    def _operations(self) -> dict[int, Callable[[], None]]:
        """One line per opcode: all that this machine can do."""
        push = self._push
        table: dict[bytes, Callable[[], None]] = {
            b"\x80": self._protocol,
            b"\x95": self._frame,
            b"(": self._mark,
            # values
            b"N": lambda: push(None),
            b"\x88": lambda: push(True),
            b"\x89": lambda: push(False),
            b"K": lambda: push(self._unsigned(1)),
            b"M": lambda: push(self._unsigned(2)),
            b"J": lambda: push(int.from_bytes(self._take(4), "little", signed=True)),
            b"\x8a": lambda: push(self._long()),
            b"G": lambda: push(struct.unpack(">d", self._take(8))[0]),
            b"C": lambda: push(self._take(self._unsigned(1))),
            b"B": lambda: push(self._take(self._unsigned(4))),
            b"\x8e": lambda: push(self._take(self._unsigned(8))),
            b"\x96": lambda: push(self._take(self._unsigned(8))),
            b"\x8c": lambda: push(self._text(self._unsigned(1))),
            b"X": lambda: push(self._text(self._unsigned(4))),
            b"\x8d": lambda: push(self._text(self._unsigned(8))),
            # containers
            b")": lambda: push(()),
            b"\x85": lambda: self._tuple(1),
            b"\x86": lambda: self._tuple(2),
            b"\x87": lambda: self._tuple(3),
            b"t": lambda: push(tuple(self._pop_to_mark())),
            b"]": lambda: push([]),
            b"a": lambda: self._extend([self._pop()]),
            b"e": lambda: self._extend(self._pop_to_mark()),
            b"}": lambda: push({}),
            b"s": lambda: self._set_items([self._pop(), self._pop()][::-1]),
            b"u": lambda: self._set_items(self._pop_to_mark()),
            # memo
            b"\x94": lambda: self._put(len(self._memo)),
            b"q": lambda: self._put(self._unsigned(1)),
            b"r": lambda: self._put(self._unsigned(4)),
            b"h": lambda: self._get(self._unsigned(1)),
            b"j": lambda: self._get(self._unsigned(4)),
            # globals, and the calls that only stand-ins answer
            b"c": lambda: push(self._global(self._line(), self._line())),
            b"\x93": self._stack_global,
            b"R": self._reduce,
            b"b": self._build,
        }
        return {code[0]: operation for code, operation in table.items()}

    # Reading the file

    def _take(self, count: int) -> memoryview:
        start, stop = self._position, self._position + count
        if stop > len(self._data):
            raise self._error("a pickle must be whole", f"{len(self._data)} bytes where {stop} were announced")
        self._position = stop
        return self._view[start:stop]

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _long(self) -> int:
        width = self._unsigned(1)
        if width > 8:  # longer ones could be made to collide as names of a dict, at quadratic cost
            raise self._error("integers must fit in 8 bytes", f"an integer of {width} bytes")
        return int.from_bytes(self._take(width), "little", signed=True)

    def _text(self, count: int) -> str:
        raw = self._take(count)
        # Protocol 2 stores array data as Latin-1 text. Any other long text could take four times its size in memory.
        if count > MAX_NAME_BYTES and int(np.frombuffer(raw, np.uint8).max()) > 0xC3:
            raise self._error("long text must be array data", f"{count} bytes of other text")
        return self._decode(raw)

    def _decode(self, raw: memoryview) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self._error("text must be UTF-8", "other bytes") from None

    def _line(self) -> str:
        stop = self._data.find(b"\n", self._position, self._position + MAX_NAME_BYTES)
        if stop < 0:
            raise self._error(f"a global's name must have at most {MAX_NAME_BYTES} bytes", "a longer or unfinished one")
        raw = self._take(stop - self._position)
        self._take(1)
        return self._decode(raw)

    def _protocol(self) -> None:
        protocol = self._unsigned(1)
        if protocol > HIGHEST_PROTOCOL:
            raise self._error(f"the pickle protocol must be at most {HIGHEST_PROTOCOL}", f"protocol={protocol}")

    def _frame(self) -> None:
        length = self._unsigned(8)
        if length > len(self._data) - self._position:
            raise self._error("a pickle must be whole", f"a frame of {length} bytes that reaches past its end")

    # The stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack:
            raise self._error("opcodes must find their operands", "an empty stack")
        return self._stack.pop()

    def _mark(self) -> None:
        self._outer_stacks.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[object]:
        if not self._outer_stacks:
            raise self._error("opcodes must find their operands", "no mark")
        items, self._stack = self._stack, self._outer_stacks.pop()
        return items

    def _tuple(self, count: int) -> None:
        self._push(tuple([self._pop() for _ in range(count)][::-1]))

    def _extend(self, items: list[object]) -> None:
        target = self._pop()
        if not isinstance(target, list):
            raise self._error("items must be appended to a list", kind_of(target))
        target.extend(items)
        self._push(target)

    def _set_items(self, items: list[object]) -> None:
        target = self._pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise self._error("names and values must be set in pairs on a dict", f"{len(items)} on {kind_of(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self._error("names must be text", kind_of(key))
            if key in target:
                raise self._error("names must be unique", f"{str(key)[:40]!r} twice")
            target[key] = value
        self._push(target)

    def _stop(self) -> object:
        value = self._pop()
        if self._stack or self._outer_stacks:
            raise self._error("a pickle must end with one value", "more than one")
        if self._position != len(self._data):
            raise self._error("a pickle must end the file", f"{len(self._data) - self._position} bytes behind it")
        return value

    # The memo

    def _put(self, index: int) -> None:
        if index >= len(self._data):
            raise self._error("memo indices must be below the file's length", f"index={index}")
        value = self._pop()
        self._memo[index] = value
        self._push(value)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self._error("memo indices must have been set before", f"index={index}")
        self._push(self._memo[index])

    # Globals and calls

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._error("a global's name must be text", f"{kind_of(module)} and {kind_of(name)}")
        self._push(self._global(module, name))

    def _global(self, module: str, name: str) -> Global:
        full_name = f"{module[:100]}.{name[:100]}"
        if full_name in GLOBALS:
            return GLOBALS[full_name]
        if full_name.startswith("megengine."):
            raise WeightsError(
                "weights must be a state dict of plain arrays. Got a pickle that holds MegEngine objects "
                f"(global={full_name!r}): a state dict saved with keep_var=True, or a whole module. Re-save it where "
                "MegEngine is installed, with megengine.save(module.state_dict(), path)."
            )
        raise WeightsError(
            "weights must be a state dict of plain arrays. Got a pickle that asks for "
            f"global={full_name!r} at byte {self._opcode_position}; nothing was run. pickle and torch.load may run "
            "what such a file asks for: only where you trust it, load it there and save its state dict alone."
        )

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise self._error("a call must be of a known global", f"{kind_of(function)} with {kind_of(args)}")
        self._push(self._call(function, args))

    def _call(self, function: Global, args: tuple[object, ...]) -> object:
        match function, args:
            case Global.ORDERED_DICT, ():
                return {}
            case Global.ENCODE, (str() as text, "latin1"):
                return self._encode(text)
            case Global.RECONSTRUCT, (Global.NDARRAY, (0,), memoryview()):  # empty until it is built
                return ArrayRecord()
            case Global.DTYPE, (str() as code, int(), int()):
                return DtypeRecord(code)
            case Global.FROMBUFFER, (
                memoryview() as buffer,
                DtypeRecord() as dtype,
                tuple() as shape,
                "C" | "F" as order,
            ):
                return ArrayRecord(shape, dtype, str(order), None, buffer)
            case Global.FROMBUFFER, (
                memoryview() as buffer,
                DtypeRecord() as dtype,
                tuple() as shape,
                "K",
                tuple() as axes,
            ):
                return ArrayRecord(shape, dtype, "K", axes, buffer)
        raise self._error("an array must be made as NumPy makes it", f"another call of {function.value}")

    def _encode(self, text: str) -> memoryview:
        # One long text could be encoded again and again: all results together stay below the file's length.
        self._encoded_bytes += len(text)
        if self._encoded_bytes > len(self._data):
            raise self._error("array data must be stored once for each array", "the same data more than once")
        try:
            return memoryview(text.encode("latin-1"))
        except UnicodeEncodeError:
            raise self._error("array data must be Latin-1 text", "other text") from None

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        match target, state:
            case DtypeRecord(byte_order=None), (3, str() as byte_order, None, None, None, -1, -1, 0):
                target.byte_order = byte_order
            case ArrayRecord(dtype=None), (
                1,
                tuple() as shape,
                DtypeRecord() as dtype,
                bool() as fortran,
                memoryview() as buffer,
            ):
                target.shape, target.dtype, target.buffer = shape, dtype, buffer
                target.order = "F" if fortran else "C"
            case ((DtypeRecord() | ArrayRecord()), _):
                raise self._error("arrays must hold plain numbers", "objects, text, fields or an unknown layout")
            case _:
                raise self._error("only arrays and dtypes may be given a state", kind_of(target))
        self._push(target)

    def _error(self, rule: str, got: str) -> WeightsError:
        return WeightsError(f"{rule}. Got {got} (at byte {self._opcode_position}). {DAMAGED}")

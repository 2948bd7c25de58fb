"""MegEngine checkpoints: read without ever running code from them, written as MegEngine writes them, and both layouts.

A checkpoint is a pickle of an ordered dict, name -> NumPy array. Needs only NumPy. Legend of the two layouts:

    entry                         MegEngine                       PyTorch
    convolution bias              (1, C, 1, 1)                    (C,)
    grouped convolution weight    (groups, O/groups, I, k, k)     (O, I, k, k), the same order
    batch norm running statistics (C,); (1, C, 1, 1) up to 1.0    (C,)
    everything else               the same

Source: MegEngine 0.5.1 and 1.13 (`megengine/serialization.py`, `module/module.py`); megvii-model/WeightNet.
"""

import io
import math
import os
from collections.abc import Mapping

import numpy as np

from weightnet.errors import WeightsError
from weightnet.zoo.cards import read_file, write_atomically
from weightnet.zoo.pickle_machine import DAMAGED, ArrayRecord, kind_of, read_pickle
from weightnet.zoo.pickle_writer import write_pickle

MAX_FILE_BYTES = 1 << 30
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 250
NAME_RULE = f"names must be printable text of 1 to {MAX_NAME_CHARACTERS} characters"
DTYPES = {
    code: np.dtype(f"<{code}") for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
}
# What a file that is not a pickle may be instead, by its first bytes.
SIGNATURES = {
    b"PK\x03\x04": "a ZIP archive, perhaps a PyTorch checkpoint",
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9": "a PyTorch checkpoint in the format before 1.6",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a NumPy array file",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"version https://git-lfs": "a Git LFS pointer in place of the file itself",
    b"<": "a web page in place of the file itself",
}


def read_megengine(source: bytes | str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a MegEngine state dict of plain arrays, in file order, without running anything that the file holds.

    Pickle protocols 2 to 5, arrays of any real floating or integer type or booleans (types are kept, nothing is
    converted), C or Fortran order. A training checkpoint that wraps the state dict as `{"state_dict": ...}` gives the
    inner one. Each array owns its memory, writable and C-contiguous. Time and memory are bounded by the file's length.

    Args:
        source: the file's bytes, or its path; at most 1 GiB.

    Returns:
        Name -> array, in MegEngine's layout (`to_torch_layout` changes it).

    Raises:
        WeightsError: for a file that cannot be read, is damaged, hostile, holds anything but arrays, or is not a
            MegEngine checkpoint at all; the message says which.

    >>> import collections, pickle
    >>> state = collections.OrderedDict({"classifier.0.bias": np.arange(3, dtype=np.float32)})
    >>> read_megengine(pickle.dumps(state, protocol=4))
    {'classifier.0.bias': array([0., 1., 2.], dtype=float32)}

    Source: `megengine.save` of MegEngine 0.5.1 and 1.13.
    """
    data = source if isinstance(source, bytes) else read_file(source, max_bytes=MAX_FILE_BYTES)
    _check_signature(data)
    state = _state_dict(read_pickle(data))
    # Views of the same bytes under many names would take many times the file's size once they are arrays.
    total_bytes = sum(len(record.buffer) for record in state.values() if record.buffer is not None)
    if total_bytes > len(data):
        raise WeightsError(f"each array must have its own data. Got data that several arrays share. {DAMAGED}")
    return {name: _as_array(name, record) for name, record in state.items()}


def to_torch_layout(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a MegEngine state dict with the shapes that PyTorch's layers have (legend at the top of this module).

    Names, order and element types stay. There is no `num_batches_tracked` in MegEngine files and none is added.

    Args:
        state: name -> array as `read_megengine` returns it.

    Returns:
        Name -> array, sharing memory with `state` where possible.

    Raises:
        WeightsError: for an array that is not of floating point, or a rank that its name does not allow.

    >>> state = {"0.weight": np.zeros((2, 3, 1, 5, 5)), "0.bias": np.zeros((1, 6, 1, 1)), "1.running_var": np.ones(6)}
    >>> {name: array.shape for name, array in to_torch_layout(state).items()}
    {'0.weight': (6, 1, 5, 5), '0.bias': (6,), '1.running_var': (6,)}
    """
    return {
        name: _torch_array(name, array, is_norm=f"{name.rpartition('.')[0]}.running_var" in state)
        for name, array in state.items()
    }


def has_old_statistics(state: Mapping[str, np.ndarray]) -> bool:
    """Return whether running statistics have the shape (1, C, 1, 1), as MegEngine up to 1.0 wrote them.

    >>> has_old_statistics({"1.running_var": np.ones((1, 6, 1, 1))})
    True
    """
    return any(array.ndim == 4 for name, array in state.items() if name.endswith(".running_var"))


def to_megengine_layout(
    state: Mapping[str, np.ndarray], *, groups: Mapping[str, int], old_statistics: bool = False
) -> dict[str, np.ndarray]:
    """Return a PyTorch state dict with the shapes that MegEngine's layers have, in float32.

    `num_batches_tracked` is dropped: MegEngine has no such entry. Names and order stay.

    Args:
        state: name -> array in PyTorch's layout.
        groups: weight name -> number of groups, for every convolution with more than one (a PyTorch shape cannot tell).
        old_statistics: give running statistics the shape (1, C, 1, 1) of MegEngine up to 1.0; later versions read both.

    Returns:
        Name -> array, sharing memory with `state` where possible.

    Raises:
        WeightsError: for an array that is not of floating point, a rank that its name does not allow, or a number of
            groups that does not fit.

    >>> state = {"0.weight": np.zeros((6, 1, 5, 5)), "0.bias": np.zeros(6), "1.running_var": np.ones(6)}
    >>> {name: array.shape for name, array in to_megengine_layout(state, groups={"0.weight": 2}).items()}
    {'0.weight': (2, 3, 1, 5, 5), '0.bias': (1, 6, 1, 1), '1.running_var': (6,)}
    """
    absent = [name for name in groups if name not in state]
    if absent:
        raise WeightsError(f"groups must be of weights in the state dict. Got {absent[:3]}. Pass the same network's.")
    result = {}
    for name, array in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        prefix, _, kind = name.rpartition(".")
        array = _torch_array(name, array, is_norm=f"{prefix}.running_var" in state).astype(np.float32, copy=False)
        weight = state.get(f"{prefix}.weight")
        is_conv_bias = kind == "bias" and weight is not None and weight.ndim == 4
        if is_conv_bias or (old_statistics and kind in ("running_mean", "running_var")):
            array = array.reshape(1, -1, 1, 1)
        result[name] = _grouped(name, array, groups.get(name, 1))
    return result


def write_megengine(state: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write a state dict as `megengine.save` does, to the byte; whole or not at all.

    The original framework reads it (`megengine.load`), and so does `read_megengine`, bit for bit.

    Args:
        state: name -> array in MegEngine's layout (`to_megengine_layout` makes it), of floating, integer or bool type.
        path: where to write; a file there is replaced once the new one is complete.

    Raises:
        WeightsError: for names or arrays that such a file cannot hold, or a path that cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_megengine({"bias": np.float32([1, 2])}, f"{folder}/weights.pkl")
    ...     read_megengine(f"{folder}/weights.pkl")
    {'bias': array([1., 2.], dtype=float32)}

    Source: `megengine.save` of MegEngine 1.13.
    """
    arrays = {name: _writable(name, array) for name, array in state.items()}
    if not arrays or sum(array.nbytes for array in arrays.values()) > MAX_FILE_BYTES:
        raise WeightsError(f"a checkpoint must hold 1 to {MAX_FILE_BYTES} bytes of arrays. Got {len(arrays)} arrays.")
    file = io.BytesIO()
    write_pickle(arrays, file)
    try:
        write_atomically(path, file.getvalue())
    except (OSError, ValueError) as error:  # ValueError: a path without a name
        raise WeightsError(
            f"a weights file must be writable. Got path={str(path)!r}: {error}. Choose another path."
        ) from error


def _check_signature(data: bytes) -> None:
    """Refuse what is not a pickle of protocol 2 to 5, naming what it looks like."""
    start = data[:64].lstrip()
    looks_like = next((what for first, what in SIGNATURES.items() if start.startswith(first)), "")
    if not looks_like and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        looks_like = "a safetensors file"
    if not looks_like and data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return
    if not looks_like and data[:1] in (b"(", b"c", b"}", b"]"):
        looks_like = "perhaps a pickle of protocol 0 or 1, which MegEngine never wrote"
    raise WeightsError(
        "a MegEngine checkpoint must be a pickle of protocol 2 to 5. "
        f"Got {looks_like or ('other data' if data else 'an empty file')}. "
        "Give the file that megengine.save(module.state_dict(), path) wrote."
    )


def _state_dict(value: object) -> dict[str, ArrayRecord]:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not value:
        raise WeightsError(
            f"a checkpoint must hold a dict of arrays. Got {'an empty one' if value == {} else kind_of(value)}. "
            "Re-save it with megengine.save(module.state_dict(), path)."
        )
    for name, record in value.items():
        if not _is_name(name):
            raise WeightsError(f"{NAME_RULE}. Got {str(name)[:40]!r}. {DAMAGED}")
        if not isinstance(record, ArrayRecord):
            raise WeightsError(
                f"every entry must be an array. Got {name!r}: {kind_of(record)}. "
                "Re-save the state dict alone, with megengine.save(module.state_dict(), path)."
            )
    return value


def _is_name(name: object) -> bool:
    # Names are printed in messages: control characters could command a terminal.
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable()


def _as_array(name: str, record: ArrayRecord) -> np.ndarray:
    """Make the array that a record describes, after checking all that the record claims."""
    dtype, shape, buffer = _checked_dtype(name, record), _checked_shape(name, record.shape), record.buffer
    if buffer is None or math.prod(shape) * dtype.itemsize != len(buffer):
        raise WeightsError(
            f"an array's data must fill its shape exactly. Got {name!r}: shape={shape}, dtype={dtype}, "
            f"{0 if buffer is None else len(buffer)} bytes. {DAMAGED}"
        )
    flat = np.frombuffer(buffer, dtype)
    if record.axes is None:
        return flat.reshape(shape, order="F" if record.order == "F" else "C").copy(order="C")
    axes = _checked_shape(name, record.axes)
    if sorted(axes) != list(range(len(shape))):
        raise WeightsError(
            f"an array's axes must be a permutation. Got {name!r}: shape={shape}, axes={axes}. {DAMAGED}"
        )
    return flat.reshape(shape).transpose(axes).copy(order="C")


def _checked_dtype(name: str, record: ArrayRecord) -> np.dtype:
    code, byte_order = (record.dtype.code, record.dtype.byte_order) if record.dtype else ("", None)
    dtype = DTYPES.get(code)
    if dtype is None:
        raise WeightsError(
            f"an array's dtype must be real numbers ({', '.join(str(known) for known in DTYPES.values())}). "
            f"Got {name!r}: dtype={code[:40]!r}. Convert it to float32 and save again."
        )
    if byte_order == ">":
        raise WeightsError(
            f"arrays must be little-endian. Got {name!r}: big-endian dtype={code!r}. "
            "Save it again with array.astype('<f4')."
        )
    if byte_order != ("|" if dtype.itemsize == 1 else "<"):
        raise WeightsError(f"a dtype must state its byte order. Got {name!r}: byte_order={byte_order!r:.40}. {DAMAGED}")
    return dtype


def _checked_shape(name: str, shape: tuple[object, ...]) -> tuple[int, ...]:
    sizes = tuple(size for size in shape if type(size) is int and 0 <= size <= MAX_FILE_BYTES)
    if len(sizes) != len(shape) or len(sizes) > MAX_DIMENSIONS:
        raise WeightsError(
            f"a shape must be at most {MAX_DIMENSIONS} sizes of 0 to {MAX_FILE_BYTES}. "
            f"Got {name!r}: another one. {DAMAGED}"
        )
    if math.prod(max(size, 1) for size in sizes) > MAX_FILE_BYTES:
        raise WeightsError(
            f"an array must have at most {MAX_FILE_BYTES} elements. Got {name!r}: shape={sizes}. {DAMAGED}"
        )
    return sizes


def _torch_array(name: str, array: np.ndarray, *, is_norm: bool) -> np.ndarray:
    if array.dtype.kind != "f":
        raise WeightsError(
            f"weights must be of floating point. Got {name!r}: dtype={array.dtype}. Save it again as float32."
        )
    kind = name.rpartition(".")[2]
    if array.shape == (1, array.size, 1, 1) and (is_norm or kind == "bias"):
        return array.reshape(-1)
    if kind == "weight" and not is_norm and array.ndim == 5:
        groups, out_channels, *kernel = array.shape
        return array.reshape(groups * out_channels, *kernel)
    if array.ndim == 1 or (kind == "weight" and not is_norm and array.ndim in (2, 4)):
        return array
    raise WeightsError(
        "an entry must have the shape of a convolution's, linear layer's or batch norm's weight, bias or running "
        f"statistics. Got {name!r}: shape={array.shape}. Check that the file belongs to this network."
    )


def _grouped(name: str, array: np.ndarray, groups: int) -> np.ndarray:
    if groups == 1:
        return array
    if array.ndim != 4 or groups < 1 or array.shape[0] % groups:
        raise WeightsError(
            "groups must divide the output channels of a convolution's weight. "
            f"Got {name!r}: shape={array.shape}, groups={groups}. Pass the groups of the same network."
        )
    return array.reshape(groups, array.shape[0] // groups, *array.shape[1:])


def _writable(name: str, array: np.ndarray) -> np.ndarray:
    if not _is_name(name):
        raise WeightsError(f"{NAME_RULE}. Got {str(name)[:40]!r}. Rename it.")
    if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("<") not in DTYPES.values():
        raise WeightsError(
            f"entries must be arrays of real numbers. Got {name!r}: {getattr(array, 'dtype', type(array).__name__)}. "
            "Convert it with numpy.asarray(..., dtype=numpy.float32)."
        )
    if array.ndim > MAX_DIMENSIONS:
        raise WeightsError(
            f"arrays must have at most {MAX_DIMENSIONS} axes. Got {name!r}: ndim={array.ndim}. Reshape it."
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False)

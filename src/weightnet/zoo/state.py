"""From a weights file of any known format to names and arrays, and what network they belong to.

Nothing here runs code from a file, and memory is bounded by the file's size. PyTorch is imported only for its own files
and to say whether arrays fit a network.
"""

import dataclasses
import io
import os
import pickletools
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from weightnet.errors import UsageError, WeightsError, needs_torch
from weightnet.nn.variants import VARIANTS, NetworkSpec
from weightnet.zoo.cards import read_file
from weightnet.zoo.megengine import SIGNATURES, read_megengine, to_torch_layout

State = dict[str, npt.NDArray[np.float32]]

MAX_WEIGHTS_BYTES = 1 << 30
MAX_INDEX_BYTES = 4 << 20  # names and shapes: 100 kB in the largest network; read, they take ten times the room
MAX_AXES = 8
LISTED_NAMES = 10  # how many names of a kind an error lists

_SAFETENSORS_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
# All that a state dict of PyTorch needs; `torch.load(weights_only=True)` would let some more pass.
_TORCH_GLOBALS = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size"}
    | {f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool")}
)


def read_state(path: str | os.PathLike[str]) -> State:
    """Read a weights file: safetensors, a MegEngine state dict, or a PyTorch one (also inside `{"state_dict": ...}`).

    What the file is, its content says, not its name. Floating-point arrays of any width become float32; the counters of
    batch norm (`num_batches_tracked`), which nothing uses, are left out.

    Args:
        path: the file, of at most 1 GiB.

    Returns: name to array in PyTorch's layout, each array contiguous, writable and finite, sorted by name.

    Raises: WeightsError for anything else; the message names the file and what is wrong.
    """
    try:
        data = read_file(path, max_bytes=MAX_WEIGHTS_BYTES)
        if data[8:9] == b"{":
            arrays = _read_safetensors(data)
        elif data[:4] == b"PK\x03\x04":
            arrays = _read_torch(data)
        elif is_pickle(data):
            arrays = to_torch_layout(read_megengine(data))
        else:
            _refuse_unknown(data, path)
        return {name: _finite_float32(name, arrays[name]) for name in sorted(arrays)}
    except WeightsError as error:
        raise WeightsError(f"The weights {path} cannot be loaded. {error}") from error


def is_pickle(data: bytes) -> bool:
    """Return whether a file is a pickle; a safetensors file whose header has a fitting length begins alike.

    Example:
        >>> is_pickle(b"\\x80\\x04}."), is_pickle(b"\\x80\\x01\\x00\\x00\\x00\\x00\\x00\\x00{")
        (True, False)
    """
    return data[:1] == b"\x80" and data[8:9] != b"{"


def check_state(state: Mapping[str, npt.NDArray[Any]], spec: NetworkSpec) -> None:
    """Check that a state has exactly the names and shapes of a network.

    Raises: WeightsError that lists missing, unexpected and ill-shaped entries, with their shapes.
    """
    with needs_torch("Comparing weights with a network"):
        from weightnet.nn.shufflenet import outline

    if sum(spec.stage_repeats) > len(state):
        raise WeightsError(
            f"Each block must have its weights. Got stage_repeats={spec.stage_repeats} and {len(state)} arrays. "
            "Give the weights and the card of one network."
        )
    try:
        network = outline(spec)  # without memory, whatever sizes a card claims
    except RuntimeError as error:
        raise WeightsError(f"A network must have sizes that fit a memory. Got {spec}. Check its card.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if not _is_counter(name)}
    got = {name: array.shape for name, array in state.items()}
    problems = [
        _listing("missing", [f"{name} {shape}" for name, shape in expected.items() if name not in got]),
        _listing("unexpected", [f"{name} {shape}" for name, shape in got.items() if name not in expected]),
        _listing(
            "of another shape",
            [f"{name} {got[name]}, not {shape}" for name, shape in expected.items() if got.get(name, shape) != shape],
        ),
    ]
    if any(problems):
        raise WeightsError(
            f"Weights must have exactly the network's names and shapes. Got {'; '.join(filter(None, problems))}. "
            "Load them into the network that they were made for."
        )


def spec_from_state(state: Mapping[str, npt.NDArray[Any]]) -> NetworkSpec:
    """Return the network that a state belongs to, worked out from its shapes.

    Dropout leaves no trace in the weights: it is that of the published row of these widths, or 0.

    Raises: WeightsError where it is no network of this package.
    """
    stage_channels, stage_repeats = _stages(state)
    stem, in_channels = _shape(state, "first_conv.0.weight", 4)[:2]
    M, G = _generation(state)
    try:
        spec = NetworkSpec(
            stage_channels=stage_channels,
            M=M,
            G=G,
            stage_repeats=stage_repeats,
            stem_channels=stem,
            head_channels=_shape(state, "conv_last.0.weight", 4)[0],
            num_classes=_shape(state, "classifier.0.weight", 2)[0],
            in_channels=in_channels,
        )
    except UsageError as error:
        raise WeightsError(f"The weights must be of a network that can be built. {error}") from error
    name = variant_name(spec)
    return dataclasses.replace(spec, dropout=VARIANTS[name].spec.dropout) if name else spec


def variant_name(spec: NetworkSpec) -> str | None:
    """Return the zoo's name of a network, whatever its classes, input channels and dropout; None where it has none.

    Example:
        >>> variant_name(NetworkSpec((48, 96, 192), M=2, G=2, num_classes=10))
        'shufflenet_v2_x0_5'
    """
    for name, variant in VARIANTS.items():
        free = {field: getattr(spec, field) for field in ("dropout", "num_classes", "in_channels")}
        if dataclasses.replace(variant.spec, **free) == spec:
            return name
    return None


def _stages(state: Mapping[str, npt.NDArray[Any]]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the widths and depths of the stages: each begins with the one block that projects."""
    blocks = {name.split(".")[1] for name in state if name.startswith("features.")}
    starts = [index for index in range(len(blocks)) if f"features.{index}.bn_proj_1.weight" in state]
    if len(starts) != 3 or starts[0] != 0:
        _refuse_network(f"features.N.bn_proj_1.weight for N in {starts}, not for the first block of each of 3 stages")
    first, second, third = (2 * _shape(state, f"features.{start}.bn1.weight", 1)[0] for start in starts)
    return (first, second, third), (starts[1], starts[2] - starts[1], len(blocks) - starts[2])


def _generation(state: Mapping[str, npt.NDArray[Any]]) -> tuple[int, int]:
    """Return M and G of the first generated layer, 0 and 0 for a plain network.

    The layer has M gates per output channel, and each of the G groups per output channel of `wn_fc2` takes M / G.
    """
    if "features.0.wnet1.wn_fc1.weight" not in state:
        return 0, 0
    gates = _shape(state, "features.0.wnet1.wn_fc1.weight", 4)[0]
    kernels_per_block = _shape(state, "features.0.wnet1.wn_fc2.weight", 4)[1]
    out_channels = _shape(state, "features.0.bn1.weight", 1)[0]
    M = gates // max(out_channels, 1)
    return M, M // max(kernels_per_block, 1)


def _shape(state: Mapping[str, npt.NDArray[Any]], name: str, rank: int) -> tuple[int, ...]:
    if name not in state:
        _refuse_network(f"no {name}")
    shape = state[name].shape
    if len(shape) != rank:
        _refuse_network(f"{name} of shape {shape}")
    return shape


def _refuse_network(got: str) -> NoReturn:
    raise WeightsError(
        f"The weights must be those of a ShuffleNetV2 or WeightNet of this package. Got {got}. "
        "Look up the names with `weightnet.load(name).state_dict()`."
    )


def _refuse_unknown(data: bytes, path: str | os.PathLike[str]) -> NoReturn:
    if os.fspath(path).endswith((".onnx", ".xml", ".bin", ".pt2", ".pte", ".mnn")):
        raise WeightsError(
            "An exported file has no weights to train or convert. "
            f"Got {os.path.basename(path)}. Give what it was exported from; predict and evaluate take it as it is."
        )
    start = data[:64].lstrip()
    unknown = "an unknown format" if data else "an empty file"
    got = next((what for first, what in SIGNATURES.items() if start.startswith(first)), unknown)
    raise WeightsError(
        f"A weights file must be safetensors, a PyTorch state dict or a MegEngine one. Got {got}. "
        "Download the file again, or export the weights to safetensors."
    )


def _finite_float32(name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite and is refused below
        converted = np.array(array, np.float32, order="C")
    if not np.isfinite(converted).all():
        raise WeightsError(f"Weights must be finite numbers. Got infinity or NaN in {name}. Use an intact file.")
    return converted


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _refuse_dtype(name: str, dtype: object) -> NoReturn:
    raise WeightsError(f"Weights must be floating-point numbers. Got {name} of {dtype}. Convert them to float32.")


def _read_safetensors(data: bytes) -> dict[str, npt.NDArray[Any]]:
    import safetensors

    _check_index(int.from_bytes(data[:8], "little"))
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, MemoryError, OverflowError) as error:
        raise WeightsError(f"A safetensors file must be whole. Got: {error}. Download or write it again.") from error
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, entry in entries:
        if _is_counter(name):
            continue
        dtype, raw = entry["dtype"], entry["data"]
        if dtype == "BF16":  # the upper half of a float32, which NumPy has no type for
            array = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        elif dtype in _SAFETENSORS_DTYPES:
            array = np.frombuffer(raw, _SAFETENSORS_DTYPES[dtype])
        else:
            _refuse_dtype(name, dtype)
        if len(entry["shape"]) > MAX_AXES:
            raise WeightsError(f"Weights must have at most {MAX_AXES} axes. Got {name} of {len(entry['shape'])}.")
        arrays[name] = array.reshape(entry["shape"])
    return arrays


def _read_torch(data: bytes) -> dict[str, npt.NDArray[Any]]:
    with needs_torch("Reading a file of PyTorch"):
        import torch

    try:
        _check_torch_archive(data)
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # a damaged file makes PyTorch and zipfile raise nearly anything
        raise WeightsError(
            f"A PyTorch file must be a whole state dict. Got: {str(error).splitlines()[:1]}. "
            "Write it again with torch.save(network.state_dict(), path)."
        ) from error
    loaded = _plain(loaded)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = _plain(loaded["state_dict"])
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(
            "A PyTorch file must hold tensors by name. Got other objects. "
            "Write it again with torch.save(network.state_dict(), path)."
        )
    tensors = {str(name): tensor.detach() for name, tensor in loaded.items() if not _is_counter(str(name))}
    # A tensor may repeat one stored number along an axis without end.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > len(data):
        raise WeightsError("Tensors must have their own data. Got more than the file holds. Use an intact file.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            _refuse_dtype(name, tensor.dtype)
    return {name: tensor.float().resolve_neg().numpy() for name, tensor in tensors.items()}


def _plain(loaded: Any) -> Any:
    """Return a dict without attributes of its own, which a file may put in the place of its methods."""
    return dict(dict.items(loaded)) if isinstance(loaded, dict) else loaded


def _check_torch_archive(data: bytes) -> None:
    """Refuse what `torch.save` does not write: compressed entries, which may unpack to anything, and foreign types."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > len(data):
            raise WeightsError("A PyTorch file must be uncompressed. Got packed data. Write it again with torch.save.")
        pickles = [entry.filename for entry in entries if entry.filename.endswith(".pkl")]
        if len(pickles) != 1 or not pickles[0].endswith("data.pkl"):
            raise WeightsError(
                f"A PyTorch file must be a state dict. Got an archive with {pickles[:4]}. "
                "Write one with torch.save(network.state_dict(), path)."
            )
        _check_index(archive.getinfo(pickles[0]).file_size)
        foreign = {
            str(argument)
            for opcode, argument, _ in pickletools.genops(archive.read(pickles[0]))
            if opcode.name == "GLOBAL" and argument not in _TORCH_GLOBALS
        }
    if foreign:
        raise WeightsError(
            f"A PyTorch file must hold nothing but tensors. Got {', '.join(sorted(foreign)[:LISTED_NAMES])}. "
            "Write it again with torch.save(network.state_dict(), path)."
        )


def _check_index(size: int) -> None:
    if size > MAX_INDEX_BYTES:
        raise WeightsError(
            f"A weights file's list of names and shapes must be at most {MAX_INDEX_BYTES} bytes. Got {size}. "
            "Write a file of the weights alone."
        )


def _listing(kind: str, entries: Iterable[str]) -> str:
    entries = list(entries)
    if not entries:
        return ""
    more = f" and {len(entries) - LISTED_NAMES} more" if len(entries) > LISTED_NAMES else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:LISTED_NAMES])}{more}"

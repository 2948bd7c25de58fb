"""The engine of files that ONNX Runtime runs. Neither it nor this module needs PyTorch.

Shape suffixes: as in `weightnet.predict.interface`.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from weightnet.predict.exported import (
    INPUT,
    MAX_EXPORTED_BYTES,
    Shape,
    card_beside,
    check_signature,
    in_pieces,
    joined,
    missing_runtime,
    raw_pixels,
    run_none,
    takes_pixels,
    unreadable,
    usable_cores,
)
from weightnet.predict.interface import LOGITS, Batch, check_batch, check_outputs
from weightnet.zoo.cards import read_file

if TYPE_CHECKING:
    import onnxruntime


class OnnxRuntimeEngine:
    """Runs an exported .onnx file in ONNX Runtime, on the CPU; its card must lie beside it.

    Batches are run in pieces of a few photos, side by side on the processor's cores: each core then works by itself, on
    feature maps that stay in its cache. A single photo is run on one core: a second one gained nothing.

    Raises: as `open_engine`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_runtime("onnxruntime", "onnxruntime", error) from error
        self.card, self._path = card_beside(path), path
        read_file(path, max_bytes=MAX_EXPORTED_BYTES)  # for its errors: the runtime itself opens the path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is in the error that it raises; standard error is not ours
        options.intra_op_num_threads = 1
        self._cores = ThreadPoolExecutor(usable_cores())
        try:
            self._session = onnxruntime.InferenceSession(
                os.fspath(path),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # which prints, to try the same again
            )
        except Exception as error:  # it has a dozen classes of errors, without a common base
            raise unreadable(path, error) from error
        self._takes_pixels = takes_pixels(self.card, path)
        kind = "tensor(uint8)" if self._takes_pixels else "tensor(float)"
        inputs = {value.name: _onnx_shape(value, kind) for value in self._session.get_inputs()}
        outputs = {value.name: _onnx_shape(value) for value in self._session.get_outputs()}
        self.outputs = check_signature(path, self.card, inputs, outputs)

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits, as `Engine.run`."""
        return self.run_outputs(x_BCHW, [LOGITS])[LOGITS]

    def run_outputs(self, x_BCHW: Batch, names: Sequence[str], /) -> dict[str, Batch]:
        """Return some of the file's outputs, as `Engine.run_outputs`."""
        check_outputs(names, self.outputs)
        check_batch(x_BCHW, self.card)
        if not len(x_BCHW):  # which it does not reshape
            return run_none(self, x_BCHW, names)
        pieces = in_pieces(raw_pixels(x_BCHW) if self._takes_pixels else x_BCHW)

        def run(piece: npt.NDArray[Any]) -> dict[str, Batch]:
            return dict(zip(names, self._session.run(list(names), {INPUT: piece}), strict=True))

        try:
            return joined(names, [run(x) for x in pieces] if len(pieces) == 1 else list(self._cores.map(run, pieces)))
        except Exception as error:  # a file that was read may still not fit together
            raise unreadable(self._path, error) from error


def _onnx_shape(value: "onnxruntime.NodeArg", kind: str = "tensor(float)") -> Shape:
    if value.type != kind:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]

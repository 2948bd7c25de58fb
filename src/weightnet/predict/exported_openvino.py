"""The engine of files that OpenVINO runs. Neither it nor this module needs PyTorch.

Shape suffixes: as in `weightnet.predict.interface`.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt

from weightnet.predict.exported import (
    INPUT,
    MAX_EXPORTED_BYTES,
    PIECE,
    Shape,
    card_beside,
    check_signature,
    exported_as,
    in_pieces,
    joined,
    missing_runtime,
    raw_pixels,
    run_none,
    takes_pixels,
    unreadable,
)
from weightnet.predict.interface import LOGITS, Batch, check_batch, check_outputs
from weightnet.zoo.cards import read_file

if TYPE_CHECKING:
    import openvino

Answer = TypeVar("Answer")

_KEPT_SHAPES = 10  # pieces of one to eight photos, or of sixteen, and one photo by itself
_PIECE_OF_BFLOAT16 = 2 * PIECE  # whose maps take as much memory


class OpenVinoEngine:
    """Runs an exported .xml or .onnx file in OpenVINO, on the CPU; its card must lie beside it.

    It computes in single precision, or in bfloat16 where the file was exported so and the processor has it; a file of
    8-bit integers in these and, for the rest, in bfloat16 too.

    Batches are run in pieces, as in ONNX Runtime. The network is compiled for each shape of piece that comes, and the
    last few are kept: fixed shapes run about 1.2 times as fast as open ones, and compiling takes half a second.

    Raises: as `open_engine`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import openvino
        except ImportError as error:
            raise missing_runtime("openvino", "'weightnet[openvino]'", error) from error
        self.card, self._path = card_beside(path), path
        self._core, self._model = openvino.Core(), read_openvino(path)
        self._takes_pixels = takes_pixels(self.card, path)
        kind = "u8" if self._takes_pixels else "f32"
        inputs = {value.get_any_name(): _openvino_shape(value, kind) for value in self._model.inputs}
        outputs = {value.get_any_name(): _openvino_shape(value) for value in self._model.outputs}
        self.outputs = check_signature(path, self.card, inputs, outputs)
        self._precision = "bf16" if exported_as(self.card, path).get("precision") in ("bf16", "int8") else "f32"
        halved = self._precision == "bf16" and "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._largest = _PIECE_OF_BFLOAT16 if halved else PIECE
        self._requests_of: dict[tuple[tuple[int, ...], bool], list[openvino.InferRequest]] = {}
        self._one_at_a_time = threading.Lock()  # a request keeps the answers of one piece

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits, as `Engine.run`."""
        return self.run_outputs(x_BCHW, [LOGITS])[LOGITS]

    def run_outputs(self, x_BCHW: Batch, names: Sequence[str], /) -> dict[str, Batch]:
        """Return some of the file's outputs, as `Engine.run_outputs`."""
        check_outputs(names, self.outputs)
        check_batch(x_BCHW, self.card)
        if not len(x_BCHW):
            return run_none(self, x_BCHW, names)
        try:
            photos = raw_pixels(x_BCHW) if self._takes_pixels else x_BCHW
            with self._one_at_a_time:
                return joined(names, self._run_pieces(in_pieces(photos, self._largest), names))
        except RuntimeError as error:  # a file that was read may still not fit together
            raise unreadable(self._path, error) from error

    def _run_pieces(self, pieces: list[npt.NDArray[Any]], names: Sequence[str]) -> list[dict[str, Batch]]:
        alone = len(pieces) == 1
        return run_in_turn(
            pieces,
            lambda piece: self._requests(piece.shape, alone=alone),
            lambda request: {name: request.get_tensor(name).data.copy() for name in names},
        )

    def _requests(self, shape: tuple[int, ...], *, alone: bool) -> "list[openvino.InferRequest]":
        """Return what runs pieces of a shape: one piece on all cores at once, or one on each core.

        They have no callbacks in Python: OpenVINO's threads would wait for the interpreter to drop them, while the
        interpreter, dropping a network, waits for these threads.
        """
        requests = self._requests_of.pop((shape, alone), None)
        if requests is None:
            self._model.reshape({INPUT: list(shape)})
            options = {
                "PERFORMANCE_HINT": "LATENCY" if alone else "THROUGHPUT",
                # Where the processor has bfloat16, OpenVINO would compute in it unless told otherwise.
                "INFERENCE_PRECISION_HINT": self._precision,
            }
            compiled = self._core.compile_model(self._model, "CPU", options)
            count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
            requests = [compiled.create_infer_request() for _ in range(count)]
            if len(self._requests_of) == _KEPT_SHAPES:
                del self._requests_of[next(iter(self._requests_of))]  # the one that was not used for longest
        self._requests_of[shape, alone] = requests
        return requests


def run_in_turn(
    pieces: "Sequence[npt.NDArray[Any]]",
    requests_for: "Callable[[npt.NDArray[Any]], list[openvino.InferRequest]]",
    answer_of: "Callable[[openvino.InferRequest], Answer]",
) -> "list[Answer]":
    """Run pieces of a batch, as many at once as there are requests for them, and return their answers in order."""
    given: list[Answer] = []
    running: collections.deque[openvino.InferRequest] = collections.deque()

    def finish_first() -> None:
        request = running.popleft()
        request.wait()
        given.append(answer_of(request))

    try:
        for number, piece in enumerate(pieces):
            requests = requests_for(piece)
            while len(running) >= len(requests):
                finish_first()
            request = requests[number % len(requests)]
            # All that run here have one input. It is read where it is: nobody changes it before all have ended.
            request.start_async({0: piece}, share_inputs=True)
            running.append(request)
        while running:
            finish_first()
    finally:
        for request in running:  # after an error: none may be running when the next batch comes
            with contextlib.suppress(RuntimeError):
                request.wait()
    return given


def read_openvino(path: str | os.PathLike[str]) -> "openvino.Model":
    """Read an .xml file, beside which its .bin file lies, or an .onnx file.

    Raises: WeightsError where it cannot be read; MissingDependencyError where OpenVINO is not installed.
    """
    try:
        from openvino.frontend import FrontEndManager
    except ImportError as error:
        raise missing_runtime("openvino", "'weightnet[openvino]'", error) from error
    read_file(path, max_bytes=MAX_EXPORTED_BYTES)  # for its errors: the runtime itself opens the path
    try:
        # Unlike Core.read_model, this does not try the readers of all other formats on what it cannot read.
        reader = FrontEndManager().load_by_framework({".onnx": "onnx", ".xml": "ir"}[Path(path).suffix])
        return reader.convert(reader.load(os.fspath(path)))
    except Exception as error:  # its classes of errors have no common base either
        raise unreadable(path, error) from error


def _openvino_shape(value: "openvino.Output", kind: str = "f32") -> Shape:
    shape = value.get_partial_shape()
    if value.get_element_type().to_string() != kind or shape.rank.is_dynamic:
        return None
    return [None if axis.is_dynamic else axis.get_length() for axis in shape]

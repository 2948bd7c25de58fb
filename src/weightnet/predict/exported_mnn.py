"""The engine of MNN files.

Shape suffixes: as in `weightnet.predict.interface`.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from weightnet.predict.exported import (
    INPUT,
    MAX_EXPORTED_BYTES,
    card_beside,
    check_trial,
    missing_runtime,
    run_none,
    unreadable,
    usable_cores,
)
from weightnet.predict.interface import LOGITS, Batch, check_batch, check_outputs
from weightnet.zoo.cards import read_file

_QUIET = threading.Lock()  # standard output is the process's: one at a time may put another in its place


class MnnEngine:
    """Runs an exported .mnn file in MNN, on the CPU, in single precision; its card must lie beside it.

    Raises: as `open_engine`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with _quiet():
            try:
                import MNN
                import MNN.expr
                import MNN.nn
            except ImportError as error:
                raise missing_runtime("MNN", "'weightnet[mnn]'", error) from error
            self.card, self._path, self._expr = card_beside(path), path, MNN.expr
            self._one_at_a_time = threading.Lock()  # its modules are not made for more
            read_file(path, max_bytes=MAX_EXPORTED_BYTES)  # for its errors: the runtime itself opens the path
            crop = self.card.preprocess.crop
            try:
                self._module = MNN.nn.load_module_from_file(
                    os.fspath(path),
                    [INPUT],
                    [],  # all that the file has
                    precision_mode=MNN.expr.PrecisionMode.High,
                    thread_num=usable_cores(),
                )
                self._names = self._module.get_info()["outputNames"]
                given = self._run(np.zeros((1, self.card.network.in_channels, crop, crop), np.float32))
            except Exception as error:  # its classes of errors have no common base
                raise unreadable(path, error) from error
        self.outputs = check_trial(path, self.card, given)

    def run(self, x_BCHW: Batch, /) -> Batch:
        """Return logits, as `Engine.run`."""
        return self.run_outputs(x_BCHW, [LOGITS])[LOGITS]

    def run_outputs(self, x_BCHW: Batch, names: Sequence[str], /) -> dict[str, Batch]:
        """Return some of the file's outputs, as `Engine.run_outputs`."""
        check_outputs(names, self.outputs)
        check_batch(x_BCHW, self.card)
        if not len(x_BCHW):
            return run_none(self, x_BCHW, names)
        given = self._run(x_BCHW)
        return {name: given[name] for name in names}

    def _run(self, x_BCHW: Batch) -> dict[str, Batch]:
        expr = self._expr
        with self._one_at_a_time:
            photos = expr.placeholder(list(x_BCHW.shape), expr.NCHW, expr.float)
            photos.write(np.ascontiguousarray(x_BCHW))
            given = self._module.forward([photos])
            # Copies: its arrays are views of memory that the next run takes.
            arrays = [np.array(expr.convert(value, expr.NCHW).read()) for value in given]
        return dict(zip(self._names, arrays, strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from standard output what MNN writes there as it is imported and when a file is wrong."""
    with _QUIET:
        try:
            kept = os.dup(1)
        except OSError:  # it is closed
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            yield
        finally:
            if os.name == "posix":
                ctypes.CDLL(None).fflush(None)  # C's own buffer
            os.dup2(kept, 1)
            os.close(kept)

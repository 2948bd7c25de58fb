"""The engine of ExecuTorch files.

Shape suffixes: as in `weightnet.predict.interface`.
"""

import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weightnet.errors import UsageError
from weightnet.predict.exported import (
    MAX_EXPORTED_BYTES,
    card_beside,
    check_trial,
    exported_as,
    joined,
    missing_runtime,
    run_none,
    unreadable,
)
from weightnet.predict.interface import LOGITS, Batch, check_batch, check_outputs
from weightnet.zoo.cards import read_file


class ExecuTorchEngine:
    """Runs an exported .pte file in ExecuTorch, on the CPU; its card, which names its outputs, must lie beside it.

    The file takes one photo of the card's size; batches are run photo by photo.

    Raises: as `open_engine`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that its interface may change, and of what it imports
                from executorch.runtime import Runtime
        except ImportError as error:
            raise missing_runtime("executorch", "'weightnet[executorch]'", error) from error
        self.card, self._path = card_beside(path), path
        read_file(path, max_bytes=MAX_EXPORTED_BYTES)  # for its errors: the runtime itself opens the path
        self._one_at_a_time = threading.Lock()
        crop = self.card.preprocess.crop
        try:
            self._names = tuple(exported_as(self.card, path).get("outputs", (LOGITS,)))
            self._program = Runtime.get().load_program(Path(path))  # kept: the method reads its memory
            self._method = self._program.load_method("forward")
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
        crop = self.card.preprocess.crop
        if x_BCHW.shape[2:] != (crop, crop):
            raise UsageError(
                f"Photos for a .pte file must be of the size that it was exported for, {crop} x {crop} px. "
                f"Got shape={x_BCHW.shape}. Leave the size out, or export to another format."
            )
        if not len(x_BCHW):
            return run_none(self, x_BCHW, names)
        return joined(names, [self._run(x_BCHW[photo : photo + 1]) for photo in range(len(x_BCHW))])

    def _run(self, x_1CHW: Batch) -> dict[str, Batch]:
        import torch

        with self._one_at_a_time:
            given = self._method.execute([torch.from_numpy(x_1CHW)])
            # Copies: the next run writes its outputs to the same place.
            return {name: value.contiguous().numpy().copy() for name, value in zip(self._names, given, strict=True)}

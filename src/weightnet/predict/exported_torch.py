"""The engine of files of `torch.export`.

Shape suffixes: as in `weightnet.predict.interface`.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from weightnet.errors import UsageError, needs_torch
from weightnet.predict.exported import MAX_EXPORTED_BYTES, card_beside, check_trial, run_none, unreadable
from weightnet.predict.interface import LOGITS, MIN_SIZE_PX, Batch, check_batch, check_outputs
from weightnet.zoo.cards import read_file


class TorchExportEngine:
    """Runs an exported .pt2 file in PyTorch, on the CPU; its card must lie beside it.

    PyTorch reads such a file by means that can run code from it: open only files from where you would take a program.

    Raises: as `open_engine`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with needs_torch(f"The file {os.fspath(path)}"):
            import torch

        self.card, self._path = card_beside(path), path
        read_file(path, max_bytes=MAX_EXPORTED_BYTES)  # for its errors: the runtime itself opens the path
        try:
            self._module: Any = torch.export.load(path).module()
            crop = self.card.preprocess.crop
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
        if min(x_BCHW.shape[2:]) == MIN_SIZE_PX:
            raise UsageError(
                f"The height and width of photos for a .pt2 file must be over {MIN_SIZE_PX} px. "
                f"Got shape={x_BCHW.shape}. Enlarge the photos."
            )
        if not len(x_BCHW):
            return run_none(self, x_BCHW, names)
        given = self._run(x_BCHW)
        return {name: given[name] for name in names}

    def _run(self, x_BCHW: Batch) -> dict[str, Batch]:
        import torch

        with torch.no_grad():
            given = self._module(torch.from_numpy(x_BCHW))
            return {name: value.contiguous().numpy() for name, value in given.items()}

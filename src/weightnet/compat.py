"""The few functions of MegEngine that the hub page's snippet uses, so that it runs with other import lines only.

Write `import weightnet.compat as megengine` for `import megengine.hub`, `import weightnet.compat as F` for
`import megengine.functional as F`, and `import weightnet.transforms as T` for `import megengine.data.transform as T`.

>>> import numpy as np
>>> import weightnet.compat as megengine
>>> import weightnet.compat as F
>>> model = megengine.hub.load("megengine/models", "shufflenet_v2_x0_5")
>>> model.eval()
>>> F.softmax(model(np.zeros((1, 3, 64, 64), np.float32))).shape
torch.Size([1, 1000])
"""

import numpy as np
import numpy.typing as npt

from weightnet.errors import UsageError, needs_torch

with needs_torch("weightnet.compat"):
    import torch
    from torch import Tensor

from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.zoo.weights import load

REPOSITORIES = ("megengine/models", "megvii-model/WeightNet")


class ArrayModel:
    """A network that takes NumPy arrays, as MegEngine's modules do; the network itself is its `network`.

    Args:
        network: the network to call.
    """

    def __init__(self, network: ShuffleNetV2) -> None:
        self.network = network

    def __call__(self, x_BCHW: npt.ArrayLike | Tensor) -> Tensor:
        """Return the logits, without gradients.

        Args:
            x_BCHW: a batch of preprocessed photos, of any number type.

        Shape: (B, C, H, W) gives (B, num_classes).

        Raises: UsageError where the input has another shape.
        """
        parameter = next(self.network.parameters())
        with torch.no_grad():
            return self.network(_tensor(x_BCHW).to(parameter))  # type: ignore[no-any-return]

    def eval(self) -> None:
        """Switch to evaluation: batch norm uses its running statistics, and nothing is dropped."""
        self.network.eval()

    def train(self, mode: bool = True) -> None:
        """Switch to training, or with False to evaluation."""
        self.network.train(mode)


class _Hub:
    """`megengine.hub`, as far as the page uses it."""

    def load(self, repo_info: str, entry: str, *, pretrained: bool = False) -> ArrayModel:
        """Return a network by the name that it has on the page.

        The page's four names mean WeightNet 1x here, as its title promises; in `megengine/models` upstream the same
        names were those of plain ShuffleNetV2 (here `shufflenet_v2_x0_5.plain` and so on).

        Args:
            repo_info: the repository, "megengine/models" or "megvii-model/WeightNet", with or without ":branch".
            entry: a name of `weightnet.list_models()`.
            pretrained: whether to load the published weights, downloaded at first use.

        Raises: UsageError for another repository; otherwise as `weightnet.load`.
        """
        if repo_info.partition(":")[0].lower() not in {name.lower() for name in REPOSITORIES}:
            raise UsageError(
                f"The repository must be {' or '.join(REPOSITORIES)}. Got repo_info={repo_info!r}. "
                "Use one of them; no others are served here."
            )
        return ArrayModel(load(entry, pretrained=pretrained))


hub = _Hub()


def softmax(inp: npt.ArrayLike | Tensor, axis: int | None = None) -> Tensor:
    """Return probabilities of logits.

    Args:
        inp: logits.
        axis: the axis along which they sum to 1; None takes the classes as MegEngine does: axis 1, or axis 0 for inputs
            of 0, 1 or 3 axes.

    Shape: that of the input.

    Example:
        >>> softmax([[0.0, 0.0]])
        tensor([[0.5000, 0.5000]])

    Source: `megengine.functional.softmax` (MegEngine 1.13).
    """
    logits = _tensor(inp)
    if axis is None:
        axis = 0 if logits.ndim in (0, 1, 3) else 1
    return logits.softmax(axis)


def _tensor(values: npt.ArrayLike | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else values.float()
    # A copy: PyTorch takes no array that is reversed, and complains of one that cannot be written.
    return torch.from_numpy(np.array(values, np.float32))

"""The original framework's eager mode for `original.py`, which starts it under a Python that has MegEngine.

    python original_megengine.py FOLDER THREADS

It computes the published networks from the MegEngine checkpoints in FOLDER, in the published form: kernels are
generated for each photo and applied by one convolution with groups = batch. It also writes each as a static graph,
FOLDER/NAME_B.mge, for `original_lite.py`, whose tasks it answers too. It needs nothing but MegEngine and NumPy.
"""

from pathlib import Path
from typing import Any

import megengine as mge  # type: ignore[import-not-found]
import megengine.functional as F  # type: ignore[import-not-found]
from megengine.jit import trace  # type: ignore[import-not-found]
from original_lite import SIZE_PX, Run, answer_tasks, photos

STRIDE_2 = (0, 4, 12)  # the blocks that begin a stage
BLOCKS = 16


class Original:
    """A network of `shufflenet_v2.py` of the original, as functions of its checkpoint; shapes are NCHW."""

    def __init__(self, checkpoint: Path) -> None:
        arrays = mge.load(str(checkpoint))
        self.state = {name: mge.tensor(array) for name, array in arrays.items()}

    def __call__(self, x: Any) -> Any:
        x = F.relu(self.norm(self.conv(x, "first_conv.0", 2, 1), "first_conv.1"))
        x = F.max_pool2d(x, 3, 2, 1)
        for number in range(BLOCKS):
            x = self.block(x, f"features.{number}", 2 if number in STRIDE_2 else 1)
        x = F.relu(self.norm(self.conv(x, "conv_last.0"), "conv_last.1"))
        x = F.avg_pool2d(x, SIZE_PX // 32).reshape(x.shape[0], -1)
        return F.linear(x, self.state["classifier.0.weight"], self.state["classifier.0.bias"])

    def conv(self, x: Any, name: str, stride: int = 1, padding: int = 0) -> Any:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)

    def norm(self, x: Any, name: str) -> Any:
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{kind}"].reshape(1, -1, 1, 1) for kind in kinds), training=False)

    def block(self, x: Any, name: str, stride: int) -> Any:
        passed = x
        if stride == 1:
            batch, channels, height, width = x.shape
            x = x.reshape(batch * channels // 2, 2, height * width).transpose(1, 0, 2)
            x = x.reshape(2, -1, channels // 2, height, width)
            passed, x = x[0], x[1]
        pooled = x.mean(axis=2, keepdims=True).mean(axis=3, keepdims=True)
        descriptor = self.conv(pooled, f"{name}.reduce")
        y = F.relu(self.norm(self.pointwise(x, descriptor, f"{name}.wnet1"), f"{name}.bn1"))
        y = self.norm(self.depthwise(y, descriptor, f"{name}.wnet2", stride), f"{name}.bn2")
        y = F.relu(self.norm(self.pointwise(y, descriptor, f"{name}.wnet3"), f"{name}.bn3"))
        if stride == 2:
            passed = self.norm(self.depthwise(passed, descriptor, f"{name}.wnet_proj_1", 2), f"{name}.bn_proj_1")
            passed = F.relu(self.norm(self.pointwise(passed, descriptor, f"{name}.wnet_proj_2"), f"{name}.bn_proj_2"))
        return F.concat([passed, y], 1)

    def kernels(self, descriptor: Any, name: str) -> Any:
        bank = self.state[f"{name}.wn_fc2.weight"]  # (groups, O, I, 1, 1)
        return F.conv2d(F.sigmoid(self.conv(descriptor, f"{name}.wn_fc1")), bank, groups=bank.shape[0])

    def pointwise(self, x: Any, descriptor: Any, name: str) -> Any:
        batch, channels, height, width = x.shape
        kernels = self.kernels(descriptor, name)
        if batch == 1:
            return F.conv2d(x, kernels.reshape(-1, channels, 1, 1))
        kernels = kernels.reshape(batch, -1, channels, 1, 1)
        y = F.conv2d(x.reshape(1, -1, height, width), kernels, groups=batch)
        return y.reshape(batch, -1, height, width)

    def depthwise(self, x: Any, descriptor: Any, name: str, stride: int) -> Any:
        batch, channels, height, width = x.shape
        kernels = self.kernels(descriptor, name).reshape(batch * channels, 1, 1, 3, 3)
        y = F.conv2d(x.reshape(1, -1, height, width), kernels, None, stride, 1, groups=batch * channels)
        return y.reshape(batch, channels, y.shape[2], y.shape[3])


def prepared(folder: Path, name: str, batch: int, threads: int) -> dict[str, Run]:
    """Write a network as a static graph, and return a function that runs it eagerly, from a NumPy array to one."""
    x_BCHW = photos(batch)
    mge.set_default_device("xpux")  # the only one that can be written to a file
    traced = trace(Original(folder / f"{name}.pkl"), symbolic=True, capture_as_const=True)
    traced(mge.tensor(x_BCHW))
    file = folder / f"{name}_{batch}.mge"
    traced.dump(str(file), arg_names=["input"], output_names=["logits"], enable_fuse_conv_bias_nonlinearity=True)
    mge.set_default_device("xpux" if threads == 1 else f"multithread{threads}:0")
    network = Original(folder / f"{name}.pkl")
    return {"eager": lambda: network(mge.tensor(x_BCHW)).numpy()}


if __name__ == "__main__":
    answer_tasks(prepared)

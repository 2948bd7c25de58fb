"""The networks as ports to PyTorch have them: the published layer, a kernel for each photo, operator by operator.

Kernels come from a grouped 1x1 convolution and are applied by a convolution with groups = batch; channels are shuffled
by a transposition; maps are channels first, PyTorch's default. Parameters have the original's names, so that it loads
the state of a `ShuffleNetV2` of this package, and gives its numbers (tests/packaging/test_benchmarks.py).

Source: megvii-model/WeightNet, `weightnet.py` and `shufflenet_v2.py`, in MegEngine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightnet.nn.variants import NetworkSpec


class WeightNet(nn.Module):
    """A pointwise layer (k = 1) or a depthwise one (k = 3) that makes its kernels from a descriptor (B, S, 1, 1)."""

    def __init__(self, inputs: int, outputs: int, k: int, stride: int, squeeze: int, spec: NetworkSpec) -> None:
        super().__init__()
        self.inputs, self.outputs, self.k, self.stride = 1 if k > 1 else inputs, outputs, k, stride
        blocks = 1 if k > 1 else spec.G
        gates = outputs * blocks * spec.M // spec.G
        self.wn_fc1 = nn.Conv2d(squeeze, gates, 1)
        self.wn_fc2 = nn.Conv2d(gates, outputs * self.inputs * k * k, 1, groups=outputs * blocks, bias=False)

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        kernels = self.wn_fc2(self.wn_fc1(descriptor).sigmoid()).reshape(-1, self.inputs, self.k, self.k)
        x = x.reshape(1, batch * channels, height, width)
        y = F.conv2d(x, kernels, stride=self.stride, padding=self.k // 2, groups=batch * channels // self.inputs)
        return y.reshape(batch, self.outputs, *y.shape[2:])


class Block(nn.Module):
    """A block of stride 1, whose even channels pass, or of stride 2, which projects them all besides."""

    def __init__(self, width: int, outputs: int, stride: int, spec: NetworkSpec) -> None:
        super().__init__()
        self.stride, middle, rest, squeeze = stride, outputs // 2, outputs - width, max(16, width // 16)
        self.reduce = nn.Conv2d(width, squeeze, 1)
        self.wnet1, self.bn1 = WeightNet(width, middle, 1, 1, squeeze, spec), nn.BatchNorm2d(middle)
        self.wnet2, self.bn2 = WeightNet(middle, middle, 3, stride, squeeze, spec), nn.BatchNorm2d(middle)
        self.wnet3, self.bn3 = WeightNet(middle, rest, 1, 1, squeeze, spec), nn.BatchNorm2d(rest)
        if stride == 2:
            self.wnet_proj_1, self.bn_proj_1 = WeightNet(width, width, 3, 2, squeeze, spec), nn.BatchNorm2d(width)
            self.wnet_proj_2, self.bn_proj_2 = WeightNet(width, width, 1, 1, squeeze, spec), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        passed = x
        if self.stride == 1:
            batch, channels, height, width = x.shape
            pairs = x.reshape(batch * channels // 2, 2, height * width).transpose(0, 1)
            passed, x = pairs.reshape(2, batch, channels // 2, height, width)
        descriptor = self.reduce(x.mean((2, 3), keepdim=True))
        x = F.relu(self.bn1(self.wnet1(x, descriptor)))
        x = F.relu(self.bn3(self.wnet3(self.bn2(self.wnet2(x, descriptor)), descriptor)))
        if self.stride == 2:
            passed = self.bn_proj_1(self.wnet_proj_1(passed, descriptor))
            passed = F.relu(self.bn_proj_2(self.wnet_proj_2(passed, descriptor)))
        return torch.cat([passed, x], 1)


class Port(nn.Module):
    """A WeightNet network: photos (B, 3, H, W) give logits (B, classes)."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = spec.stem_channels
        for outputs, repeats in zip(spec.stage_channels, spec.stage_repeats, strict=True):
            blocks.append(Block(channels, outputs, 2, spec))
            blocks += [Block(outputs // 2, outputs, 1, spec) for _ in range(repeats - 1)]
            channels = outputs
        self.first_conv = _conv_norm_relu(nn.Conv2d(spec.in_channels, spec.stem_channels, 3, 2, 1))
        self.features = nn.Sequential(*blocks)
        self.conv_last = _conv_norm_relu(nn.Conv2d(channels, spec.head_channels, 1))
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Sequential(nn.Linear(spec.head_channels, spec.num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_last(self.features(F.max_pool2d(self.first_conv(x), 3, 2, 1)))
        logits: Tensor = self.classifier(self.dropout(x.mean((2, 3))))
        return logits


def _conv_norm_relu(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())

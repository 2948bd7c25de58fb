"""ShuffleNetV2, plain and with WeightNet: all twelve networks of `weightnet.nn.variants`.

Parameter names are those of the original checkpoints (`first_conv`, `features.N.wnet1.wn_fc1`, ...).

Source: Ma et al., ECCV 2020 (arXiv 2007.11823); Ma et al., "ShuffleNet V2", ECCV 2018; megvii-model/WeightNet,
`shufflenet_v2.py`.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weightnet.errors import UsageError
from weightnet.nn import functional as WF
from weightnet.nn.layers import WeightNet2d, squeeze_width
from weightnet.nn.variants import NetworkSpec

MIN_SIZE_PX = 32


class PlainBlock(nn.Module):
    """A block of ShuffleNetV2 with ordinary convolutions; stride 2 halves the image and adds a projecting branch.

    Shape: (B, in_channels, H, W) gives (B, out_channels, H / stride, W / stride), rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        width, mid, rest = _block_widths(in_channels, out_channels, stride)
        self.conv1 = nn.Conv2d(width, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, rest, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(rest)
        if stride == 2:
            self.conv_proj_1 = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
            self.bn_proj_1 = nn.BatchNorm2d(width)
            self.conv_proj_2 = nn.Conv2d(width, width, 1, bias=False)
            self.bn_proj_2 = nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        passed, x = WF.split_shuffled(x) if self.stride == 1 else (x, x)
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        branch = F.relu(self.bn3(self.conv3(branch)))
        if self.stride == 2:
            passed = self.bn_proj_1(self.conv_proj_1(passed))
            passed = F.relu(self.bn_proj_2(self.conv_proj_2(passed)))
        return torch.cat([passed, branch], 1)


class WeightNetBlock(nn.Module):
    """The same block with generated kernels: one descriptor of the branch's input serves its three or five layers.

    Shape: (B, in_channels, H, W) gives (B, out_channels, H / stride, W / stride), rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, M: int, G: int) -> None:
        super().__init__()
        self.stride = stride
        width, mid, rest = _block_widths(in_channels, out_channels, stride)
        shared: dict[str, Any] = {"M": M, "G": G, "squeeze_channels": squeeze_width(width), "shared_descriptor": True}
        depthwise: dict[str, Any] = {"stride": stride, "padding": 1, "depthwise": True}
        self.reduce = nn.Conv2d(width, squeeze_width(width), 1)
        self.wnet1 = WeightNet2d(width, mid, 1, **shared)
        self.bn1 = nn.BatchNorm2d(mid)
        self.wnet2 = WeightNet2d(mid, mid, 3, **depthwise, **shared)
        self.bn2 = nn.BatchNorm2d(mid)
        self.wnet3 = WeightNet2d(mid, rest, 1, **shared)
        self.bn3 = nn.BatchNorm2d(rest)
        if stride == 2:
            self.wnet_proj_1 = WeightNet2d(width, width, 3, **depthwise, **shared)
            self.bn_proj_1 = nn.BatchNorm2d(width)
            self.wnet_proj_2 = WeightNet2d(width, width, 1, **shared)
            self.bn_proj_2 = nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        passed, x = WF.split_shuffled(x) if self.stride == 1 else (x, x)
        descriptor = WF.linear_1x1(WF.spatial_mean(x), self.reduce.weight, self.reduce.bias)
        branch = F.relu(self.bn1(self.wnet1(x, descriptor)))
        branch = self.bn2(self.wnet2(branch, descriptor))
        branch = F.relu(self.bn3(self.wnet3(branch, descriptor)))
        if self.stride == 2:
            passed = self.bn_proj_1(self.wnet_proj_1(passed, descriptor))
            passed = F.relu(self.bn_proj_2(self.wnet_proj_2(passed, descriptor)))
        return torch.cat([passed, branch], 1)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 as the page has it: with WeightNet where the spec's M is at least 1, plain where M = G = 0.

    Args:
        spec: widths, depths, M and G, dropout, input channels and classes.

    Shape: (B, spec.in_channels, H, W) with H and W of at least 32 px gives logits (B, spec.num_classes).

    Raises: UsageError where the spec or an input does not fit the rules it names.

    Example:
        >>> from weightnet.nn.variants import VARIANTS
        >>> network = ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5"].spec).eval()
        >>> network(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 1000])

    Source: megvii-model/WeightNet, class `ShuffleNetV2`.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.card: Any = None  # the model card that `weightnet.load` found with the weights
        bias = spec.M > 0  # the original WeightNet networks have one before the batch norm, the plain ones none
        self.first_conv = nn.Sequential(
            nn.Conv2d(spec.in_channels, spec.stem_channels, 3, 2, 1, bias=bias),
            nn.BatchNorm2d(spec.stem_channels),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.features = nn.Sequential(*_blocks(spec))
        self.conv_last = nn.Sequential(
            nn.Conv2d(spec.stage_channels[-1], spec.head_channels, 1, bias=bias),
            nn.BatchNorm2d(spec.head_channels),
            nn.ReLU(inplace=True),
        )
        self.dropout = nn.Dropout(spec.dropout)
        self.num_features = spec.head_channels
        self.classifier = nn.Sequential(nn.Linear(spec.head_channels, spec.num_classes))
        self.reset_parameters()

    @property
    def num_classes(self) -> int:
        """Classes of the classifier."""
        return self.spec.num_classes

    def reset_parameters(self) -> None:
        """Draw new parameters from the original's distributions.

        Stem N(0, 0.01), other convolutions N(0, 1 / input channels per group), linear N(0, 0.01), biases 0,
        batch norm gamma 1 and beta 1e-4; `WeightNet2d.reset_parameters` for the generated kernels.

        Source: megvii-model/WeightNet, `ShuffleNetV2._initialize_weights`.
        """
        for name, module in self.named_modules():
            if isinstance(module, WeightNet2d):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d) and ".wnet" not in name:
                std = 0.01 if name == "first_conv.0" else 1 / module.weight.shape[1]
                nn.init.normal_(module.weight, 0, std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                nn.init.ones_(module.weight)
                nn.init.constant_(module.bias, 1e-4)
            elif isinstance(module, nn.Linear):
                _reset_linear(module)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Return the last feature map (B, num_features, H / 32, W / 32), rounded up."""
        return self.conv_last(self.features(self._stem(x)))  # type: ignore[no-any-return]

    def forward_head(self, x: Float[Tensor, "B F h w"], *, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) of a last feature map, or its pooled features (B, num_features)."""
        pooled = WF.spatial_mean(x)
        return pooled if pre_logits else self.classifier(self.dropout(pooled))

    def stage_features(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Return the feature map at the end of each of the three stages (strides 8, 16 and 32), as detectors want them.

        Example:
            >>> from weightnet.nn.variants import VARIANTS
            >>> network = ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5"].spec)
            >>> [tuple(x.shape) for x in network.stage_features(torch.zeros(1, 3, 64, 64))]
            [(1, 48, 8, 8), (1, 96, 4, 4), (1, 192, 2, 2)]
        """
        x, outputs, block = self._stem(x), [], 0
        for repeats in self.spec.stage_repeats:
            x = self.features[block : block + repeats](x)
            outputs.append(x)
            block += repeats
        return outputs

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one of so many classes; the rest of the network stays.

        Raises: UsageError for fewer than one class.
        """
        self.spec = dataclasses.replace(self.spec, num_classes=num_classes)
        old = self.classifier[0].weight
        linear = nn.Linear(self.num_features, num_classes, device=old.device, dtype=old.dtype)
        _reset_linear(linear)
        self.classifier = nn.Sequential(linear)
        self.card = None

    def _stem(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.spec.in_channels or min(x.shape[2:]) < MIN_SIZE_PX:
            raise UsageError(
                f"The input must be a batch of shape (B, {self.spec.in_channels}, H, W) with H and W of at least "
                f"{MIN_SIZE_PX} px. Got shape={tuple(x.shape)}. Resize or reshape it."
            )
        return self.maxpool(self.first_conv(x))  # type: ignore[no-any-return]


def outline(spec: NetworkSpec) -> ShuffleNetV2:
    """Return a network on the meta device: names and shapes of all parameters, but no memory and no values.

    Raises: RuntimeError where a size is beyond what PyTorch can count.

    Example:
        >>> from weightnet.nn.variants import VARIANTS
        >>> outline(VARIANTS["shufflenet_v2_x0_5"].spec).conv_last[0].weight.shape
        torch.Size([1024, 192, 1, 1])
    """
    with torch.device("meta"), _NoInit():
        return ShuffleNetV2(spec)


class _NoInit(TorchFunctionMode):
    """Skips the drawing of parameters, for which PyTorch would import a symbolic algebra system on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _block_widths(in_channels: int, out_channels: int, stride: int) -> tuple[int, int, int]:
    """Return a block's branch input, middle and branch output channels."""
    width = in_channels // 2 if stride == 1 else in_channels
    return width, out_channels // 2, out_channels - width


def _blocks(spec: NetworkSpec) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    in_channels = spec.stem_channels
    for out_channels, repeats in zip(spec.stage_channels, spec.stage_repeats, strict=True):
        for index in range(repeats):
            stride = 2 if index == 0 else 1
            if spec.M:
                blocks.append(WeightNetBlock(in_channels, out_channels, stride, spec.M, spec.G))
            else:
                blocks.append(PlainBlock(in_channels, out_channels, stride))
            in_channels = out_channels
    return blocks


def _reset_linear(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, 0, 0.01)
    nn.init.zeros_(linear.bias)

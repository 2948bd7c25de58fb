"""The twelve networks for PyTorch's hub: `torch.hub.load("<repository>", "shufflenet_v2_x0_5", pretrained=True)`.

Dots of the zoo's names are underscores here. The four names without a suffix are WeightNet 1x.
"""

# The hub lists every callable of this file as a model, so nothing but modules is imported.
import collections.abc
import importlib.util
import pathlib
import sys

dependencies = ["cv2", "filelock", "jaxtyping", "numpy", "platformdirs", "pooch", "rich", "safetensors", "torch"]

if importlib.util.find_spec("weightnet") is None:  # a clone that was not installed
    sys.path.insert(0, str(pathlib.Path(__file__).parent / "src"))

import weightnet  # noqa: E402  # found only now where nothing is installed
import weightnet.nn.variants  # noqa: E402


def _entry(name: str) -> collections.abc.Callable[..., "weightnet.ShuffleNetV2"]:
    def build(
        *,
        pretrained: bool | str = False,
        num_classes: int | None = None,
        in_channels: int = 3,
        progress: bool = True,
    ) -> "weightnet.ShuffleNetV2":
        return weightnet.load(
            name, pretrained=pretrained, num_classes=num_classes, in_channels=in_channels, progress=progress
        )

    build.__name__ = build.__qualname__ = name.replace(".", "_")
    build.__doc__ = f"""{weightnet.nn.variants.VARIANTS[name].title}, by `weightnet.load("{name}", ...)`.

    Args:
        pretrained: True for the published weights (of the names without a suffix only), or a path or address.
        num_classes: classes; by default those of the weights, or 1000.
        in_channels: channels of the input.
        progress: whether a download shows a progress bar on standard error.
    """
    return build


shufflenet_v2_x0_5 = _entry("shufflenet_v2_x0_5")
shufflenet_v2_x1_0 = _entry("shufflenet_v2_x1_0")
shufflenet_v2_x1_5 = _entry("shufflenet_v2_x1_5")
shufflenet_v2_x2_0 = _entry("shufflenet_v2_x2_0")
shufflenet_v2_x0_5_wn8x = _entry("shufflenet_v2_x0_5.wn8x")
shufflenet_v2_x1_0_wn4x = _entry("shufflenet_v2_x1_0.wn4x")
shufflenet_v2_x1_5_wn4x = _entry("shufflenet_v2_x1_5.wn4x")
shufflenet_v2_x2_0_wn4x = _entry("shufflenet_v2_x2_0.wn4x")
shufflenet_v2_x0_5_plain = _entry("shufflenet_v2_x0_5.plain")
shufflenet_v2_x1_0_plain = _entry("shufflenet_v2_x1_0.plain")
shufflenet_v2_x1_5_plain = _entry("shufflenet_v2_x1_5.plain")
shufflenet_v2_x2_0_plain = _entry("shufflenet_v2_x2_0.plain")

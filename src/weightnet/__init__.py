"""WeightNet on ShuffleNetV2, exact to the original. Importing the package is cheap: names load when they are used.

>>> import weightnet
>>> weightnet.list_models("*x0_5")
['shufflenet_v2_x0_5']
"""

import importlib
from typing import TYPE_CHECKING, Any

from weightnet.errors import (
    DataError,
    DownloadError,
    ImageError,
    MissingDependencyError,
    TrainingError,
    UnknownModelError,
    UsageError,
    WeightNetError,
    WeightsError,
    WeightsWarning,
    needs_torch,
)

if TYPE_CHECKING:
    from weightnet import functional, transforms
    from weightnet.export.model import export_model
    from weightnet.images.transforms import Preprocess
    from weightnet.nn.complexity import complexity
    from weightnet.nn.fold import fold
    from weightnet.nn.layers import WeightNet2d, set_form
    from weightnet.nn.shufflenet import ShuffleNetV2
    from weightnet.nn.variants import NetworkSpec
    from weightnet.predict.classifier import Classifier, Prediction
    from weightnet.zoo.convert import convert
    from weightnet.zoo.describe import preprocess_for
    from weightnet.zoo.hub import list_models
    from weightnet.zoo.weights import load

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "DataError",
    "DownloadError",
    "ImageError",
    "MissingDependencyError",
    "NetworkSpec",
    "Prediction",
    "Preprocess",
    "ShuffleNetV2",
    "TrainingError",
    "UnknownModelError",
    "UsageError",
    "WeightNet2d",
    "WeightNetError",
    "WeightsError",
    "WeightsWarning",
    "__version__",
    "complexity",
    "convert",
    "export_model",
    "fold",
    "functional",
    "list_models",
    "load",
    "preprocess_for",
    "set_form",
    "transforms",
]

# Where each public name lives; "" for a module of that name. The same as the block above, for the running program.
_HOMES = {
    "Classifier": "predict.classifier",
    "NetworkSpec": "nn.variants",
    "Prediction": "predict.classifier",
    "Preprocess": "images.transforms",
    "ShuffleNetV2": "nn.shufflenet",
    "WeightNet2d": "nn.layers",
    "complexity": "nn.complexity",
    "convert": "zoo.convert",
    "export_model": "export.model",
    "fold": "nn.fold",
    "functional": "",
    "list_models": "zoo.hub",
    "load": "zoo.weights",
    "preprocess_for": "zoo.describe",
    "set_form": "nn.layers",
    "transforms": "",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'weightnet' has no attribute {name!r}")
    if not _HOMES[name]:
        return importlib.import_module(f"weightnet.{name}")
    with needs_torch(f"weightnet.{name}", extra="export" if name == "export_model" else "torch"):
        value = getattr(importlib.import_module(f"weightnet.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

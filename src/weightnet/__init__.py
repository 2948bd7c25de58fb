"""WeightNet on ShuffleNetV2, exact to the original, on PyTorch. Importing the package is cheap: names load when used."""

__version__ = "0.1.0"

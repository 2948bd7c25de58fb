"""The hub page's transforms under a short name: `import weightnet.transforms as T`.

>>> import weightnet.transforms as T
>>> T.Resize(256).output_size
256
"""

from weightnet.images.transforms import CenterCrop, Compose, Normalize, Preprocess, Resize, ToMode

__all__ = ["CenterCrop", "Compose", "Normalize", "Preprocess", "Resize", "ToMode"]

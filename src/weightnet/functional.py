"""The layer's maths, apart from any parameters, under a short name: `import weightnet.functional as WF`.

>>> import torch, weightnet.functional as WF
>>> WF.generate_kernels(torch.ones(2, 4, 1, 3), torch.ones(4, 1, 3, 5, 1, 1)).shape
torch.Size([2, 4, 5, 1, 1])
"""

from weightnet.errors import needs_torch

with needs_torch("weightnet.functional"):
    from weightnet.nn.functional import (
        generate_kernels,
        weightnet_conv2d_feature,
        weightnet_conv2d_matmul,
        weightnet_conv2d_reference,
    )

__all__ = ["generate_kernels", "weightnet_conv2d_feature", "weightnet_conv2d_matmul", "weightnet_conv2d_reference"]

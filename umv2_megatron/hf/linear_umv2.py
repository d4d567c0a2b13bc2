"""Projections of the model, y = x W^T + b, fast where a step of decoding spends most of its time.

On a CPU torch computes a float32 product with the matrix library it was built with, which takes up to three times as
long as oneDNN for the few rows of a step. Torch carries oneDNN, too, and its compiler calls it for the same purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class UMv2Linear(nn.Linear):
    """``nn.Linear``, computed by oneDNN on a CPU in float32 while autograd is off."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., columns] to [..., rows]."""
        if _ONEDNN and not torch.is_grad_enabled() and _are_plain(x, self.weight):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def _are_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether both are ordinary float32 tensors in host memory, and no autocast and no compiler has a say."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) is nn.Parameter
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )

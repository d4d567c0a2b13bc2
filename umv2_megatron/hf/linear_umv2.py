"""Products with the model's ``nn.Linear`` layers, fast where a step of decoding spends most of its time.

On a CPU torch computes a float32 product with the matrix library it was built with, which takes up to three times as
long as oneDNN for the few rows of a step. Torch carries oneDNN, too, and its compiler calls it for the same purpose.

The layers are ``nn.Linear`` and nothing else, because quantizers and adapters look for exactly that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, [..., columns] to [..., rows]; by oneDNN where it is a plain ``nn.Linear`` on a CPU in float32 and
    autograd is off."""
    if _ONEDNN and type(layer) is nn.Linear and not torch.is_grad_enabled() and _is_plain(layer, x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return layer(x)


def _is_plain(layer: nn.Linear, x: Tensor) -> bool:
    """Whether both are ordinary float32 tensors in host memory, no hook or other forward has been put on the layer, and
    no autocast and no compiler has a say."""
    weight = layer.weight
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) is nn.Parameter
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in layer.__dict__
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )

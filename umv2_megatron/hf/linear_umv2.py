"""Products with the model's ``nn.Linear`` layers, fast where a step of decoding spends most of its time.

On a CPU torch computes a float32 product with the matrix library it was built with, which takes several times as long
as reading the weight for the few rows of a step. Up to 64 rows the compiled kernels compute it (``native_umv2``), also
in bfloat16; for more rows, or without kernels, oneDNN does in float32, which torch carries, too, and which its compiler
calls for the same purpose.

The layers are ``nn.Linear`` and nothing else, because quantizers and adapters look for exactly that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .native_umv2 import LARGEST_BATCH, linear, readable, usable

# Tokens of a part of a long prompt.
_TOKENS = 1024
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, [..., columns] to [..., rows]; by kernels or oneDNN where it is a plain ``nn.Linear`` on a CPU in
    float32 or, by kernels alone, bfloat16, and autograd is off."""
    if type(layer) is not nn.Linear or torch.is_grad_enabled() or not _is_plain(layer, x):
        return layer(x)
    if 0 < x.numel() <= LARGEST_BATCH * x.shape[-1] and usable(x) and _readable(layer):
        return linear(layer, x)
    if _ONEDNN and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return layer(x)


def in_parts(x: Tensor) -> Sequence[Tensor]:
    """``x`` [..., H] itself, or where it has many tokens on a CPU and nothing is kept for a backward, parts [T, H] of
    it: what a layer computes between its input and its output takes memory for one of them at a time."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return [x]  # an exported program is one for any length
    if torch._C._len_torch_function_stack():
        return [x]  # who looks at each call is to see one for all tokens
    flat = x.reshape(-1, x.shape[-1])
    return flat.split(_TOKENS) if flat.shape[0] > _TOKENS else [x]


def _readable(layer: nn.Linear) -> bool:
    dtype = layer.weight.dtype
    return readable(layer.weight, dtype) and (layer.bias is None or readable(layer.bias, dtype))


def _is_plain(layer: nn.Linear, x: Tensor) -> bool:
    """Whether both are ordinary tensors of one dtype in host memory, no hook or other forward has been put on the
    layer, and no autocast and no compiler has a say."""
    weight = layer.weight
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.device.type == weight.device.type == "cpu"
        and type(weight) is nn.Parameter
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in layer.__dict__
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )

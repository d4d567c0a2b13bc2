"""What stands between the products of a transformer block, on CPUs, each in one pass (``cpu_blocks.cpp``).

    swiglu     x [.., 2 F], halves a and b, p [..]   silu(a) b p,   silu(a) = a / (1 + e^-a)
    rms_norm   x [.., D], gain [D]                   x / sqrt(mean(x^2) + epsilon) gain
    rotate     x [s, .., D], angles [s, .., D]       x cos(angle) + (-x2, x1) sin(angle),   x = (x1, x2), its halves

Each computes in float32 and rounds once; in float32 the results are those of PyTorch's functions to some units in the
last place. Kept for the backward are inputs, and of the rotation nothing. float32 and bfloat16 (``takes``); none can
be differentiated twice. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umv2_megatron.ops import cpu_build


class _Rows(ctypes.Structure):
    """As in cpu_blocks.cpp."""

    _fields_ = [("sizes", ctypes.c_int64 * 3), ("strides", ctypes.c_int64 * 3)]


def available() -> bool:
    """Whether the functions of this module can be called: they can be compiled here."""
    try:
        cpu_build.library()
    except ImportError:
        return False
    return True


def takes(*tensors: Tensor) -> bool:
    """Whether tensors of this kind are taken: on the CPU, all float32 or all bfloat16, and not under autocast."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.bfloat16)
        and all(each.dtype == dtype and each.is_cpu for each in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def swiglu(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """[.., F] of ``x`` [.., 2 F], the gate first, times ``scale`` [..] where it is given (an expert's weights)."""
    assert scale is None or scale.shape == x.shape[:-1], (x.shape, scale.shape)
    return _SwiGLU.apply(x, scale)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Like ``x`` [.., D], whose last dimension is contiguous; ``gain`` [D]."""
    return _RMSNorm.apply(x, gain, epsilon)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Like ``x`` [s, b, heads, D]; ``angles`` [s, 1, 1, D] in float32, D even."""
    return _Rotate.apply(x, angles)


def _call(function: str, x: Tensor, *arguments: Any) -> None:
    """Call ``function`` for numbers of the dtype of ``x``; tensors among the arguments by their memory."""
    passed = [ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else each for each in arguments]
    half = int(x.dtype == torch.bfloat16)
    getattr(cpu_build.library(), function)(half, ctypes.c_int64(torch.get_num_threads()), *passed)


def _rows(x: Tensor) -> Optional[_Rows]:
    """How the rows of ``x`` lie in memory; None where they are not alike in at most three dimensions."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    if x.is_contiguous():
        return _Rows((1, 1, x.numel() // x.shape[-1]), (0, 0, x.shape[-1]))
    if not 2 <= x.dim() <= 4:
        return None
    missing = 4 - x.dim()
    return _Rows((*(1,) * missing, *x.shape[:-1]), (*(0,) * missing, *x.stride()[:-1]))


def _with_rows(x: Tensor) -> tuple[Tensor, _Rows]:
    rows = _rows(x)
    if rows is None:
        x = x.contiguous()
        rows = _rows(x)
    assert rows is not None
    return x, rows


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        factors = None if scale is None else scale.float().contiguous()
        _call("umv2_swiglu", x, *map(ctypes.c_int64, (out.numel() // max(1, width), width)), x, factors, out)
        ctx.save_for_backward(x, factors)
        ctx.scale_dtype = None if scale is None else scale.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, factors = ctx.saved_tensors
        width = x.shape[-1] // 2
        x_grad, grad = torch.empty_like(x), grads[0].contiguous()
        scale_grad = None if factors is None else torch.empty_like(factors)
        sizes = map(ctypes.c_int64, (grad.numel() // max(1, width), width))
        _call("umv2_swiglu_backward", x, *sizes, grad, x, factors, x_grad, scale_grad)
        return x_grad, None if scale_grad is None else scale_grad.to(ctx.scale_dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        x, rows = _with_rows(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        ctx.epsilon = epsilon
        ctx.save_for_backward(x, gain)
        _call("umv2_rms_norm", x, ctypes.byref(rows), ctypes.c_int64(x.shape[-1]), ctypes.c_double(epsilon),
              x, gain.contiguous(), out)  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        x, rows = _with_rows(x)
        width = x.shape[-1]
        count = x.numel() // width
        x_grad = torch.empty(x.shape, dtype=x.dtype)
        gain_grads = torch.zeros(-(-count // cpu_build.library().umv2_norm_block()), width)
        gain_grad = torch.zeros(width)
        _call("umv2_rms_norm_backward", x, ctypes.byref(rows), ctypes.c_int64(width), ctypes.c_double(ctx.epsilon),
              grads[0].contiguous(), x, gain.contiguous(), x_grad, gain_grads, gain_grad)  # fmt: skip
        return x_grad, gain_grad.to(gain.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        angles = angles.detach().reshape(x.shape[0], x.shape[-1]).float()
        # rounded to the dtype of the numbers, as PyTorch's functions would have it
        ctx.cosines, ctx.sines = (each.to(x.dtype).float() for each in (angles.cos(), angles.sin()))
        return _turn(x, ctx.cosines, ctx.sines, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _turn(grads[0], ctx.cosines, ctx.sines, -1.0), None


def _turn(x: Tensor, cosines: Tensor, sines: Tensor, direction: float) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = _Rows(x.shape[:-1], x.stride()[:-1])
    out = torch.empty(x.shape, dtype=x.dtype)
    _call("umv2_rotate", x, ctypes.byref(rows), ctypes.c_int64(x.shape[-1]), cosines, sines,
          ctypes.c_double(direction), x, out)  # fmt: skip
    return out

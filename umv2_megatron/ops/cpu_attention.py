"""Causal attention on CPUs, compiled (``cpu_attention.cpp``): softmax(scale q k^T) v, a query with keys up to its own
position, without the scores of all pairs of tokens.

float32 only. PyTorch's ``scaled_dot_product_attention`` computes the same at a third of the rate of its own products on
a CPU (docs/performance.md). Kept for the backward: the operands, the output and log(sum of exponentials) [b, n, s].
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umv2_megatron.ops import cpu_build
from umv2_megatron.ops.cpu_blocks import available, takes


class _Tensor(ctypes.Structure):
    """As in cpu_attention.cpp."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class _Sizes(ctypes.Structure):
    """As in cpu_attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("length", "samples", "heads", "groups", "width", "threads")),
        ("scale", ctypes.c_double),
    ]


def can(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``causal_attention`` takes these; [s, b, heads, D] each."""
    return (
        query.dtype == torch.float32
        and takes(query, key, value)
        and query.shape[:2] == key.shape[:2]
        and value.shape == key.shape
        and query.numel() > 0
        and available()
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[s, b, n, D] for ``query`` [s, b, n, D], ``key`` and ``value`` [s, b, g, D]; g divides n."""
    assert query.shape[2] % key.shape[2] == 0, (query.shape, key.shape)
    return _Attention.apply(query, key, value, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (_rows(each) for each in (query, key, value))
        out = torch.empty(query.shape)
        lse = torch.empty(*query.shape[1:3], query.shape[0])
        ctx.scale = scale
        _run("umv2_attention", query, key, scale, lse, query, key, value, out)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, lse = ctx.saved_tensors
        found = [torch.empty(each.shape) for each in (query, key, value)]
        _run("umv2_attention_backward", query, key, ctx.scale, lse, _rows(grads[0]), query, key, value, out, *found)
        return (*found, None)


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(function: str, query: Tensor, key: Tensor, scale: float, lse: Tensor, *tensors: Tensor) -> None:
    """``function`` of cpu_attention.cpp; ``lse`` comes behind the output there."""
    length, samples, heads, width = query.shape
    sizes = _Sizes(length, samples, heads, key.shape[2], width, torch.get_num_threads(), scale)
    passed = [ctypes.byref(_Tensor(each.data_ptr(), tuple(each.stride()[:3]))) for each in tensors]
    place = 4 if function == "umv2_attention" else 5
    passed.insert(place, ctypes.c_void_p(lse.data_ptr()))  # type: ignore[arg-type]
    getattr(cpu_build.library(), function)(ctypes.byref(sizes), *passed)

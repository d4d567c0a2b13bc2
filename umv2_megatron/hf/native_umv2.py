"""The compiled kernels of a step of decoding, and when they may be used.

A step of decoding brings one token per sequence. PyTorch computes a block of it in some two hundred operations, each of
which reads or writes little; the kernels compute it in two calls (``step_umv2``), and products of few rows in one
(``linear_umv2``). They are built with the machine's C++ compiler at first use (``build_umv2``). Without a compiler, or
with UMV2_CPU_KERNELS=0 in the environment, PyTorch's operations are used; the results are equal but for rounding.

Kernels read float32 or bfloat16 numbers in host memory, without autograd, and compute in float32 (of products of
bfloat16 numbers, where the CPU has these, with the left factor rounded to bfloat16, as PyTorch does). Whatever has a
say in how a module computes is asked to: where a hook, another forward, an adapter, a quantizer, autocast, a compiler
or a mode of PyTorch is at work, the modules run as they are.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers.utils import logging

from .block_attention_umv2 import ATTENTION
from .block_feedforward_umv2 import FEEDFORWARD
from .block_umv2 import BLOCK
from .products_umv2 import PRODUCTS
from .selection_umv2 import SELECTION
from .tiles_umv2 import TILES
from .vectors_umv2 import VECTORS

LARGEST_BATCH = 64
"""Rows of a product, and sequences of a step, up to which there are kernels; as in products_umv2."""

_FILES = {
    "vectors.h": VECTORS, "products.h": PRODUCTS, "tiles.h": TILES, "selection.h": SELECTION,
    "block.h": BLOCK, "attention.h": ATTENTION, "feedforward.h": FEEDFORWARD,
    "kernels.cpp": '#include "attention.h"\n#include "feedforward.h"\n',
}  # fmt: skip
_SUFFIXES = {torch.float32: "", torch.bfloat16: "_bfloat16"}
_SWITCH = "UMV2_CPU_KERNELS"
_logger = logging.get_logger(__name__)


class LinearPart(ctypes.Structure):
    """As in block_umv2, block_attention_umv2 and block_feedforward_umv2, like those below."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("rows", ctypes.c_int64)]


class NormPart(ctypes.Structure):
    """A root-mean-square norm."""

    _fields_ = [("gain", ctypes.c_void_p), ("shift", ctypes.c_float), ("epsilon", ctypes.c_float)]


class AttentionPart(ctypes.Structure):
    """The attention of a block."""

    _fields_ = [
        *((name, NormPart) for name in ("norm", "query_norm", "key_norm")),
        *((name, LinearPart) for name in ("query", "key", "value", "output")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "groups", "size", "interleaved")),
        ("scaling", ctypes.c_float),
    ]


class SequencePart(ctypes.Structure):
    """What a step brings."""

    _fields_ = [
        ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p),
        ("rotated", ctypes.c_int64), ("angle_stride", ctypes.c_int64),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
        ("key_strides", ctypes.c_int64 * 3), ("value_strides", ctypes.c_int64 * 3),
        ("seen", ctypes.c_int64),
        ("mask", ctypes.c_void_p), ("mask_stride", ctypes.c_int64), ("mask_kind", ctypes.c_int64),
    ]  # fmt: skip


class MemoryPart(ctypes.Structure):
    """A memory layer."""

    _fields_ = [
        *((name, LinearPart) for name in ("query", "pre", "gate", "value")),
        *((name, ctypes.c_void_p) for name in ("query_gain", "key_gain", "keys", "cores", "u", "t", "perm")),
        *((name, ctypes.c_void_p) for name in ("values", "pre_values", "value_files", "pre_files")),
        *((name, ctypes.c_void_p) for name in ("value_starts", "pre_starts")),
        *((name, ctypes.c_int64) for name in ("wide_perm", "per_rank", "heads", "num_keys", "dim", "rank", "kept")),
        *((name, ctypes.c_int64) for name in ("topk", "num_cores", "blocks", "value_dim", "pre_dim", "gelu", "plain")),
        *((name, ctypes.c_int64) for name in ("window", "offset", "table_rows", "chunk_rows", "page", "fetch")),
        ("epsilon", ctypes.c_float),
    ]


class FeedforwardPart(ctypes.Structure):
    """The dense FFN of a block."""

    _fields_ = [
        ("norm", NormPart),
        *((name, LinearPart) for name in ("gate", "up", "down")),
        ("hidden", ctypes.c_int64),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None where they are switched off or cannot be built."""
    if os.environ.get(_SWITCH) == "0":
        return None
    try:
        from .build_umv2 import load

        return load("decode_kernels", _FILES)
    except ImportError as problem:
        _logger.info(f"steps of decoding are computed by PyTorch's operations alone: {problem}")
        return None


def kernel(name: str, dtype: torch.dtype) -> Any:
    """The function ``name`` of the library for tensors of ``dtype``."""
    return getattr(library(), name + _SUFFIXES[dtype])


def usable(x: Tensor) -> bool:
    """Whether kernels may compute with the activations ``x`` here and now."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype in _SUFFIXES
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch_modules._global_forward_hooks
        and not torch_modules._global_forward_pre_hooks
        and not x.is_neg()
        and library() is not None
    )


def is_plain(module: Any, kind: Any) -> bool:
    """Whether ``module`` is of ``kind`` and nothing else has been put on it."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def readable(tensor: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether kernels for ``dtype`` can read ``tensor``: of that dtype, dense and in host memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is dtype
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` for ``usable`` x [..., columns] of up to ``LARGEST_BATCH`` rows; the parameters are ``readable``, of
    the dtype of x."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], layer.out_features)
    described = linear_of(layer)
    kernel("umv2_linear", x.dtype)(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.byref(described),
        ctypes.c_int64(x.numel() // x.shape[-1]),
        ctypes.c_int64(x.shape[-1]),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return out


def linear_of(layer: nn.Linear | None) -> LinearPart:
    """A layer with ``readable`` parameters, or none."""
    if layer is None:
        return LinearPart()
    bias = layer.bias
    return LinearPart(layer.weight.data_ptr(), None if bias is None else bias.data_ptr(), layer.weight.shape[0])

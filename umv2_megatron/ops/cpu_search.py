"""The two-stage search on CPUs: compiled loops (``cpu_search.cpp``), one token and head at a time.

What ``search.py`` computes, without the summed scores of all keys, without the grids, and with a backward that writes
the gradient of the key scores once. Of equal scores the smaller key wins, of equal cells the smaller place in the lists
of keys, row before column; NaN is the largest score. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umv2_megatron.ops import cpu_build


class _Sizes(ctypes.Structure):
    """As in cpu_search.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("rank", "tokens", "heads", "keys", "kept", "topk", "cores", "threads")
    ]  # fmt: skip


def _run(function: str, shape: torch.Size, dtype: torch.dtype, sizes: dict[str, int], *tensors: Tensor) -> None:
    """Call ``function`` for key scores of ``shape`` [2, R, T, h, N] and of ``dtype``."""
    for tensor in tensors:
        assert tensor.is_contiguous() and tensor.is_cpu and tensor.dtype in (dtype, torch.int64), function
    assert dtype in (torch.float32, torch.float64), dtype
    _, rank, tokens, heads, keys = shape
    call = _Sizes(rank=rank, tokens=tokens, heads=heads, keys=keys, threads=torch.get_num_threads(), **sizes)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    getattr(cpu_build.library(), function)(ctypes.byref(call), int(dtype == torch.float64), *pointers)


@torch.no_grad()
def best_keys(key_scores: Tensor, u: Tensor, t: Tensor, kept: int) -> Tensor:
    """See ``interface.Search``."""
    _, _, tokens, heads, num_keys = key_scores.shape
    assert 1 <= kept <= num_keys, (kept, num_keys)
    keys = torch.empty(2, tokens, heads, kept, dtype=torch.int64)
    vectors = torch.stack([u, t]).to(key_scores.dtype)
    _run("umv2_best_keys", key_scores.shape, key_scores.dtype, {"kept": kept}, key_scores.contiguous(), vectors, keys)
    return keys


@torch.no_grad()
def best_cells(key_scores: Tensor, keys: Tensor, cores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """See ``interface.Search``."""
    kept = keys.shape[-1]
    assert 1 <= topk <= kept * kept, (topk, kept)
    rows = torch.empty(*keys.shape[1:-1], topk, dtype=torch.int64)
    columns = torch.empty_like(rows)
    _run(
        "umv2_best_cells", key_scores.shape, key_scores.dtype, {"kept": kept, "topk": topk},
        key_scores.contiguous(), keys.contiguous(), cores.to(key_scores.dtype).contiguous(), rows, columns,
    )  # fmt: skip
    return rows, columns


def cell_scores(key_scores: Tensor, rows: Tensor, columns: Tensor, cores: Tensor) -> Tensor:
    """See ``interface.Search``."""
    return _CellScores.apply(key_scores, rows, columns, cores.to(key_scores.dtype))


class _CellScores(torch.autograd.Function):
    """Keeps the picked keys' scores [2, R, T, h, K] and the indices; not the scores of all keys."""

    @staticmethod
    def forward(ctx: Any, key_scores: Tensor, rows: Tensor, columns: Tensor, cores: Tensor) -> Tensor:
        topk, dtype = rows.shape[-1], key_scores.dtype
        ctx.sizes = {"topk": topk, "cores": cores.shape[0]}
        ctx.shape = key_scores.shape
        cores = cores.contiguous()
        picked = torch.empty(*key_scores.shape[:-1], topk, dtype=dtype)
        scores = torch.empty(*rows.shape, cores.shape[0], dtype=dtype)
        _run(
            "umv2_cell_scores", ctx.shape, dtype, ctx.sizes,
            key_scores.contiguous(), rows, columns, cores, picked, scores,
        )  # fmt: skip
        ctx.save_for_backward(rows.int(), columns.int(), cores, picked)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows, columns, cores, picked = ctx.saved_tensors
        rows, columns = rows.long(), columns.long()
        key_grad = torch.empty(ctx.shape, dtype=picked.dtype)
        blocks = -(-ctx.shape[2] // cpu_build.library().umv2_search_block())
        core_grads = torch.zeros(blocks, *cores.shape, dtype=picked.dtype)
        _run(
            "umv2_cell_scores_backward", ctx.shape, picked.dtype, ctx.sizes,
            grads[0].contiguous(), rows, columns, cores, picked, key_grad, core_grads,
        )  # fmt: skip
        return key_grad, None, None, core_grads.sum(0)

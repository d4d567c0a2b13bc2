"""Retrieval on CPUs in one piece, from projected queries to scored picks: compiled loops (``cpu_retrieval.cpp``).

    S[side, r, t, (head, n)] = < q[t, side, r] , k[head, side, n, :, r] >,   both RMS-normalised over Dk

and then the search of ``search.py`` among S, which is not kept, nor is its gradient ever made. With gains gq and gk,
and 1 / norms a(q) and b(k),

    S = a(q) < q , v >,                           v = gq gk b(k) k           the keys' rows
    dv[n] = sum over t of dS[t, n] a(q[t]) q[t]                              and from it those of keys and gains
    dq[t] = p - q a(q)^2 < p , q > / Dk,          p = a(q) sum over n of dS[t, n] v[n]

where dS[t, n] is not zero for the few keys n of token t's picks only. Kept for the backward are the plain queries, the
picked keys and their scores. float32 only; the order among equals is that of ``cpu_search.py``.
"""

from __future__ import annotations

import ctypes
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umv2_megatron.ops import cpu_build


class _Sizes(ctypes.Structure):
    """As in cpu_retrieval.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("rank", "queries", "tokens", "heads", "keys", "dim", "kept", "topk", "cores", "threads")
        ),
        ("epsilon", ctypes.c_double),
    ]


def retrieve(
    query: Tensor,
    keys: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    epsilon: float,
    u: Tensor,
    t: Tensor,
    cores: Tensor,
    kept: int,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """See ``interface.Retrieve``."""
    for each in (query, keys, query_gain, key_gain, cores):
        assert each.dtype == torch.float32 and each.is_cpu, (each.dtype, each.device)
    heads, _, num_keys, _, rank = keys.shape
    assert 1 <= kept <= num_keys and 1 <= topk <= kept * kept, (kept, num_keys, topk)
    assert query.shape[2] in (1, rank) and len(u) == heads, (query.shape, u.shape)
    # The product of the gains here, so that autograd takes their gradients apart.
    return _Retrieve.apply(query, keys, query_gain * key_gain, cores, torch.stack([u, t]), epsilon, kept, topk)


class _Retrieve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        gain: Tensor,
        cores: Tensor,
        vectors: Tensor,
        epsilon: float,
        kept: int,
        topk: int,
    ) -> tuple[Tensor, Tensor]:
        tokens, _, queries, dim = query.shape
        heads, _, num_keys, _, rank = keys.shape
        sizes = {"rank": rank, "queries": queries, "tokens": tokens, "heads": heads, "keys": num_keys, "dim": dim,
                 "kept": kept, "topk": topk, "cores": cores.shape[0], "epsilon": epsilon}  # fmt: skip
        query, keys, gain, cores = (each.contiguous() for each in (query, keys, gain, cores))
        shape = (tokens, heads, topk)
        grid = torch.empty(shape, dtype=torch.int64)
        places = torch.empty(2, *shape, dtype=torch.int32)
        picked = torch.empty(2, rank, *shape)
        scores = torch.empty(*shape, cores.shape[0])
        call = _call(sizes)
        panels = torch.empty(cpu_build.library().umv2_retrieval_panels(ctypes.byref(call)))
        total = cores.sum(0)
        _run("umv2_retrieve", call, query, keys, gain, vectors.float().contiguous(), total, cores,
             panels, grid, places, picked, scores)  # fmt: skip
        ctx.sizes = sizes
        ctx.save_for_backward(query, keys, gain, cores, places, picked)
        ctx.mark_non_differentiable(grid)
        return grid, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        query, keys, gain, cores, places, picked = ctx.saved_tensors
        z = ctx.sizes
        rows = (2 * z["rank"], z["heads"] * z["keys"], z["dim"])
        block = cpu_build.library().umv2_retrieval_block()
        core_parts, core_grads = torch.zeros(-(-z["tokens"] // block), *cores.shape), torch.zeros_like(cores)
        gain_parts, gain_grad = torch.zeros(-(-rows[1] // block), z["dim"]), torch.zeros_like(gain)
        query_grad, key_grads = torch.empty_like(query), torch.empty_like(keys)
        listed, counts = torch.empty_like(places), places.new_empty(2, z["tokens"], z["heads"])
        _run("umv2_retrieve_backward", _call(z), grads[1].contiguous(), query, keys, gain, cores, places, picked,
             query.new_empty(rows), query.new_zeros(rows), listed, counts, torch.empty_like(picked),
             query_grad, key_grads, gain_parts, gain_grad, core_parts, core_grads)  # fmt: skip
        return query_grad, key_grads, gain_grad, core_grads, None, None, None, None


def _call(sizes: dict[str, Any]) -> _Sizes:
    return _Sizes(**sizes, threads=torch.get_num_threads())


def _run(function: str, call: _Sizes, *tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous() and tensor.is_cpu, (function, tensor.shape)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    getattr(cpu_build.library(), function)(ctypes.byref(call), *pointers)

"""Two-stage top-K in Triton: the best keys of each side among N, then the best cells of the grid that they span.

What ``search.py`` computes with einsum and torch.topk (arXiv 2411.12364, section 3.2), in two kernels that leave
neither the summed scores [T, h, N] nor the grids [T, h, K', K'] in memory:

    best_keys    a[n] = sum over r of u[r] * S[r, n], and the K' largest a of each token, head and side
    best_cells   g[i, j] = sum over r, s of Srow[r, i] * core[r, s] * Scol[s, j], and the K largest g

Results come in descending order. Of equal scores the smaller index wins: the smaller key in ``best_keys``; in
``best_cells`` the smaller i, then the smaller j, as places in the lists given. (torch.topk promises no order of ties,
so it may pick others.) NaN counts as largest.

How: a score and its place are packed in one 64-bit integer, the score's bits mapped so that integers order as floats
do, so that no two are equal and a bitonic network moves both at once. Candidates come in spans; the best of a span
are merged with the best so far, unless all of them are beaten already. Letters: T tokens, h heads, N keys per side,
R rank, K' keys kept per side, K cells kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from umv2_megatron.ops import triton_launch as launches

SPAN = 1024
"""Candidates sorted at once: 8 of 64 bits for each thread of 4 warps."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def pack(score, place):
    """One int64 that orders as (score, then -place); ``score`` is a sum begun at 0.0, so it is never -0.0."""
    bits = tl.where(score != score, 0x7FC00000, score.to(tl.int32, bitcast=True))
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def place_of(packed):
    """The place that ``pack`` was given."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit
def merge_best(best, span, KEPT: tl.constexpr):
    """The KEPT largest of ``best`` [KEPT], descending, and ``span``; descending."""
    if tl.max(span, axis=0) > tl.min(best, axis=0):
        # Of two descending lists, each first against each last: the larger ones are the best, and bitonic.
        found = tl.topk(span, KEPT)
        best = tl.bitonic_merge(tl.maximum(best, tl.flip(found, 0)), descending=True)
    return best


@triton.jit(do_not_specialize=["tokens"])
def best_keys_kernel(
    key_scores, vectors, keys, tokens,
    H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KEPT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program per token and head, and side: keys [2, T, H, K]."""
    place = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1).to(tl.int64)
    plane = tokens.to(tl.int64) * H
    head = place % H
    best = tl.full([KEPT], LOWEST, dtype=tl.int64)
    for start in range(0, N, SPAN):
        key = start + tl.arange(0, SPAN)
        score = tl.zeros([SPAN], dtype=tl.float32)
        for r in tl.static_range(R):
            factor = tl.load(vectors + (side * H + head) * R + r)
            row = key_scores + ((side * R + r) * plane + place) * N
            score += factor * tl.load(row + key, mask=key < N, other=0.0).to(tl.float32)
        best = merge_best(best, tl.where(key < N, pack(score, key), LOWEST), KEPT)
    kept = tl.arange(0, KEPT)
    tl.store(keys + (side * plane + place) * K + kept, place_of(best), mask=kept < K)


@triton.jit(do_not_specialize=["tokens"])
def best_cells_kernel(
    key_scores, keys, cores, rows, columns, tokens,
    H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KEPT: tl.constexpr,
    SIDE: tl.constexpr, SIDE_PADDED: tl.constexpr, STRIPE: tl.constexpr,
):  # fmt: skip
    """One program per token and head; SIDE is K', a span of cells is STRIPE rows of the grid."""
    place = tl.program_id(0).to(tl.int64)
    plane = tokens.to(tl.int64) * H
    head = place % H
    j = tl.arange(0, SIDE_PADDED)
    column_key = tl.load(keys + (plane + place) * SIDE + j, mask=j < SIDE, other=0)
    best = tl.full([KEPT], LOWEST, dtype=tl.int64)
    for start in range(0, SIDE, STRIPE):
        i = start + tl.arange(0, STRIPE)
        row_key = tl.load(keys + place * SIDE + i, mask=i < SIDE, other=0)
        cell = tl.zeros([STRIPE, SIDE_PADDED], dtype=tl.float32)
        for s in tl.static_range(R):
            left = tl.zeros([STRIPE], dtype=tl.float32)
            for r in tl.static_range(R):
                core = tl.load(cores + (head * R + r) * R + s)
                of_rows = key_scores + (r * plane + place) * N
                left += core * tl.load(of_rows + row_key, mask=i < SIDE, other=0.0).to(tl.float32)
            of_columns = key_scores + ((R + s) * plane + place) * N
            right = tl.load(of_columns + column_key, mask=j < SIDE, other=0.0).to(tl.float32)
            cell += left[:, None] * right[None, :]
        index = i[:, None] * SIDE + j[None, :]
        real = (i < SIDE)[:, None] & (j < SIDE)[None, :]
        packed = tl.where(real, pack(cell, index), LOWEST)
        best = merge_best(best, tl.reshape(packed, [STRIPE * SIDE_PADDED]), KEPT)
    kept = tl.arange(0, KEPT)
    chosen = place_of(best)
    mask = kept < K
    tl.store(rows + place * K + kept, tl.load(keys + place * SIDE + chosen // SIDE, mask=mask, other=0), mask=mask)
    column = tl.load(keys + (plane + place) * SIDE + chosen % SIDE, mask=mask, other=0)
    tl.store(columns + place * K + kept, column, mask=mask)


@torch.no_grad()
def best_keys(key_scores: Tensor, u: Tensor, t: Tensor, kept: int) -> Tensor:
    """The ``kept`` best keys of each side, [2, T, h, K'] int64, in descending order of their summed score.

    Args:
        key_scores: [2, R, T, h, N], float32 or 16 bits (``Retrieval.key_scores``).
        u, t: [h, R], the weights of the ranks on either side.
        kept: K', at most N.
    """
    _, rank, tokens, heads, num_keys = key_scores.shape
    assert key_scores.dtype in DTYPES and 1 <= kept <= num_keys, (key_scores.dtype, kept, num_keys)
    keys = torch.empty(2, tokens, heads, kept, dtype=torch.int64, device=key_scores.device)
    padded = _padded(kept)
    vectors = torch.stack([u, t]).float()
    tensors: dict[str, Any] = {"key_scores": key_scores.contiguous(), "vectors": vectors, "keys": keys}
    span = max(padded, min(triton.next_power_of_2(num_keys), SPAN))
    constants = {"H": heads, "N": num_keys, "R": rank, "K": kept, "KEPT": padded, "SPAN": span}
    if tokens > 0:
        tensors["tokens"] = tokens
        launches.launch(best_keys_kernel, (tokens * heads, 2), tensors, constants, _warps(span, padded))
    return keys


@torch.no_grad()
def best_cells(key_scores: Tensor, keys: Tensor, cores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Row and column keys, [T, h, K] int64 each, of the K best cells, in descending order of score.

    Args:
        key_scores: [2, R, T, h, N], float32 or 16 bits.
        keys: [2, T, h, K'] int64, what ``best_keys`` returned.
        cores: [h, R, R], the sum of all cores.
        topk: K, at most K' * K'.
    """
    _, rank, tokens, heads, num_keys = key_scores.shape
    side = keys.shape[-1]
    assert key_scores.dtype in DTYPES and 1 <= topk <= side * side, (key_scores.dtype, topk, side)
    rows = torch.empty(tokens, heads, topk, dtype=torch.int64, device=key_scores.device)
    columns = torch.empty_like(rows)
    padded, side_padded = _padded(topk), triton.next_power_of_2(side)
    span = max(padded, side_padded, min(side_padded**2, SPAN))
    tensors: dict[str, Any] = {
        **{"key_scores": key_scores.contiguous(), "keys": keys.contiguous(), "cores": cores.float().contiguous()},
        **{"rows": rows, "columns": columns, "tokens": tokens},
    }
    constants = {
        **{"H": heads, "N": num_keys, "R": rank, "K": topk, "KEPT": padded},
        **{"SIDE": side, "SIDE_PADDED": side_padded, "STRIPE": span // side_padded},
    }
    if tokens > 0:
        launches.launch(best_cells_kernel, (tokens * heads,), tensors, constants, _warps(span, padded))
    return rows, columns


def _padded(kept: int) -> int:
    """Length of the list of the best: a power of two, and 2 at least, because Triton's network sorts pairs."""
    return max(2, triton.next_power_of_2(kept))


def _warps(span: int, kept: int) -> int:
    """Eight candidates, new and kept ones, for each thread; at most 8 warps."""
    return max(1, min(8, (span + kept) // 256))

"""The two-stage search for picks among scored keys, in plain PyTorch: the oracle, and what any device can run.

A cell (i, j) of the N x N grid has the score Srow[i]^T Cc[c] Scol[j] under core c, where Srow and Scol are the
R-dimensional scores of its two keys. The best cells are found in two stages (arXiv 2411.12364, section 3.2):

    best_keys    a[n] = sum over r of u[r] * Srow[r, n], likewise b with t and Scol; the K' best keys of either side
    best_cells   the K best cells of the K' x K' grid that these span, by the score of the summed cores
    cell_scores  the scores of the cells that were picked, one for each core; differentiable

``interface.Search`` is this contract. Letters: T tokens, h heads, N keys per side, R rank, C cores, K' keys kept per
side, K cells kept. ``key_scores`` is [2, R, T, h, N], float32 or float64; side 0 is the row. Every K' and K come in
descending order of score; which of equal scores comes first is the backend's choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Cells of the second-stage grids held at once: 64 MB in float32.
GRID_CHUNK_CELLS = 1 << 24


@torch.no_grad()
def best_keys(key_scores: Tensor, u: Tensor, t: Tensor, kept: int) -> Tensor:
    """See ``interface.Search``."""
    chosen = [first_stage_scores(key_scores, u, t, side).topk(kept, dim=-1).indices for side in (0, 1)]
    return torch.stack(chosen)


@torch.no_grad()
def best_cells(key_scores: Tensor, keys: Tensor, cores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """See ``interface.Search``."""
    kept, cores = keys.shape[-1], cores.to(key_scores.dtype)
    chunk = max(1, GRID_CHUNK_CELLS // (keys.shape[2] * kept * kept))
    rows, columns = [], []
    for start in range(0, max(1, key_scores.shape[2]), chunk):
        part = slice(start, start + chunk)
        row_keys, column_keys = keys[0, part], keys[1, part]
        left = torch.einsum("rthi,hrs->this", gather_keys(key_scores[0, :, part], row_keys), cores)
        grid = left @ gather_keys(key_scores[1, :, part], column_keys).permute(1, 2, 0, 3)
        cell = grid.flatten(2).topk(topk, dim=-1).indices
        rows.append(row_keys.gather(-1, cell // kept))
        columns.append(column_keys.gather(-1, cell % kept))
    return torch.cat(rows), torch.cat(columns)


def cell_scores(key_scores: Tensor, rows: Tensor, columns: Tensor, cores: Tensor) -> Tensor:
    """See ``interface.Search``."""
    # Both sides at once: the backward of a part would fill the rest of the largest tensor of the layer with zeros.
    left, right = gather_keys(key_scores, torch.stack([rows, columns])).unbind(0)
    return torch.einsum("rthk,chrs,sthk->thkc", left, cores.to(left.dtype), right)


def first_stage_scores(key_scores: Tensor, u: Tensor, t: Tensor, side: int) -> Tensor:
    """a (``side`` 0) or b (1), [T, h, N]; u and t are [h, R]."""
    return torch.einsum("hr,rthn->thn", (u, t)[side].to(key_scores.dtype), key_scores[side])


def gather_keys(key_scores: Tensor, index: Tensor) -> Tensor:
    """Scores [..., R, T, h, K] of the keys ``index`` [..., T, h, K] among ``key_scores`` [..., R, T, h, N], in float32
    where those have 16 bits; gradients are summed in it and rounded once.

    Keeps the index alone for the backward: torch's own ``gather`` would keep the scores of all keys, the largest tensor
    of the layer.
    """
    return _GatherKeys.apply(key_scores, index)


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key_scores: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index.int())  # at most N: half the bytes
        ctx.num_keys, ctx.dtype = key_scores.shape[-1], key_scores.dtype
        picked = key_scores.gather(-1, _of_every_rank(index, key_scores))
        return picked.to(torch.promote_types(picked.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        index = ctx.saved_tensors[0].long()
        every = grads[0].new_zeros(*grads[0].shape[:-1], ctx.num_keys)
        # A key that is part of several cells gets the sum of theirs.
        return every.scatter_add_(-1, _of_every_rank(index, every), grads[0]).to(ctx.dtype), None


def _of_every_rank(index: Tensor, key_scores: Tensor) -> Tensor:
    """``index`` [..., T, h, K] for each of the R ranks of ``key_scores``."""
    return index.unsqueeze(-4).expand(*key_scores.shape[:-1], index.shape[-1])

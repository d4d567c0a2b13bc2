"""Launches of the lookup's Triton kernels: what a list of picks is, how large tiles are, which kernel does what.

Every function here launches a number of programs that follows from shapes alone, waits for nothing and allocates from
torch's caching allocator only, so a CUDA graph can hold it. Letters as in ``triton_kernels.py``.

Tile sizes come from arithmetic, not from timing at run time: tuning in the first call would make the order of sums,
and so the last bits of a run, depend on noise. A thread should have about 32 elements of the tile in flight: enough
outstanding loads of 16 bytes (4 in bfloat16) to hide memory, few enough registers for 16 or more warps per
multiprocessor with an accumulator of the same size beside it. So a tile has up to TILE_ELEMENTS elements and a warp per
32 * 32 of them. docs/kernels.md works this out and lists the candidates to time on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import triton
from torch import Tensor

from umv2_megatron.ops import triton_kernels as kernels

TILE_ELEMENTS = 4096
WIDEST_ROW = 2048
"""Columns (padded) that one program holds; wider rows are cut up, and the fused kernels are left out."""
ELEMENTS_PER_WARP = 1024
PICKS_PER_ROW = 4
"""Picks that a program of ``add_to_rows`` loads at once: few rows are picked more often in a micro-batch."""
PIECE = 128
"""Picks of one row that a single program sums (see ``triton_kernels.add_to_rows``)."""
LONG_ROW_STEPS = 24
"""Bisections of ``add_long_rows``: enough for 2^24 * PIECE picks, the most that 32-bit counts can hold."""


def _launch(kernel: Any, grid: tuple[int, ...], tensors: dict[str, Any], constants: dict[str, Any], warps: int) -> None:
    kernel[grid](**tensors, **constants, num_warps=warps)


launch: Callable[..., None] = _launch
"""How kernels are started; tests put a recorder here to compile ahead of time what would have been started."""


@dataclass
class PickList:
    """n picked rows: a grid of ``per_token`` picks for each token, or (``per_token`` 0) any number for each."""

    rows: Tensor
    """[n] integers."""
    blocks: Optional[Tensor]
    """[n] integers in [0, E), or None when E is 1."""
    num_tokens: int
    num_blocks: int
    per_token: int = 0
    owners: Optional[Tensor] = None
    """[n] int64: the token of each pick, ascending; ragged lists only."""
    starts: Optional[Tensor] = None
    """[T + 1] int64: the first pick of each token; ragged lists only, and only needed for ``row_sums``."""

    @staticmethod
    def grid(rows: Tensor, blocks: Optional[Tensor], num_blocks: int) -> PickList:
        """Of ``rows`` and ``blocks`` [T, P]."""
        if num_blocks == 1:
            blocks = None
        flat_blocks = blocks.flatten() if blocks is not None else None
        return PickList(rows.flatten(), flat_blocks, rows.shape[0], num_blocks, per_token=rows.shape[1])

    @property
    def places(self) -> dict[str, Any]:
        """What kernels that look for the token of a pick need."""
        return {"rows": self.rows, "blocks": self.blocks, "owners": self.owners}


@dataclass(frozen=True)
class Tile:
    """Edges of a tile [PICKS, CORES, COLUMNS] of rows, and the warps that share it."""

    picks: int
    cores: int
    columns: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"PICKS": self.picks, "CORES": self.cores, "COLUMNS": self.columns}


def tile_for(cores: int, slice_columns: int, most_picks: int, other_columns: int = 0) -> Tile:
    """The tile for rows of ``cores`` slices of ``slice_columns``, at most ``most_picks`` at once.

    ``other_columns``: of rows of a second table that the same program holds.
    """
    padded_cores = triton.next_power_of_2(cores)
    columns = min(triton.next_power_of_2(slice_columns), max(1, WIDEST_ROW // padded_cores))
    width = max(padded_cores * columns, triton.next_power_of_2(max(1, other_columns)))
    picks = max(1, min(TILE_ELEMENTS // width, triton.next_power_of_2(max(1, most_picks))))
    return Tile(picks, padded_cores, columns, max(1, min(8, picks * width // ELEMENTS_PER_WARP)))


def can_fuse(pre_columns: int, cores: int, slice_columns: int) -> bool:
    """Whether one program can hold whole rows of both tables."""
    widest = max(pre_columns, triton.next_power_of_2(cores) * triton.next_power_of_2(slice_columns))
    return triton.next_power_of_2(widest) <= WIDEST_ROW


def exact_dtype(*tensors: Tensor) -> torch.dtype:
    """In which sums are kept: float64 if a tensor is float64, float32 otherwise."""
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


# -- the fused forward of a grid of picks ----------------------------------------------------------------------------


def fused_forward(
    picks: PickList, scores: Tensor, projected: Tensor, pre_values: Tensor, values: Tensor, gelu: bool
) -> tuple[Tensor, Tensor]:
    """(output [T, E * Dv] in the dtype of ``values``, rho [T, P] before its activation); ``scores`` is [T, P, C]."""
    tokens, per_token, cores = scores.shape
    slice_columns, pre_columns = values.shape[1] // cores, pre_values.shape[1]
    out = values.new_empty(tokens, picks.num_blocks * values.shape[1])
    rho = scores.new_empty(tokens, per_token)
    if tokens > 0:
        tile = tile_for(cores, slice_columns, per_token, pre_columns)
        tensors = {
            **{"rows": picks.rows, "blocks": picks.blocks, "scores": scores, "projected": projected.contiguous()},
            **{"pre_values": pre_values.detach(), "values": values.detach(), "out": out, "rho_out": rho},
        }
        constants = {
            **{"P": per_token, "C": cores, "E": picks.num_blocks, "DP": pre_columns, "DC": slice_columns},
            **{"GELU": gelu, "PRE_COLUMNS": triton.next_power_of_2(pre_columns), **tile.constants},
        }
        launch(kernels.fused_forward, (tokens, picks.num_blocks), {**tensors, "tokens": tokens}, constants, tile.warps)
    return out, rho


# -- the parts --------------------------------------------------------------------------------------------------------


def row_sums(picks: PickList, weights: Tensor, table: Tensor) -> Tensor:
    """Sum over each token's picks of weight * row, [T, E * D] in the dtype of ``table``; ``weights`` is [n, C]."""
    cores, slice_columns = weights.shape[1], table.shape[1] // weights.shape[1]
    out = table.new_empty(picks.num_tokens, picks.num_blocks * table.shape[1])
    if picks.num_tokens == 0:
        return out
    tile = tile_for(cores, slice_columns, picks.per_token or 16)
    grid = (picks.num_tokens, picks.num_blocks, triton.cdiv(slice_columns, tile.columns))
    tensors = {
        **{"rows": picks.rows, "blocks": picks.blocks, "starts": picks.starts, "weights": weights},
        **{"table": table.detach(), "out": out, "tokens": picks.num_tokens},
    }
    constants = {"P": picks.per_token, "C": cores, "E": picks.num_blocks, "DC": slice_columns, **tile.constants}
    launch(kernels.row_sums, grid, tensors, constants, tile.warps)
    return out


def row_dots(picks: PickList, upstream: Tensor, table: Tensor, cores: int, dtype: torch.dtype) -> Tensor:
    """Dot products of the slices of each picked row with those of ``upstream`` [T * E, D]: [n, C] in ``dtype``."""
    dots = torch.empty(picks.rows.shape[0], cores, dtype=dtype, device=table.device)
    _row_dots(picks, upstream, table, dots, {"SCALED": False, "GELU": False})
    return dots


def score_gradients(
    picks: PickList, scores: Tensor, rho: Tensor, upstream: Tensor, values: Tensor, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights = scores * activation(rho) [T, P, C], gradient of scores [T, P, C], gradient of rho [T, P]) of a grid,
    from the gradient of the output, ``upstream`` [T * E, Dv]."""
    weights, score_grad, rho_grad = torch.empty_like(scores), torch.empty_like(scores), torch.empty_like(rho)
    extra = {"scores": scores, "rho_in": rho, "weights_out": weights, "rho_grad": rho_grad}
    _row_dots(picks, upstream, values, score_grad.flatten(0, 1), {"SCALED": True, "GELU": gelu}, **extra)
    return weights, score_grad, rho_grad


def _row_dots(
    picks: PickList, upstream: Tensor, table: Tensor, dots: Tensor, epilogue: dict[str, bool], **extra: Tensor
) -> None:
    count, cores = dots.shape
    if count == 0:
        return
    slice_columns = table.shape[1] // cores
    tile = tile_for(cores, slice_columns, picks.per_token or 16)
    programs = picks.num_tokens if picks.per_token else triton.cdiv(count, tile.picks)
    tensors: dict[str, Any] = dict.fromkeys(("scores", "rho_in", "weights_out", "rho_grad"))
    tensors |= {**picks.places, "upstream": upstream, "table": table.detach(), "dots": dots, "picks": count, **extra}
    constants = {"P": picks.per_token, "C": cores, "E": picks.num_blocks, "DC": slice_columns, **tile.constants}
    launch(kernels.row_dots, (programs,), tensors, {**constants, **epilogue}, tile.warps)


SortedPicks = tuple[Tensor, Tensor]
"""(rows in ascending order [n], which pick each of them was [n] int64)."""


def sort_picks(picks: PickList, num_rows: int) -> SortedPicks:
    """The picks in order of their rows of a table of ``num_rows``; picks of a row keep their order."""
    # A radix sort takes half the passes over 4-byte keys.
    keys = picks.rows.to(torch.int32) if num_rows <= 2**31 else picks.rows
    ordered = keys.sort(stable=True)
    return ordered.values, ordered.indices


def add_to_rows(
    picks: PickList, weights: Tensor, upstream: Tensor, table_sum: Tensor, in_order: Optional[SortedPicks]
) -> None:
    """Add weights[n, c] * upstream[place of n, slice c] to the row of each pick n in ``table_sum`` [A, D].

    ``upstream`` is [T * E, D], ``weights`` [n, C]. With the sorted picks ``in_order`` the sums have a fixed order;
    with None they are atomic, in any order.
    """
    count, cores = weights.shape
    if count == 0:
        return
    assert table_sum.is_contiguous()
    if in_order is None:
        _add_atomically(picks, weights, upstream, table_sum)
        return
    columns = table_sum.shape[1]
    tile = tile_for(cores, columns // cores, PICKS_PER_ROW)
    constants = {"P": picks.per_token, "C": cores, "E": picks.num_blocks, "DC": columns // cores, **tile.constants}
    sorted_rows, order = in_order
    pieces = torch.empty(triton.cdiv(count, PIECE), columns, dtype=weights.dtype, device=weights.device)
    tensors = {
        **{"sorted_rows": sorted_rows, "order": order, "blocks": picks.blocks, "owners": picks.owners},
        **{"weights": weights, "upstream": upstream, "table_sum": table_sum, "pieces": pieces, "picks": count},
    }
    grid = (count, triton.cdiv(columns // cores, tile.columns))
    launch(kernels.add_to_rows, grid, tensors, {**constants, "PIECE": PIECE}, tile.warps)
    if count > PIECE:
        width = min(triton.next_power_of_2(columns), 512)
        tensors = {"sorted_rows": sorted_rows, "table_sum": table_sum, "pieces": pieces, "picks": count}
        grid = (pieces.shape[0], triton.cdiv(columns, width))
        constants = {"D": columns, "PIECE": PIECE, "STEPS": LONG_ROW_STEPS, "COLUMNS": width}
        launch(kernels.add_long_rows, grid, tensors, constants, 2)


def _add_atomically(picks: PickList, weights: Tensor, upstream: Tensor, table_sum: Tensor) -> None:
    count, cores = weights.shape
    columns = table_sum.shape[1]
    # Half-precision atomics would round at every pick: only a model without main_grad comes here.
    target = table_sum if table_sum.dtype == weights.dtype else torch.zeros_like(table_sum, dtype=weights.dtype)
    tile = tile_for(cores, columns // cores, 16)
    tensors = {**picks.places, "weights": weights, "upstream": upstream, "table_sum": target, "picks": count}
    constants = {"P": picks.per_token, "C": cores, "E": picks.num_blocks, "DC": columns // cores, **tile.constants}
    grid = (triton.cdiv(count, tile.picks), triton.cdiv(columns // cores, tile.columns))
    launch(kernels.atomic_add_to_rows, grid, tensors, constants, tile.warps)
    if target is not table_sum:
        table_sum.add_(target)

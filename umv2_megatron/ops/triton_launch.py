"""Launches of the lookup's Triton kernels: what a list of picks is, how large tiles are, which kernel does what.

Every function here launches a number of programs that follows from shapes alone, waits for nothing and allocates from
torch's caching allocator only, so a CUDA graph can hold it. Letters as in ``triton_kernels.py``.

Tile sizes come from arithmetic, not from timing at run time: tuning in the first call would make the order of sums,
and so the last bits of a run, depend on noise. A thread should have about 32 elements of the tile in flight: enough
outstanding loads of 16 bytes (4 in bfloat16) to hide memory, few enough registers for 16 or more warps per
multiprocessor with an accumulator of the same size beside it. So a tile has up to TILE_ELEMENTS elements and a warp per
32 * 32 of them, or of less, as both are powers of two. Where all picks of a token are fewer bytes than such a tile has
in bfloat16, a program takes several tokens. docs/kernels.md works this out and lists the candidates to time on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import triton
from torch import Tensor

from umv2_megatron.ops import triton_kernels as kernels
from umv2_megatron.ops import triton_segments as segment_kernels

TILE_ELEMENTS = 4096
WIDEST_ROW = 2048
"""Columns (padded) that one program holds; wider rows are cut up, and the fused kernels are left out."""
ELEMENTS_PER_WARP = 1024
LISTED_ELEMENTS_PER_WARP = 512
"""Of ``row_sums`` over lists, whose threads hold the first pick and the number of picks of their tokens, too."""
TILE_PICKS = 256
"""Picks of all tokens of a program, at most: each has a row id and scores beside its elements."""
LISTED_PICKS = 4
"""Of a token whose picks lie in a list, in any number, as many are in a tile at once."""
SEGMENTS = 8
"""Rows of a sum that a program of ``add_to_rows`` reads and writes, unless they are so narrow that more fit a warp."""
SEGMENT_ELEMENTS = 4096
"""And at most this many elements of them: each is a register for the sum."""
PIECE = 128
"""Picks of one row that a single program sums (see ``triton_segments.py``)."""
SEARCH_SPAN = 1024
"""Sorted picks among which one program of ``find_segments`` looks for the beginnings of rows."""
LEAST_BYTES = 64
"""Of a slice of a row that are read at once where a cache decides on the columns of a tile: two sectors of 32 bytes."""
REUSED = 2
"""Picks per row of a table from which on it pays to read it tile by tile: every tile reads all row ids and weights."""
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
    """Edges of a tile [tokens * picks, cores, columns + rest] of rows, and the warps that share it."""

    tokens: int
    """Of a program, each with so many ``picks``."""
    picks: int
    cores: int
    columns: int
    rest: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        edges = {"PICKS": self.picks, "CORES": self.cores, "COLUMNS": self.columns, "REST": self.rest}
        return {"TOKENS": self.tokens, **edges}

    @property
    def table_constants(self) -> dict[str, int]:
        """Of kernels that know no tokens and have their own number of picks."""
        return {"CORES": self.cores, "COLUMNS": self.columns, "REST": self.rest}

    def stretches(self, slice_columns: int) -> int:
        """Programs that share the columns of a slice."""
        return triton.cdiv(slice_columns, self.columns + self.rest)


NO_TILE = Tile(tokens=1 << 30, picks=0, cores=0, columns=0, rest=0, warps=0)
"""Of a table that is not there; it sets no limit to the tokens of a program."""


def cut(columns: int) -> tuple[int, int]:
    """Two powers of two, the second one may be 0, that hold ``columns`` with few idle lanes: 96 = 64 + 32."""
    padded = triton.next_power_of_2(columns)
    rest = triton.next_power_of_2(max(1, columns - padded // 2))
    # A rest of few columns would have more lanes than elements.
    return (padded // 2, rest) if 16 <= rest < padded // 2 else (padded, 0)


def cache_bytes(device: torch.device) -> int:
    """What the cache of ``device`` keeps of data that all programs read: half of the L2, because large ones have two
    halves, each of which keeps what its own multiprocessors read. 0 on a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size // 2 if device.type == "cuda" else 0


def cached_columns(table: Tensor, cores: int, picks: int) -> int:
    """Columns of each of the ``cores`` slices, a power of two, so that these columns of all rows of ``table`` fit the
    cache; 0 where that is no question: all columns fit, not even few do, or ``picks`` do not come back to a row.

    Programs of one stretch of columns are started one after the other, before those of the next stretch, so that a
    row is read from memory once for each stretch and not for each pick.
    """
    held, size = table.shape[0] * cores * table.element_size(), table.element_size()
    cache = cache_bytes(table.device)
    slice_columns = table.shape[1] // cores
    if cache == 0 or held == 0 or held * slice_columns <= cache or picks < REUSED * table.shape[0]:
        return 0
    columns = _power_below(cache // held)
    return columns if columns * size >= LEAST_BYTES else 0


def tile_for(
    cores: int, slice_columns: int, most_picks: int, other_columns: int = 0, in_two: bool = True,
    element_size: int = 0, most_tokens: int = NO_TILE.tokens, most_columns: int = 0,
    elements_per_warp: int = 0,
) -> Tile:  # fmt: skip
    """The tile for rows of ``cores`` slices of ``slice_columns``, at most ``most_picks`` of a token at once.

    ``other_columns``: of rows of a second table that the same program holds. ``in_two``: whether the kernel can take
    slices that are ``cut``. ``element_size``: bytes of an element of the rows, for a kernel that can take several
    tokens, at most ``most_tokens``; 0: one. ``most_columns``: of a slice, a power of two; 0: any.
    ``elements_per_warp``: 0 for ELEMENTS_PER_WARP.
    """
    padded_cores = triton.next_power_of_2(cores)
    columns, rest = cut(slice_columns) if in_two else (triton.next_power_of_2(slice_columns), 0)
    if padded_cores * (columns + rest) > WIDEST_ROW:
        columns, rest = max(1, WIDEST_ROW // padded_cores), 0
    if 0 < most_columns < columns + rest:
        columns, rest = most_columns, 0
    width = max(padded_cores * (columns + rest), sum(cut(max(1, other_columns))))
    picks = max(1, min(_power_below(TILE_ELEMENTS // width), triton.next_power_of_2(max(1, most_picks))))
    tokens = 1
    if element_size > 0:
        # TILE_ELEMENTS are counted for elements of 2 bytes: what has to be in flight is a number of bytes.
        filling = _power_below(TILE_ELEMENTS * 2 // (picks * width * element_size))
        tokens = max(1, min(filling, TILE_PICKS // picks, most_tokens))
    return Tile(tokens, picks, padded_cores, columns, rest, _warps(tokens * picks * width, elements_per_warp))


def _power_below(number: int) -> int:
    """The largest power of two that is at most ``number``; 0 for 0."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0


def _warps(elements: int, per_warp: int = 0) -> int:
    return max(1, min(8, triton.next_power_of_2(triton.cdiv(elements, per_warp or ELEMENTS_PER_WARP))))


def can_fuse(pre_columns: int, cores: int, slice_columns: int) -> bool:
    """Whether one program can hold whole rows of both tables."""
    return max(sum(cut(pre_columns)), triton.next_power_of_2(cores) * sum(cut(slice_columns))) <= WIDEST_ROW


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
        tile = tile_for(cores, slice_columns, per_token, pre_columns, element_size=values.element_size())
        tensors = {
            **{"rows": picks.rows, "blocks": picks.blocks, "scores": scores, "projected": projected.contiguous()},
            **{"pre_values": pre_values.detach(), "values": values.detach(), "out": out, "rho_out": rho},
        }
        constants = {
            **{"P": per_token, "C": cores, "E": picks.num_blocks, "DP": pre_columns, "DC": slice_columns},
            **{"GELU": gelu, "PRE_COLUMNS": cut(pre_columns)[0], "PRE_REST": cut(pre_columns)[1], **tile.constants},
        }
        grid = (triton.cdiv(tokens, tile.tokens), picks.num_blocks)
        launch(kernels.fused_forward, grid, {**tensors, "tokens": tokens}, constants, tile.warps)
    return out, rho


# -- the parts --------------------------------------------------------------------------------------------------------


def row_sums(picks: PickList, weights: Tensor, table: Tensor) -> Tensor:
    """Sum over each token's picks of weight * row, [T, E * D] in the dtype of ``table``; ``weights`` is [n, C]."""
    cores, slice_columns = weights.shape[1], table.shape[1] // weights.shape[1]
    out = table.new_empty(picks.num_tokens, picks.num_blocks * table.shape[1])
    if picks.num_tokens == 0:
        return out
    most_columns = cached_columns(table, cores, picks.rows.shape[0])
    tile = tile_for(cores, slice_columns, picks.per_token or LISTED_PICKS, element_size=table.element_size(),
                    most_columns=most_columns,
                    elements_per_warp=0 if picks.per_token else LISTED_ELEMENTS_PER_WARP)  # fmt: skip
    grid = (triton.cdiv(picks.num_tokens, tile.tokens), picks.num_blocks, tile.stretches(slice_columns))
    tensors = {
        **{"rows": picks.rows, "blocks": picks.blocks, "starts": picks.starts, "weights": weights},
        **{"table": table.detach(), "out": out, "tokens": picks.num_tokens},
    }
    constants = {"P": picks.per_token, "C": cores, "E": picks.num_blocks, "DC": slice_columns, **tile.constants}
    launch(kernels.row_sums, grid, tensors, constants, tile.warps)
    return out


def row_dots(picks: PickList, upstream: Tensor, table: Tensor, cores: int, dtype: torch.dtype) -> Tensor:
    """Dot products of the slices of each picked row with those of ``upstream`` [T * E, D]: [n, C] in ``dtype``."""
    count, slice_columns = picks.rows.shape[0], table.shape[1] // cores
    most_columns = cached_columns(table, cores, count)
    stretches = triton.cdiv(slice_columns, most_columns) if most_columns else 1
    dots = torch.empty(stretches, count, cores, dtype=dtype, device=table.device)
    _row_dots(picks, upstream, table, dots, {"SCALED": False, "GELU": False}, most_columns)
    return dots[0] if stretches == 1 else dots.sum(0)


def score_gradients(
    picks: PickList, scores: Tensor, rho: Tensor, upstream: Tensor, values: Tensor, gelu: bool,
    pre_values: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:  # fmt: skip
    """(weights = scores * activation(rho) [T, P, C], gradient of scores [T, P, C], gradient of rho [T, P], gradient of
    the projected input [T, Dp], if ``pre_values`` are given) of a grid, from the gradient of the output, ``upstream``
    [T * E, Dv]."""
    weights, score_grad, rho_grad = torch.empty_like(scores), torch.empty_like(scores), torch.empty_like(rho)
    extra = {"scores": scores, "rho_in": rho, "weights_out": weights, "rho_grad": rho_grad}
    projected_grad = None
    if pre_values is not None:
        projected_grad = pre_values.new_empty(picks.num_tokens, pre_values.shape[1])
        extra |= {"pre_values": pre_values.detach(), "projected_grad": projected_grad}
    _row_dots(picks, upstream, values, score_grad.flatten(0, 1).unsqueeze(0), {"SCALED": True, "GELU": gelu}, **extra)
    return weights, score_grad, rho_grad, projected_grad


def _row_dots(
    picks: PickList, upstream: Tensor, table: Tensor, dots: Tensor, epilogue: dict[str, bool], most_columns: int = 0,
    **extra: Tensor,
) -> None:  # fmt: skip
    stretches, count, cores = dots.shape
    if count == 0:
        return
    slice_columns = table.shape[1] // cores
    pre_columns = extra["pre_values"].shape[1] if "pre_values" in extra else 0
    # Of a list, a program takes as many picks as fill the tile; whose they are does not matter.
    most_picks, size = (picks.per_token, table.element_size()) if picks.per_token else (TILE_ELEMENTS, 0)
    pre_tile = tile_for(1, pre_columns, most_picks, element_size=size) if pre_columns > 0 else NO_TILE
    tile = tile_for(cores, slice_columns, most_picks, element_size=size, most_tokens=pre_tile.tokens,
                    most_columns=most_columns)  # fmt: skip
    programs = triton.cdiv(picks.num_tokens, tile.tokens) if picks.per_token else triton.cdiv(count, tile.picks)
    names = ("scores", "rho_in", "weights_out", "rho_grad", "pre_values", "projected_grad")
    tensors: dict[str, Any] = dict.fromkeys(names)
    tensors |= {**picks.places, "upstream": upstream, "table": table.detach(), "dots": dots, "picks": count, **extra}
    constants = {"P": picks.per_token, "C": cores, "E": picks.num_blocks, "DC": slice_columns, **tile.constants}
    constants |= {"DP": pre_columns, "PRE_PICKS": pre_tile.picks, "STRETCHED": stretches > 1}
    constants |= {"PRE_COLUMNS": pre_tile.columns, "PRE_REST": pre_tile.rest}
    warps = max(tile.warps, _warps(tile.tokens * pre_tile.picks * (pre_tile.columns + pre_tile.rest)))
    launch(kernels.row_dots, (programs, stretches), tensors, {**constants, **epilogue}, warps)


@dataclass
class Segments:
    """The picks in order of their rows, cut into pieces with one owner each (``triton_segments.py``)."""

    sorted_rows: Tensor
    """[n] integers, ascending."""
    order: Tensor
    """[n] int64: which pick each of them was; picks of a row keep their order."""
    counter: Tensor
    """[1] int32: how many segments there are."""
    starts: Tensor
    """[at most so many] int32, like ``ends``: places in the sorted list."""
    ends: Tensor
    targets: Tensor
    """In the dtype of ``sorted_rows``: the row, or -1 - (number of the piece)."""


def sort_picks(picks: PickList, num_rows: int) -> Segments:
    """The picks sorted by their rows of a table of ``num_rows``; one sort serves both tables."""
    count, device = picks.rows.shape[0], picks.rows.device
    assert count < 2**31 - 2**12, f"{count} picks; 32-bit places end at 2^31"
    # A radix sort takes half the passes over 4-byte keys.
    keys = picks.rows.to(torch.int32) if num_rows <= 2**31 else picks.rows
    sorted_rows, order = keys.sort(stable=True)
    most = min(count, num_rows) + triton.cdiv(count, PIECE)
    starts, ends = (torch.empty(most, dtype=torch.int32, device=device) for _ in range(2))
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    found = Segments(sorted_rows, order, counter, starts, ends, sorted_rows.new_empty(most))
    if count > 0:
        span = max(SEARCH_SPAN, PIECE)
        tensors = {
            **{"sorted_rows": sorted_rows, "counter": counter, "starts": starts, "ends": ends},
            **{"targets": found.targets, "picks": count},
        }
        constants = {"SPAN": span, "PIECE": PIECE}
        launch(segment_kernels.find_segments, (triton.cdiv(count, span),), tensors, constants, 4)
    return found


@dataclass
class Addition:
    """weights[n, c] * upstream[place of n, slice c] is to be added to the row of each pick n in ``table_sum``."""

    weights: Tensor
    """[n, C]"""
    upstream: Tensor
    """[T * E, D]"""
    table_sum: Tensor
    """[A, D], contiguous."""
    num_blocks: int = 1
    """E; 1 for pre-values, which know no blocks."""
    table: Optional[Tensor] = None
    """[A, D], of the first addition only: the dot products of its rows with ``upstream`` are wanted, too."""

    @property
    def sizes(self) -> tuple[int, int]:
        """C, and the columns of a slice."""
        cores = self.weights.shape[1]
        return cores, self.table_sum.shape[1] // cores


def add_to_rows(
    picks: PickList, additions: Sequence[Addition], in_order: Optional[Segments]
) -> Optional[Tensor]:
    """Do one or two ``additions`` of the same picks; returns the dot products [n, C] that the first one asks for.

    With the sorted picks ``in_order`` the sums have a fixed order; with None they are atomic, in any order, and there
    are no dot products.
    """
    count = picks.rows.shape[0]
    if not additions:
        return None
    wanted = additions[0].table is not None
    assert not wanted or in_order is not None, "dot products by way of atomic additions"
    if count == 0:
        return additions[0].weights.new_empty(additions[0].weights.shape) if wanted else None
    assert all(each.table_sum.is_contiguous() for each in additions)
    if in_order is None:
        for each in additions:
            _add_atomically(picks, each)
        return None
    tiles = [tile_for(*each.sizes, 1) for each in additions]
    width = max(tile.cores * (tile.columns + tile.rest) for tile in tiles)
    segments = max(1, min(_power_below(SEGMENT_ELEMENTS // width), max(SEGMENTS, ELEMENTS_PER_WARP // width)))
    segments = _power_below(segments)
    tensors: dict[str, Any] = {
        **{"starts": in_order.starts, "ends": in_order.ends, "targets": in_order.targets},
        **{"counter": in_order.counter, "order": in_order.order},
        **{"blocks": picks.blocks, "owners": picks.owners},
    }
    constants: dict[str, int] = {"P": picks.per_token, "SEGMENTS": segments, "DOTS": wanted}
    long_rows: dict[str, Any] = {"sorted_rows": in_order.sorted_rows, "picks": count}
    columns = []
    for number, suffix in enumerate(("", "_2")):
        made = _table_arguments(additions[number], tiles[number]) if number < len(additions) else NO_TABLE
        tensors |= {f"{name}{suffix}": each for name, each in made[0].items()}
        constants |= {f"{name}{suffix}": each for name, each in made[1].items()}
        long_rows |= {f"{name}{suffix}": made[0][name] for name in ("table_sum", "pieces")}
        columns.append(made[1]["C"] * made[1]["DC"])
    first, stretches = additions[0], constants["STRETCHES"]
    dots = first.weights.new_empty(stretches, *first.weights.shape) if wanted else None
    tensors |= {"sorted_rows": in_order.sorted_rows, "picks": count, "dots": dots}
    tensors["table"] = first.table.detach() if first.table is not None else None
    grid = (triton.cdiv(in_order.starts.shape[0], segments), constants["STRETCHES"] + constants["STRETCHES_2"])
    launch(segment_kernels.add_to_rows, grid, tensors, constants, _warps(segments * width))
    if count > PIECE:
        stretch = min(triton.next_power_of_2(max(columns)), 512)
        parts = [triton.cdiv(each, stretch) for each in columns]
        constants = {"D": columns[0], "D_2": columns[1], "STRETCHES": parts[0]}
        constants |= {"PIECE": PIECE, "STEPS": LONG_ROW_STEPS, "COLUMNS": stretch}
        grid = (triton.cdiv(count, PIECE), sum(parts))
        launch(segment_kernels.add_long_rows, grid, long_rows, constants, 2)
    if dots is None:
        return None
    return dots[0] if stretches == 1 else dots.sum(0)


NO_TABLE: tuple[dict[str, Any], dict[str, int]] = (
    dict.fromkeys(("weights", "upstream", "table_sum", "pieces")),
    dict.fromkeys(("C", "E", "DC", "CORES", "COLUMNS", "REST", "STRETCHES"), 0),
)


def _table_arguments(addition: Addition, tile: Tile) -> tuple[dict[str, Any], dict[str, int]]:
    """Tensors and constants of ``add_to_rows`` for one table."""
    weights, table_sum = addition.weights, addition.table_sum
    cores, slice_columns = addition.sizes
    pieces = weights.new_empty(triton.cdiv(weights.shape[0], PIECE), table_sum.shape[1])
    tensors = {"weights": weights, "upstream": addition.upstream, "table_sum": table_sum, "pieces": pieces}
    constants = {"C": cores, "E": addition.num_blocks, "DC": slice_columns, **tile.table_constants}
    constants["STRETCHES"] = tile.stretches(slice_columns)
    return tensors, constants


def _add_atomically(picks: PickList, addition: Addition) -> None:
    weights, table_sum = addition.weights, addition.table_sum
    cores, slice_columns = addition.sizes
    # Half-precision atomics would round at every pick: only a model without main_grad comes here.
    target = table_sum if table_sum.dtype == weights.dtype else torch.zeros_like(table_sum, dtype=weights.dtype)
    tile = tile_for(cores, slice_columns, TILE_ELEMENTS, in_two=False)
    tensors = {
        **{**picks.places, "weights": weights, "upstream": addition.upstream, "table_sum": target},
        **{"picks": weights.shape[0]},
    }
    constants = {"P": picks.per_token, "C": cores, "E": addition.num_blocks, "DC": slice_columns}
    constants |= {"PICKS": tile.picks, "CORES": tile.cores, "COLUMNS": tile.columns}
    grid = (triton.cdiv(weights.shape[0], tile.picks), tile.stretches(slice_columns))
    launch(kernels.atomic_add_to_rows, grid, tensors, constants, tile.warps)
    if target is not table_sum:
        table_sum.add_(target)

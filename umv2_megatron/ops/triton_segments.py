"""Triton kernels that add the picks' rows to the gradients of tables in a fixed order: one owner for every sum.

    find_segments    where the rows begin and end in the list of picks sorted by row
    add_to_rows      row[a] += sum over the picks of a, in their order
    add_long_rows    finishes rows that are picked more than PIECE times

A segment is a run of sorted picks of one row, at most up to the next multiple of PIECE: nobody walks further. Its sum
belongs to one program, so that results are repeatable bit by bit, in whatever order the segments are listed. A
segment that continues a row goes into ``pieces`` [multiples of PIECE, D].

With DOTS a program also takes the dot products of its picks' upstream rows with the row of the table, which are the
gradients of the weights: upstream is there, and the row is loaded once for all picks of the segment.

A program of ``add_to_rows`` takes SEGMENTS segments: their rows of the sum are requested at once, and the first
pick of every one, then the second, and so on. Both tables of a lookup go through one launch: they have the same picks.
Letters, tile edges and precision as in ``triton_kernels.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from umv2_megatron.ops.triton_kernels import column_offsets, core_offsets, load_rows, upstream_places


@triton.jit(do_not_specialize=["picks"])
def find_segments(
    sorted_rows, counter, starts, ends, targets, picks, SPAN: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """``counter`` [1], zero before: the number of segments. Each is at starts..ends of the sorted list; its target is
    its row, or -1 - (number of its piece). One program per SPAN positions, a multiple of PIECE."""
    position = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    real = position < picks
    row = tl.load(sorted_rows + position, mask=real, other=0)
    begins = row != tl.load(sorted_rows + position - 1, mask=real & (position > 0), other=-1)
    live = real & (begins | (position % PIECE == 0))
    number = tl.sum(live.to(tl.int32), axis=0)
    # Which program comes first decides where in the list its segments are, and nothing else.
    first = tl.atomic_add(counter, number, sem="relaxed")
    place = first + tl.cumsum(live.to(tl.int32), axis=0) - 1
    tl.store(starts + place, position.to(tl.int32), mask=live)
    tl.store(targets + place, tl.where(begins, row, (-1 - position // PIECE).to(row.dtype)), mask=live)
    # A segment ends where the next one begins; no segment crosses a span.
    tl.store(ends + place - 1, position.to(tl.int32), mask=live & (place > first))
    end = tl.minimum((tl.program_id(0).to(tl.int64) + 1) * SPAN, picks)
    tl.store(ends + first + number - 1, end.to(tl.int32))


@triton.jit
def load_pick(
    order, blocks, owners, weights, position, mine,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, CORES: tl.constexpr,
):  # fmt: skip
    """The pick at each sorted ``position``, its weights [segments, CORES, 1] and the row of ``upstream``."""
    pick = tl.load(order + position, mask=mine, other=0).to(tl.int64)
    offsets, within = core_offsets(pick, C, CORES)
    weight = tl.load(weights + offsets, mask=mine[:, None] & within, other=0.0)
    return pick, weight[:, :, None], upstream_places(pick, owners, blocks, mine, P, E)


@triton.jit
def store_segments(
    table_sum, pieces, total, target, mine, first,
    C: tl.constexpr, DC: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each segment's ``total`` to its row of the sum, or to its piece."""
    columns, exist = column_offsets(first, C, DC, CORES, COLUMNS)
    to_row, to_piece = mine & (target >= 0), mine & (target < 0)
    rows = table_sum + target[:, None, None] * (C * DC) + columns
    tl.store(rows, total.to(table_sum.dtype.element_ty), mask=to_row[:, None, None] & exist)
    tl.store(pieces + (-1 - target)[:, None, None] * (C * DC) + columns, total, mask=to_piece[:, None, None] & exist)


@triton.jit
def add_segments(
    starts, ends, targets, known, order, blocks, owners, weights, upstream, table_sum, pieces, column,
    sorted_rows, table, dots, DOTS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr,
    SEGMENTS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """What one program of ``add_to_rows`` does, for one table; with DOTS ``dots`` [n, C] of its columns are stored."""
    dtype: tl.constexpr = weights.dtype.element_ty
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    mine = segment < known
    position = tl.load(starts + segment, mask=mine, other=0)
    end = tl.load(ends + segment, mask=mine, other=0)
    target = tl.load(targets + segment, mask=mine, other=0).to(tl.int64)
    to_row = mine & (target >= 0)
    # Begun with what the row has: needed last, requested first.
    total = load_rows(table_sum, target, to_row, column, C, DC, CORES, COLUMNS).to(dtype)
    if REST > 0:
        total_rest = load_rows(table_sum, target, to_row, column + COLUMNS, C, DC, CORES, REST).to(dtype)
    if DOTS:
        own_row = tl.load(sorted_rows + position, mask=mine, other=0).to(tl.int64)
        held = load_rows(table, own_row, mine, column, C, DC, CORES, COLUMNS).to(dtype)
        if REST > 0:
            held_rest = load_rows(table, own_row, mine, column + COLUMNS, C, DC, CORES, REST).to(dtype)
    longest = tl.max(end - position, axis=0)
    pick, weight, place = load_pick(order, blocks, owners, weights, position, position < end, P, C, E, CORES)
    for _ in range(0, longest):
        now = position < end
        part = load_rows(upstream, place, now, column, C, DC, CORES, COLUMNS)
        if REST > 0:
            part_rest = load_rows(upstream, place, now, column + COLUMNS, C, DC, CORES, REST)
        position += 1
        next_pick, next_weight, place = load_pick(
            order, blocks, owners, weights, position, position < end, P, C, E, CORES
        )  # fmt: skip
        total += weight * part.to(dtype)
        if REST > 0:
            total_rest += weight * part_rest.to(dtype)
        if DOTS:
            dot = tl.sum(part.to(dtype) * held, axis=2)
            if REST > 0:
                dot += tl.sum(part_rest.to(dtype) * held_rest, axis=2)
            offsets, within = core_offsets(pick, C, CORES)
            tl.store(dots + offsets, dot, mask=now[:, None] & within)
        pick, weight = next_pick, next_weight
    store_segments(table_sum, pieces, total, target, mine, column, C, DC, CORES, COLUMNS)
    if REST > 0:
        store_segments(table_sum, pieces, total_rest, target, mine, column + COLUMNS, C, DC, CORES, REST)


@triton.jit(do_not_specialize=["picks"])
def add_to_rows(
    starts, ends, targets, counter, order, blocks, owners,
    weights, upstream, table_sum, pieces, weights_2, upstream_2, table_sum_2, pieces_2,
    sorted_rows, table, dots, picks,
    P: tl.constexpr, SEGMENTS: tl.constexpr, DOTS: tl.constexpr,
    C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr,
    STRETCHES: tl.constexpr,
    C_2: tl.constexpr, E_2: tl.constexpr, DC_2: tl.constexpr, CORES_2: tl.constexpr, COLUMNS_2: tl.constexpr,
    REST_2: tl.constexpr, STRETCHES_2: tl.constexpr,
):  # fmt: skip
    """table_sum[row, slice c] += sum of weights[n, c] * upstream[place of n, slice c] over the picks n of the row.

    One program per SEGMENTS segments and stretch of columns: STRETCHES of the first table, then STRETCHES_2 of the
    second one, if there is one. With DOTS also dots[stretch, n, c], the part of <table[row of n, slice c],
    upstream[place of n, slice c]> that lies in the columns of a stretch of the first table.
    """
    known = tl.load(counter)
    if tl.program_id(0) * SEGMENTS < known:
        stretch = tl.program_id(1)
        if stretch < STRETCHES:
            own_dots = dots
            if DOTS:
                own_dots += stretch * picks.to(tl.int64) * C
            add_segments(
                starts, ends, targets, known, order, blocks, owners, weights, upstream, table_sum, pieces,
                stretch * (COLUMNS + REST), sorted_rows, table, own_dots, DOTS,
                P, C, E, DC, SEGMENTS, CORES, COLUMNS, REST,
            )  # fmt: skip
        elif STRETCHES_2 > 0:
            add_segments(
                starts, ends, targets, known, order, blocks, owners, weights_2, upstream_2, table_sum_2, pieces_2,
                (stretch - STRETCHES) * (COLUMNS_2 + REST_2), sorted_rows, table, dots, False,
                P, C_2, E_2, DC_2, SEGMENTS, CORES_2, COLUMNS_2, REST_2,
            )  # fmt: skip


@triton.jit
def add_pieces(table_sum, pieces, row, first, last, stretch, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Add the pieces ``first`` to ``last`` to ``row``, in order."""
    column = stretch * COLUMNS + tl.arange(0, COLUMNS)
    exist = column < D
    target = table_sum + row * D + column
    total = tl.load(target, mask=exist, other=0.0).to(pieces.dtype.element_ty)
    for piece in range(first, last + 1):
        total += tl.load(pieces + piece * D + column, mask=exist, other=0.0)
    tl.store(target, total.to(table_sum.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["picks"])
def add_long_rows(
    sorted_rows, table_sum, pieces, table_sum_2, pieces_2, picks,
    D: tl.constexpr, D_2: tl.constexpr, STRETCHES: tl.constexpr,
    PIECE: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds to both sums the ``pieces`` of rows that run on over a multiple of PIECE (see ``add_to_rows``).

    One program per multiple; the one at the first multiple inside a row adds all pieces of that row, in order. It
    finds the last one by bisection: 2 to the power of STEPS is more than there are multiples.
    """
    first = tl.program_id(0).to(tl.int64)
    position = first * PIECE
    row = tl.load(sorted_rows + position).to(tl.int64)
    goes_on = tl.load(sorted_rows + position - 1, mask=position > 0, other=-1).to(tl.int64) == row
    went_on = tl.load(sorted_rows + position - PIECE - 1, mask=position > PIECE, other=-1).to(tl.int64) == row
    if goes_on & (went_on == 0):
        last = first
        beyond = (picks + PIECE - 1) // PIECE + first * 0
        for _ in range(0, STEPS):
            middle = (last + beyond) // 2
            same = tl.load(sorted_rows + middle * PIECE).to(tl.int64) == row
            last = tl.where(same, middle, last)
            beyond = tl.where(same, beyond, middle)
        stretch = tl.program_id(1)
        if stretch < STRETCHES:
            add_pieces(table_sum, pieces, row, first, last, stretch, D, COLUMNS)
        elif D_2 > 0:
            add_pieces(table_sum_2, pieces_2, row, first, last, stretch - STRETCHES, D_2, COLUMNS)

"""Triton kernels of the table lookup: a tile of picked rows, all columns of a row in one program.

One kernel does a whole forward over a [T, P] grid of picks:

    fused_forward    gather pre-value rows, dot with the projected input, activation, weighted sum of value rows

and the others do a part each, for grids as well as for ragged lists (what shards of a table need):

    row_sums         sum over a token's picks of weight * row          -> [T * E, D]
    row_dots         dot product of each picked row with an upstream   -> [n, C]; for grids it goes on to the gradients
                     of scores and rho
    add_to_rows      row[a] += sum over the picks of a, in a fixed order: the picks come sorted by row, a program owns
                     one row; ``add_long_rows`` finishes rows that are picked more than PIECE times
    atomic_add_to_rows   the same without sorting, in any order

Letters: T tokens, P picks of a token, n picks in all, C cores, E virtual blocks, D columns of a table, DC = D / C. A
tile of rows is [picks, C, DC], so that core c scales its own slice without any gather of weights. Tile edges (PICKS,
CORES, COLUMNS, PRE_COLUMNS) are powers of two; what lies outside C, DC or DP is masked. Sums are kept in the dtype of
the weights: float32, or float64 in a float64 model. Offsets are 64-bit. Sizes that a model fixes are constexpr, so
that the compiler knows the alignment of rows; the number of tokens and picks is not, and nothing is specialised on it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activation_of(rho, GELU: tl.constexpr):
    """rho, or its exact (erf) GELU."""
    if GELU:
        return 0.5 * rho * (1.0 + tl.erf(rho * 0.7071067811865476))
    return rho


@triton.jit
def activation_slope(rho, GELU: tl.constexpr):
    """Derivative of ``activation_of``."""
    if GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * rho * rho)
        return 0.5 * (1.0 + tl.erf(rho * 0.7071067811865476)) + rho * density
    return rho * 0.0 + 1.0


@triton.jit
def column_offsets(first, C: tl.constexpr, DC: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets [1, CORES, COLUMNS] within a row, and which of them exist; ``first`` column of every slice."""
    core = tl.arange(0, CORES)[None, :, None]
    column = first + tl.arange(0, COLUMNS)[None, None, :]
    return core * DC + column, (core < C) & (column < DC)


@triton.jit
def core_offsets(pick, C: tl.constexpr, CORES: tl.constexpr):
    """Offsets [picks, CORES] into an [n, C] tensor, and which of them exist."""
    core = tl.arange(0, CORES)[None, :]
    return pick[:, None] * C + core, core < C


@triton.jit(do_not_specialize=["tokens"])
def fused_forward(
    rows, blocks, scores, projected, pre_values, values, out, rho_out, tokens,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, DC: tl.constexpr, GELU: tl.constexpr,
    PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr, PRE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per token and block: out [T, E, C * DC] and rho before its activation, [T, P]."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns, exist = column_offsets(0, C, DC, CORES, COLUMNS)
    pre_column = tl.arange(0, PRE_COLUMNS)
    pre_exist = pre_column < DP
    dtype: tl.constexpr = scores.dtype.element_ty
    query = tl.load(projected + token * DP + pre_column, mask=pre_exist, other=0.0).to(dtype)
    total = tl.zeros([PICKS, CORES, COLUMNS], dtype=dtype)
    for start in range(0, P, PICKS):
        place = start + tl.arange(0, PICKS)
        mine = place < P
        pick = token * P + place
        if E > 1:
            mine = mine & (tl.load(blocks + pick, mask=mine, other=-1) == block)
        row = tl.load(rows + pick, mask=mine, other=0).to(tl.int64)
        # Both gathers are issued before either is used.
        pre = tl.load(
            pre_values + row[:, None] * DP + pre_column[None, :], mask=mine[:, None] & pre_exist[None, :], other=0.0
        )
        value = tl.load(values + row[:, None, None] * (C * DC) + columns, mask=mine[:, None, None] & exist, other=0.0)
        offsets, within = core_offsets(pick, C, CORES)
        score = tl.load(scores + offsets, mask=mine[:, None] & within, other=0.0)
        rho = tl.sum(pre.to(dtype) * query[None, :], axis=1)
        tl.store(rho_out + pick, rho, mask=mine)
        weight = score * activation_of(rho, GELU)[:, None]
        total += weight[:, :, None] * value.to(dtype)
    summed = tl.sum(total, axis=0)[None, :, :]
    tl.store(out + (token * E + block) * (C * DC) + columns, summed.to(out.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["tokens"])
def row_sums(
    rows, blocks, starts, weights, table, out, tokens,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr,
    PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per token, block and stretch of columns: out [T, E, C * DC].

    Token t has the picks t * P up to (t + 1) * P, or with P = 0 ``starts[t]`` up to ``starts[t + 1]``.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns, exist = column_offsets(tl.program_id(2) * COLUMNS, C, DC, CORES, COLUMNS)
    dtype: tl.constexpr = weights.dtype.element_ty
    if P > 0:
        first = token * P
        count = P
    else:
        first = tl.load(starts + token).to(tl.int64)
        count = (tl.load(starts + token + 1).to(tl.int64) - first).to(tl.int32)
    total = tl.zeros([PICKS, CORES, COLUMNS], dtype=dtype)
    for start in range(0, count, PICKS):
        place = start + tl.arange(0, PICKS)
        mine = place < count
        pick = first + place
        if E > 1:
            mine = mine & (tl.load(blocks + pick, mask=mine, other=-1) == block)
        row = tl.load(rows + pick, mask=mine, other=0).to(tl.int64)
        value = tl.load(table + row[:, None, None] * (C * DC) + columns, mask=mine[:, None, None] & exist, other=0.0)
        offsets, within = core_offsets(pick, C, CORES)
        weight = tl.load(weights + offsets, mask=mine[:, None] & within, other=0.0)
        total += weight[:, :, None] * value.to(dtype)
    summed = tl.sum(total, axis=0)[None, :, :]
    tl.store(out + (token * E + block) * (C * DC) + columns, summed.to(out.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["picks"])
def row_dots(
    rows, blocks, owners, upstream, table, dots, scores, rho_in, weights_out, rho_grad, picks,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr, SCALED: tl.constexpr, GELU: tl.constexpr,
    PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dots[n, c] = <table[rows[n], slice c], upstream[token, block, slice c]>, which is the gradient of the weights.

    One program per token of a grid of P picks each, or, with P = 0, per PICKS picks of a list with ``owners`` [n].
    SCALED (grids only): the weights are score * activation(rho), so ``dots`` becomes the gradient of ``scores``
    [n, C], and the weights [n, C] and the gradient of rho [n] are written as well.
    """
    program = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = dots.dtype.element_ty
    SPAN: tl.constexpr = P if P > 0 else PICKS
    for start in range(0, SPAN, PICKS):
        place = start + tl.arange(0, PICKS)
        pick = program * SPAN + place
        mine = (place < SPAN) & (pick < picks)
        row = tl.load(rows + pick, mask=mine, other=0).to(tl.int64)
        if P == 0:
            from_row = tl.load(owners + pick, mask=mine, other=0).to(tl.int64) * E
        else:
            from_row = tl.zeros([PICKS], dtype=tl.int64) + program * E
        if E > 1:
            from_row += tl.load(blocks + pick, mask=mine, other=0)
        dot = tl.zeros([PICKS, CORES], dtype=dtype)
        for column in range(0, DC, COLUMNS):
            columns, exist = column_offsets(column, C, DC, CORES, COLUMNS)
            mask = mine[:, None, None] & exist
            value = tl.load(table + row[:, None, None] * (C * DC) + columns, mask=mask, other=0.0)
            if P > 0 and E == 1:
                other = tl.load(upstream + program * (C * DC) + columns, mask=exist, other=0.0)
            else:
                other = tl.load(upstream + from_row[:, None, None] * (C * DC) + columns, mask=mask, other=0.0)
            dot += tl.sum(value.to(dtype) * other.to(dtype), axis=2)
        offsets, within = core_offsets(pick, C, CORES)
        within = mine[:, None] & within
        if SCALED:
            score = tl.load(scores + offsets, mask=within, other=0.0)
            rho = tl.load(rho_in + pick, mask=mine, other=0.0)
            active = activation_of(rho, GELU)[:, None]
            tl.store(weights_out + offsets, score * active, mask=within)
            tl.store(rho_grad + pick, tl.sum(dot * score, axis=1) * activation_slope(rho, GELU), mask=mine)
            dot *= active
        tl.store(dots + offsets, dot, mask=within)


@triton.jit
def upstream_places(pick, owners, blocks, mine, P: tl.constexpr, E: tl.constexpr):
    """Where in upstream [T * E, D] each of ``pick`` finds its row."""
    if P > 0:
        place = pick // P * E
    else:
        place = tl.load(owners + pick, mask=mine, other=0).to(tl.int64) * E
    if E > 1:
        place += tl.load(blocks + pick, mask=mine, other=0)
    return place


@triton.jit(do_not_specialize=["picks"])
def add_to_rows(
    sorted_rows, order, blocks, owners, weights, upstream, table_sum, pieces, picks,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr, PIECE: tl.constexpr,
    PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """table_sum[row, slice c] += sum of weights[n, c] * upstream[place of n, slice c] over the picks n of the row.

    One program per position of the sorted list. It works if a row starts there, on at most PIECE positions: up to the
    next multiple of PIECE. The rest of a longer row is summed by the programs at these multiples into ``pieces``
    [multiples, C * DC], and added by ``add_long_rows``. So no program walks further than PIECE picks, and the order of
    every sum is fixed.
    """
    position = tl.program_id(0).to(tl.int64)
    row = tl.load(sorted_rows + position).to(tl.int64)
    before = tl.load(sorted_rows + position - 1, mask=position > 0, other=-1).to(tl.int64)
    starts = row != before
    live = starts | (position % PIECE == 0)
    columns, exist = column_offsets(tl.program_id(1) * COLUMNS, C, DC, CORES, COLUMNS)
    dtype: tl.constexpr = weights.dtype.element_ty
    if live:
        target = table_sum + row * (C * DC) + columns
        # Read early: the sums below take a chain of loads.
        old = tl.load(target, mask=exist & starts, other=0.0).to(dtype)
        # How many picks: sorted, so all that match lie at the front.
        ahead = position + tl.arange(0, PIECE)
        end = tl.minimum((position // PIECE + 1) * PIECE, picks)
        count = tl.sum((tl.load(sorted_rows + ahead, mask=ahead < end, other=-1) == row).to(tl.int32), axis=0)
        total = tl.zeros([PICKS, CORES, COLUMNS], dtype=dtype)
        for start in range(0, count, PICKS):
            place = start + tl.arange(0, PICKS)
            mine = place < count
            pick = tl.load(order + position + place, mask=mine, other=0).to(tl.int64)
            offsets, within = core_offsets(pick, C, CORES)
            weight = tl.load(weights + offsets, mask=mine[:, None] & within, other=0.0)
            from_row = upstream_places(pick, owners, blocks, mine, P, E)
            part = tl.load(
                upstream + from_row[:, None, None] * (C * DC) + columns, mask=mine[:, None, None] & exist, other=0.0
            )
            total += weight[:, :, None] * part.to(dtype)
        summed = tl.sum(total, axis=0)[None, :, :]
        tl.store(target, (old + summed).to(table_sum.dtype.element_ty), mask=exist & starts)
        tl.store(pieces + position // PIECE * (C * DC) + columns, summed, mask=exist & (starts == 0))


@triton.jit(do_not_specialize=["picks"])
def add_long_rows(
    sorted_rows, table_sum, pieces, picks,
    D: tl.constexpr, PIECE: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds to ``table_sum`` the ``pieces`` of rows that run on over a multiple of PIECE (see ``add_to_rows``).

    One program per multiple; the one at the first multiple inside a row adds all pieces of that row, in order. It
    finds the last one by bisection: 2 to the power of STEPS is more than there are multiples.
    """
    first = tl.program_id(0).to(tl.int64)
    position = first * PIECE
    row = tl.load(sorted_rows + position).to(tl.int64)
    goes_on = tl.load(sorted_rows + position - 1, mask=position > 0, other=-1).to(tl.int64) == row
    went_on = tl.load(sorted_rows + position - PIECE - 1, mask=position > PIECE, other=-1).to(tl.int64) == row
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exist = column < D
    if goes_on & (went_on == 0):
        last = first
        beyond = (picks + PIECE - 1) // PIECE + first * 0
        for _ in range(0, STEPS):
            middle = (last + beyond) // 2
            same = tl.load(sorted_rows + middle * PIECE).to(tl.int64) == row
            last = tl.where(same, middle, last)
            beyond = tl.where(same, beyond, middle)
        target = table_sum + row * D + column
        total = tl.load(target, mask=exist, other=0.0).to(pieces.dtype.element_ty)
        for piece in range(first, last + 1):
            total += tl.load(pieces + piece * D + column, mask=exist, other=0.0)
        tl.store(target, total.to(table_sum.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["picks"])
def atomic_add_to_rows(
    rows, blocks, owners, weights, upstream, table_sum, picks,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr,
    PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``add_to_rows`` without sorting: one program per PICKS picks and stretch of columns, in any order."""
    pick = tl.program_id(0).to(tl.int64) * PICKS + tl.arange(0, PICKS)
    mine = pick < picks
    columns, exist = column_offsets(tl.program_id(1) * COLUMNS, C, DC, CORES, COLUMNS)
    mask = mine[:, None, None] & exist
    row = tl.load(rows + pick, mask=mine, other=0).to(tl.int64)
    offsets, within = core_offsets(pick, C, CORES)
    weight = tl.load(weights + offsets, mask=mine[:, None] & within, other=0.0)
    place = upstream_places(pick, owners, blocks, mine, P, E)
    part = tl.load(upstream + place[:, None, None] * (C * DC) + columns, mask=mask, other=0.0)
    added = (weight[:, :, None] * part.to(weights.dtype.element_ty)).to(table_sum.dtype.element_ty)
    tl.atomic_add(table_sum + row[:, None, None] * (C * DC) + columns, added, mask=mask, sem="relaxed")

"""Triton kernels of the table lookup: a tile of picked rows, all columns of a row in one program.

Two kernels do a whole lookup over a [T, P] grid of picks, but for the gradients of the tables:

    fused_forward    gather pre-value rows, dot with the projected input, activation, weighted sum of value rows
    row_dots         dot product of each picked row with an upstream -> [n, C]; for grids it goes on to the gradients
                     of scores and rho, and then to that of the projected input

and the parts, for grids as well as for ragged lists (what shards of a table need), are ``row_dots`` and

    row_sums         sum over a token's picks of weight * row          -> [T * E, D]
    atomic_add_to_rows   row[a] += sum over the picks of a, in any order

``triton_segments.py`` has the additions in a fixed order.

Letters: T tokens, P picks of a token, n picks in all, C cores, E virtual blocks, D columns of a table, DC = D / C. A
tile of rows is [picks, C, DC], so that core c scales its own slice without any gather of weights. Its picks are those
of TOKENS tokens, PICKS of each, one token after the other: where a token has few rows, or short ones, several tokens
keep enough bytes in flight. Tile edges (TOKENS, PICKS, CORES, COLUMNS, REST) are powers of two; what lies outside C and
DC is masked. A slice is cut in two, COLUMNS and REST (96 = 64 + 32), where one power of two would leave lanes idle;
REST is 0 where it would not.
Row ids of the next tile are requested before the present tile is used: its gathers need not wait for them.
Sums are kept in the dtype of the weights: float32, or float64 in a float64 model. Offsets are 64-bit. Sizes that a
model fixes are constexpr, so that the compiler knows the alignment of rows; the number of tokens and picks is not, and
nothing is specialised on it.
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


@triton.jit
def load_rows(table, row, mine, first, C: tl.constexpr, DC: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns ``first`` up to ``first`` + COLUMNS of the slices of each ``row``: [rows, CORES, COLUMNS]."""
    columns, exist = column_offsets(first, C, DC, CORES, COLUMNS)
    return tl.load(table + row[:, None, None] * (C * DC) + columns, mask=mine[:, None, None] & exist, other=0.0)


@triton.jit
def store_sum(
    out, place, real, total, first, C: tl.constexpr, DC: tl.constexpr,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows ``place`` [TOKENS] of ``out``, those that are ``real``: the sums over each token's picks of ``total``
    [picks, CORES, COLUMNS]."""
    columns, exist = column_offsets(first, C, DC, CORES, COLUMNS)
    summed = tl.sum(tl.reshape(total, [TOKENS, PICKS, CORES, COLUMNS]), axis=1)
    pointers = out + place[:, None, None] * (C * DC) + columns
    tl.store(pointers, summed.to(out.dtype.element_ty), mask=real[:, None, None] & exist)


@triton.jit
def tile_places(TOKENS: tl.constexpr, PICKS: tl.constexpr):
    """Of each of the TOKENS * PICKS picks of a tile: (which token of the program, which pick of that token)."""
    index = tl.arange(0, TOKENS * PICKS)
    return index // PICKS, index % PICKS


@triton.jit
def query_dots(pre, query, TOKENS: tl.constexpr, PICKS: tl.constexpr, COLUMNS: tl.constexpr):
    """[picks]: the dot product of each row of ``pre`` [picks, 1, COLUMNS] with its token's ``query``
    [TOKENS, 1, COLUMNS]."""
    if TOKENS == 1:  # fewer registers than by way of the other shape
        return tl.sum(tl.sum(pre.to(query.dtype) * query, axis=2), axis=1)
    of_tokens = tl.reshape(pre, [TOKENS, PICKS, COLUMNS]).to(query.dtype)
    return tl.reshape(tl.sum(of_tokens * query, axis=2), [TOKENS * PICKS])


@triton.jit
def load_ids(rows, blocks, pick, mine, block, E: tl.constexpr):
    """(row of each pick, which picks there are in ``block``)."""
    row = tl.load(rows + pick, mask=mine, other=0).to(tl.int64)
    if E > 1:
        mine = mine & (tl.load(blocks + pick, mask=mine, other=-1) == block)
    return row, mine


@triton.jit(do_not_specialize=["tokens"])
def fused_forward(
    rows, blocks, scores, projected, pre_values, values, out, rho_out, tokens,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, DC: tl.constexpr, GELU: tl.constexpr,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr,
    PRE_COLUMNS: tl.constexpr, PRE_REST: tl.constexpr,
):  # fmt: skip
    """One program per TOKENS tokens and block: out [T, E, C * DC] and rho before its activation, [T, P]."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    block = tl.program_id(1)
    dtype: tl.constexpr = scores.dtype.element_ty
    own = first + tl.arange(0, TOKENS)
    token, place = tile_places(TOKENS, PICKS)
    token += first
    # A program of one token has one, which the compiler must know: on sm_80, float32, it takes 20 registers less.
    real = token < tokens if TOKENS > 1 else place >= 0
    row, mine = load_ids(rows, blocks, token * P + place, real & (place < P), block, E)
    query = load_rows(projected, own, own < tokens, 0, 1, DP, 1, PRE_COLUMNS).to(dtype)
    total = tl.zeros([TOKENS * PICKS, CORES, COLUMNS], dtype=dtype)
    if PRE_REST > 0:
        query_rest = load_rows(projected, own, own < tokens, PRE_COLUMNS, 1, DP, 1, PRE_REST).to(dtype)
    if REST > 0:
        total_rest = tl.zeros([TOKENS * PICKS, CORES, REST], dtype=dtype)
    for start in range(0, P, PICKS):
        pick = token * P + start + place
        # All gathers are issued before any of them is used.
        pre = load_rows(pre_values, row, mine, 0, 1, DP, 1, PRE_COLUMNS)
        if PRE_REST > 0:
            pre_rest = load_rows(pre_values, row, mine, PRE_COLUMNS, 1, DP, 1, PRE_REST)
        value = load_rows(values, row, mine, 0, C, DC, CORES, COLUMNS)
        if REST > 0:
            value_rest = load_rows(values, row, mine, COLUMNS, C, DC, CORES, REST)
        offsets, within = core_offsets(pick, C, CORES)
        score = tl.load(scores + offsets, mask=mine[:, None] & within, other=0.0)
        later = real & (start + PICKS + place < P)
        next_row, next_mine = load_ids(rows, blocks, pick + PICKS, later, block, E)
        rho = query_dots(pre, query, TOKENS, PICKS, PRE_COLUMNS)
        if PRE_REST > 0:
            rho += query_dots(pre_rest, query_rest, TOKENS, PICKS, PRE_REST)
        tl.store(rho_out + pick, rho, mask=mine)
        weight = (score * activation_of(rho, GELU)[:, None])[:, :, None]
        total += weight * value.to(dtype)
        if REST > 0:
            total_rest += weight * value_rest.to(dtype)
        row, mine = next_row, next_mine
    store_sum(out, own * E + block, own < tokens, total, 0, C, DC, TOKENS, PICKS, CORES, COLUMNS)
    if REST > 0:
        store_sum(out, own * E + block, own < tokens, total_rest, COLUMNS, C, DC, TOKENS, PICKS, CORES, REST)


@triton.jit
def sum_of_rows(
    rows, blocks, weights, table, out, first, count, longest, own, real, block, column,
    C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rows ``own`` * E + ``block`` of ``out`` (``own`` [TOKENS], those that are ``real``), from ``column`` of every
    slice: the sums of weight * row over the picks of each token that are in ``block``.

    ``first`` and ``count``, for each pick of the tile: the first pick of its token and how many that has, at most
    ``longest``.
    """
    dtype: tl.constexpr = weights.dtype.element_ty
    _, place = tile_places(TOKENS, PICKS)
    row, mine = load_ids(rows, blocks, first + place, place < count, block, E)
    total = tl.zeros([TOKENS * PICKS, CORES, COLUMNS], dtype=dtype)
    if REST > 0:
        total_rest = tl.zeros([TOKENS * PICKS, CORES, REST], dtype=dtype)
    for start in range(0, longest, PICKS):
        pick = first + start + place
        value = load_rows(table, row, mine, column, C, DC, CORES, COLUMNS)
        if REST > 0:
            value_rest = load_rows(table, row, mine, column + COLUMNS, C, DC, CORES, REST)
        offsets, within = core_offsets(pick, C, CORES)
        weight = tl.load(weights + offsets, mask=mine[:, None] & within, other=0.0)[:, :, None]
        next_row, next_mine = load_ids(rows, blocks, pick + PICKS, start + PICKS + place < count, block, E)
        total += weight * value.to(dtype)
        if REST > 0:
            total_rest += weight * value_rest.to(dtype)
        row, mine = next_row, next_mine
    store_sum(out, own * E + block, real, total, column, C, DC, TOKENS, PICKS, CORES, COLUMNS)
    if REST > 0:
        store_sum(out, own * E + block, real, total_rest, column + COLUMNS, C, DC, TOKENS, PICKS, CORES, REST)


@triton.jit(do_not_specialize=["tokens"])
def row_sums(
    rows, blocks, starts, weights, table, out, tokens,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program per TOKENS tokens, block and stretch of columns: out [T, E, C * DC].

    Token t has the picks t * P up to (t + 1) * P, or with P = 0 ``starts[t]`` up to ``starts[t + 1]``.
    """
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    block = tl.program_id(1)
    token, _ = tile_places(TOKENS, PICKS)
    token += first_token
    real = token < tokens
    if P > 0:
        first = token * P
        count = tl.where(real, P, 0)
        longest = P
    else:
        first = tl.load(starts + token, mask=real, other=0).to(tl.int64)
        count = (tl.load(starts + token + 1, mask=real, other=0).to(tl.int64) - first).to(tl.int32)
        longest = tl.max(count, axis=0)
    own = first_token + tl.arange(0, TOKENS)
    column = tl.program_id(2) * (COLUMNS + REST)
    sum_of_rows(
        rows, blocks, weights, table, out, first, count, longest, own, own < tokens, block, column,
        C, E, DC, TOKENS, PICKS, CORES, COLUMNS, REST,
    )  # fmt: skip


@triton.jit
def slice_dots(
    table, upstream, row, from_row, mine, own, real, column, SHARED: tl.constexpr,
    C: tl.constexpr, DC: tl.constexpr, TOKENS: tl.constexpr, PICKS: tl.constexpr, CORES: tl.constexpr,
    COLUMNS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """[picks, CORES]: what columns ``column`` on of each slice add to the dot products. SHARED: all picks of a token
    have the same row of ``upstream``; ``own`` [TOKENS] are these rows, those that are ``real``."""
    value = load_rows(table, row, mine, column, C, DC, CORES, COLUMNS)
    if SHARED:
        other = load_rows(upstream, own, real, column, C, DC, CORES, COLUMNS).to(dtype)
        of_tokens = tl.reshape(value, [TOKENS, PICKS, CORES, COLUMNS]).to(dtype)
        return tl.reshape(tl.sum(of_tokens * other[:, None, :, :], axis=3), [TOKENS * PICKS, CORES])
    other = load_rows(upstream, from_row, mine, column, C, DC, CORES, COLUMNS)
    return tl.sum(value.to(dtype) * other.to(dtype), axis=2)


@triton.jit(do_not_specialize=["picks"])
def row_dots(
    rows, blocks, owners, upstream, table, dots, scores, rho_in, weights_out, rho_grad, pre_values, projected_grad,
    picks,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, DC: tl.constexpr, SCALED: tl.constexpr, GELU: tl.constexpr,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, CORES: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr,
    STRETCHED: tl.constexpr,
    DP: tl.constexpr, PRE_PICKS: tl.constexpr, PRE_COLUMNS: tl.constexpr, PRE_REST: tl.constexpr,
):  # fmt: skip
    """dots[n, c] = <table[rows[n], slice c], upstream[token, block, slice c]>, which is the gradient of the weights.

    One program per TOKENS tokens of a grid of P picks each, or, with P = 0, per PICKS picks of a list with ``owners``
    [n]; TOKENS is 1 then.
    SCALED (grids only): the weights are score * activation(rho), so ``dots`` becomes the gradient of ``scores``
    [n, C], and the weights [n, C] and the gradient of rho [n] are written as well. With DP > 0 the program goes on to
    the gradient of the projected input, [T, DP], the sum of the gradients of rho times rows of ``pre_values``.
    STRETCHED (not SCALED): a program takes the columns of one tile only, and ``dots`` is [stretches, n, C].
    """
    first = tl.program_id(0).to(tl.int64) * TOKENS
    dtype: tl.constexpr = dots.dtype.element_ty
    WIDTH: tl.constexpr = COLUMNS + REST if STRETCHED else DC
    first_column = 0
    if STRETCHED:
        first_column = tl.program_id(1) * WIDTH
        dots += tl.program_id(1) * picks.to(tl.int64) * C
    SPAN: tl.constexpr = P if P > 0 else PICKS
    token, place = tile_places(TOKENS, PICKS)
    token += first
    own = first + tl.arange(0, TOKENS)
    real = own * SPAN < picks
    row, mine = load_ids(rows, blocks, token * SPAN + place, (place < SPAN) & (token * SPAN + place < picks), 0, 1)
    for start in range(0, SPAN, PICKS):
        pick = token * SPAN + start + place
        if P == 0:
            from_row = tl.load(owners + pick, mask=mine, other=0).to(tl.int64) * E
        else:
            from_row = token * E
        if E > 1:
            from_row += tl.load(blocks + pick, mask=mine, other=0)
        dot = tl.zeros([TOKENS * PICKS, CORES], dtype=dtype)
        for offset in range(0, WIDTH, COLUMNS + REST):
            column = first_column + offset
            dot += slice_dots(
                table, upstream, row, from_row, mine, own, real, column, P > 0 and E == 1,
                C, DC, TOKENS, PICKS, CORES, COLUMNS, dtype,
            )  # fmt: skip
            if REST > 0:
                dot += slice_dots(
                    table, upstream, row, from_row, mine, own, real, column + COLUMNS, P > 0 and E == 1,
                    C, DC, TOKENS, PICKS, CORES, REST, dtype,
                )  # fmt: skip
        offsets, within = core_offsets(pick, C, CORES)
        within = mine[:, None] & within
        later = start + PICKS + place
        next_row, next_mine = load_ids(rows, blocks, pick + PICKS, (later < SPAN) & (pick + PICKS < picks), 0, 1)
        if SCALED:
            score = tl.load(scores + offsets, mask=within, other=0.0)
            rho = tl.load(rho_in + pick, mask=mine, other=0.0)
            active = activation_of(rho, GELU)[:, None]
            tl.store(weights_out + offsets, score * active, mask=within)
            tl.store(rho_grad + pick, tl.sum(dot * score, axis=1) * activation_slope(rho, GELU), mask=mine)
            dot *= active
        tl.store(dots + offsets, dot, mask=within)
        row, mine = next_row, next_mine
    if DP > 0:
        # By way of memory, and not in the loop above, where both sums would share a layout of registers and spill.
        tl.debug_barrier()
        pre_token, _ = tile_places(TOKENS, PRE_PICKS)
        pre_first = (first + pre_token) * P
        count = tl.where(pre_first < picks, P, 0)
        for column in range(0, DP, PRE_COLUMNS + PRE_REST):
            sum_of_rows(
                rows, blocks, rho_grad, pre_values, projected_grad, pre_first, count, P, own, real, 0, column,
                1, 1, DP, TOKENS, PRE_PICKS, 1, PRE_COLUMNS, PRE_REST,
            )  # fmt: skip


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

"""Bytes that a rank's operations read and write in its device's memory, beside the operands of matrix products.

A product's operands belong to its own time (``Device.flops_efficiency`` is that of whole products). What is left:

    lookup        picked rows of the tables and their gradients, as each backend's kernels move them
    key scores    [2, R, T, h, N]: too large for a cache, so that every pass over them goes to memory
    elementwise   norms, rotation, attention's operands, the FFN's activation, additions to the residual stream
    accumulation  a dense weight's gradient, written by its product and added to the buffer of DDP
    loss          passes over the logits

``tests/unit/planning/test_device_bytes.py`` compares the lookup of ``triton`` with what its kernels load and store in
the interpreter, and the passes over the key scores and the logits with the operations that PyTorch runs.

Letters: T tokens that a rank looks up, n picks that reach its tables, D columns of its part of both tables, C cores,
s bytes of a weight, g of an element of the gradient buffer.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape

FP32 = 4
INT32 = 4
INT64 = 8
# A radix sort of keys of 4 bytes with places of 8, 8 bits in a pass, read and written: an assumption.
SORT_BYTES = 4 * 2 * (INT32 + INT64)
# Passes over each element of a norm's input, forward and backward, by bytes of a weight: PyTorch's operations on a CPU
# (norms of queries and keys where retrieval is not one piece), of which those of a 16-bit run work on float32 copies
# (in passes of 2 bytes); compiled ones.
LOCAL_NORM = {4: (7.0, 23.0), 2: (20.5, 52.5)}
FUSED_NORM = (2.0, 3.0)
# Picks of one row that a program sums, ``ops/triton_launch.py``; the sums of further ones are written and read.
PIECE = 128
# Of ``ops/triton_launch.py``, too: picks per row, and bytes of a slice, from which on columns are read in turn.
REUSED = 2
LEAST_BYTES = 64


@dataclass(frozen=True)
class Moved:
    """Bytes read and written for one micro-batch. ``rows``: at random places, a row of a table at a time;
    ``streamed``: everything else; ``cached``: rows that a cache of the device has, which no memory moves."""

    rows_forward: float = 0.0
    rows_backward: float = 0.0
    streamed_forward: float = 0.0
    streamed_backward: float = 0.0
    cached_forward: float = 0.0
    cached_backward: float = 0.0

    def times(self, number: float) -> Moved:
        """So often."""
        return Moved(*(number * each for each in dataclasses.astuple(self)))

    def __add__(self, other: Moved) -> Moved:
        return Moved(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def forward(self) -> float:
        """Everything that memory moves in the forward."""
        return self.rows_forward + self.streamed_forward

    @property
    def backward(self) -> float:
        """Everything that memory moves in the backward."""
        return self.rows_backward + self.streamed_backward


# -- memory layer ----------------------------------------------------------------------------------------------------


def memory_layer(memory: MemoryConfig, layout: Layout, tokens: int, cache: float = math.inf) -> Moved:
    """One memory layer for ``tokens`` tokens of each rank: lookup and key scores; ``cache`` as for ``lookup``."""
    return lookup(memory, layout, tokens, cache) + retrieval(memory, layout, tokens)


def lookup(memory: MemoryConfig, layout: Layout, tokens: int, cache: float = math.inf) -> Moved:
    """The lookup of one layer, when ``tokens`` tokens of every rank pick rows at random.

    Picks of the memory-parallel group's M ranks reach a rank's tables: all of them by column, an Mth by row.
    ``cache``: bytes that a cache of the device keeps of what is read again (``Device.cache_bytes``).
    """
    served = layout.memory_size * tokens
    by_column = layout.memory_size if layout.memory_mode == "dim" else 1
    share = 1 / by_column
    picks = by_column * tokens * memory.num_heads * memory.topk
    held = memory.window_rows / (layout.memory_size if layout.memory_mode == "row" else 1)
    pre, values = memory.pre_value_dim * share, memory.value_dim * share
    backend = layout.lookup
    if backend == "triton":
        parts = layout.exchange_parts  # each reads and writes the gradients of its own distinct rows
        return by_triton(memory, layout, picks / parts, served / parts, held, pre, values, cache).times(parts)
    if backend == "cpu":
        return _by_cpu_kernels(layout, picks, pre + values)
    return _by_torch(layout, picks, pre, values)


def distinct_rows(rows: float, picks: float) -> float:
    """Expected number of different rows among ``picks`` picks that fall on ``rows`` rows at random."""
    return -rows * math.expm1(picks * math.log1p(-1 / rows)) if rows > 1 else min(rows, picks)


def by_triton(
    memory: MemoryConfig, layout: Layout, picks: float, served: float, held: float, pre: float, values: float,
    cache: float = math.inf,
) -> Moved:  # fmt: skip
    """Rows once in the forward and once in the backward; the gradient of each distinct row read and written once.

    A shard's kernels read in the backward a row of values once for all of its picks (``ops/triton_segments.py``), and
    take columns of all rows that fit ``cache`` one after the other (``ops/triton_launch.cached_columns``), where picks
    come back to rows.

    The tokens' own vectors (projected input, gradient of the output) are read once in the order of tokens, and once
    more for every pick, in the order of rows, by the sum of gradients. The latter comes from memory where the vectors
    of all ``served`` tokens are more than ``cache``: by row M ranks send whole vectors, M * T of them.
    """
    size, cores = layout.weight_bytes, memory.num_cores
    sharded = layout.memory_size > 1
    rows = distinct_rows(held, picks)
    added = 2 * layout.grad_bytes * (pre + values) * rows
    projected, output = served * pre * size, served * memory.num_blocks * values * size
    shares = (_missed(projected, cache), _missed(output, cache))
    missed = picks * size * (pre * shares[0] + values * shares[1])
    small, lists = _triton_lists(cores, sharded and layout.memory_mode == "row", picks, pre + values)
    if not sharded:
        read = picks * (pre + values) * size
        return Moved(read, read + added + missed, small + projected + output, lists + 2 * projected + output)
    pre_tiles = _stretches(held, 1, pre, size, picks, cache)
    tiles = _stretches(held, cores, values, size, picks, cache)
    from_pre = (rows * pre * size, picks * pre * size) if pre_tiles else (picks * pre * size, 0.0)
    from_values = (rows * values * size, picks * values * size) if tiles else (picks * values * size, 0.0)
    # every further stretch reads row ids and weights, or owners, again, and writes further dot products
    again = picks * (max(0, pre_tiles - 1) * (2 * INT64 + FP32) + max(0, tiles - 1) * (INT64 + cores * FP32))
    if memory.backward == "ordered":  # one kernel reads a row and the outputs' gradients of its picks
        by_dots, vectors = (rows * values * size, 0.0), (1 - shares[1]) * output
    else:
        by_dots, vectors = from_values, output
    vectors += (2 - shares[0]) * projected  # its gradient is written
    return Moved(
        rows_forward=from_pre[0] + from_values[0],
        rows_backward=from_pre[0] + by_dots[0] + added + missed,
        streamed_forward=small + projected + output + again,
        streamed_backward=lists + vectors + picks * max(0, pre_tiles - 1) * (INT64 + FP32),
        cached_forward=from_pre[1] + from_values[1],
        cached_backward=from_pre[1] + by_dots[1],
    )


def _stretches(held: float, cores: int, width: float, size: int, picks: float, cache: float) -> int:
    """Stretches of columns in which ``held`` rows are read so that each fits ``cache``; 0: not by way of the cache.
    ``ops/triton_launch.cached_columns`` in arithmetic."""
    whole = held * width * size
    if picks < REUSED * held or not whole:
        return 0
    if whole <= cache:
        return 1
    columns = 2 ** math.floor(math.log2(max(1.0, cache / (held * cores * size))))
    return math.ceil(width / cores / columns) if columns * size >= LEAST_BYTES else 0


def _missed(held: float, cache: float) -> float:
    """Share of reads at random places among ``held`` bytes that a cache does not serve."""
    return max(0.0, 1 - cache / held) if held else 0.0


def _triton_lists(cores: int, listed: bool, picks: float, columns: float) -> tuple[float, float]:
    """Forward and backward: row ids, scores, rho and their gradients, places and ends of the segments of equal rows.

    Of a grid of picks by fused kernels; of a list (tables by row) by one kernel for each table, with the owner of each
    pick, and PyTorch's products of scores and rho between them.
    """
    scores, ids = cores * FP32, INT64
    if not listed:
        return picks * (ids + scores + FP32), picks * (2 * ids + 3 * (scores + FP32) + 47 + scores + SORT_BYTES)
    scaled = 2 * scores + FP32  # scores times rho: read, read, written
    forward = 2 * ids + FP32 + ids + scores + scaled
    dots = scores + (ids + FP32)
    added = 2 * (2 * ids) + scores + FP32 + 3 * INT32
    pieces = 2 * FP32 * columns / PIECE
    products = 2 * scaled + 4 * scores + FP32
    return picks * forward, picks * (dots + added + pieces + 9 + products + SORT_BYTES)


def _by_cpu_kernels(layout: Layout, picks: float, columns: float) -> Moved:
    """Rows once each way; the thread that owns a row adds each of its picks as it comes."""
    read = picks * columns * layout.weight_bytes
    return Moved(read, read + picks * columns * 2 * layout.grad_bytes)


def _by_torch(layout: Layout, picks: float, pre: float, values: float) -> Moved:
    """Rows are copied out for the products; their gradients are written in float32, read, and added to the buffer."""
    size = layout.weight_bytes
    copied = 3 * size  # read, written, read by the product
    forward = picks * (pre * copied + values * size)  # the weighted sum reads rows in place
    written = 2 * FP32 + (0 if layout.grad_bytes == FP32 else FP32 + layout.grad_bytes)
    backward = picks * (pre + values) * (copied + written + 2 * layout.grad_bytes)
    return Moved(picks * (pre + values) * size, picks * (pre + values) * (size + 2 * layout.grad_bytes),
                 forward - picks * (pre + values) * size,
                 backward - picks * (pre + values) * (size + 2 * layout.grad_bytes))  # fmt: skip


def retrieval(memory: MemoryConfig, layout: Layout, tokens: int) -> Moved:
    """Key scores, and the norms of queries and keys; the backward computes the norms again, and copies their gradients
    to the order of the parameters. In one piece (float32 on a CPU) queries are read once, and three times backward."""
    size = layout.weight_bytes
    if _in_one_piece(memory, layout):
        queries = tokens * memory.query_rows * size
        return Moved(streamed_forward=queries, streamed_backward=3.0 * queries)
    forward, backward = FUSED_NORM if layout.engine else LOCAL_NORM[size]
    queries = tokens * memory.query_rows if memory.qk_norm != "none" else 0
    keys = 2 * memory.num_heads * memory.scored_keys * memory.key_dim * memory.tucker_rank
    keys = keys if memory.qk_norm == "both" else 0
    norms = Moved(
        streamed_forward=(queries * forward + keys * (forward + 2)) * size,
        streamed_backward=(queries * (forward + backward + 2) + keys * (forward + backward + 4)) * size,
    )
    return norms + key_scores(memory, layout, tokens)


def _in_one_piece(memory: MemoryConfig, layout: Layout) -> bool:
    return layout.retrieves_in_one_piece and memory.scoring != "additive" and memory.balance_loss_coeff == 0


def key_scores(memory: MemoryConfig, layout: Layout, tokens: int) -> Moved:
    """Passes over the scores of all keys; none in one piece.

    Forward: the product writes them in the weights' precision, a 16-bit run copies them to float32 unless the search
    is Triton's, the search reads them; PyTorch's also writes and reads its sums over ranks. Backward: zeros with the
    gradients of the picked ones in float32, in a 16-bit run a copy, and two products that read it.
    """
    if _in_one_piece(memory, layout):
        return Moved()
    size = layout.weight_bytes
    elements = 2 * memory.tucker_rank * tokens * memory.num_heads * memory.scored_keys
    converted = 0 if size == FP32 else size + FP32
    summed = 2 * FP32 / memory.tucker_rank if layout.lookup == "scatter" and memory.scoring != "additive" else 0.0
    read = size if layout.lookup == "triton" else converted + FP32 + summed
    forward = elements * (size + read)
    backward = elements * (FP32 + converted + 2 * size)
    return Moved(streamed_forward=forward, streamed_backward=backward)


# -- the rest of a block ---------------------------------------------------------------------------------------------


def block(shape: ModelShape, layout: Layout, seq_length: int) -> Moved:
    """Norms, rotation, attention's operands, activation and residual additions of one block; its memory layer not.

    Transformer Engine's operations, fused ones and those of one pass on a CPU read their inputs and write their outputs
    once.
    """
    size = layout.weight_bytes
    tokens = layout.tokens(seq_length) / layout.tp
    resident = layout.resident_tokens(seq_length)
    group = layout.tokens(seq_length)
    hidden = resident * shape.hidden_size
    query, keys = (group * width / layout.tp for width in (shape.query_size, shape.key_value_size))
    inner = tokens * shape.ffn_hidden_size
    norms = 2 * hidden + (query + keys if shape.qk_norm else 0)
    once, again = FUSED_NORM
    forward = once * norms + 6 * hidden + 4 * (query + keys)
    backward = again * norms + 6 * hidden + 6 * (query + keys)
    if not layout.engine:
        backward += 2 * (query + 2 * keys)  # gradients of queries, keys and values, put together
    if shape.gated:
        # silu 2, the other half plus an offset 2, their product 3
        one = layout.fused_activation or layout.one_pass
        forward += (3 if one else 7) * inner
        backward += (5 if one else 13) * inner
    else:
        forward, backward = forward + 2 * inner, backward + 3 * inner
    return Moved(streamed_forward=forward * size, streamed_backward=backward * size)


def loss(shape: ModelShape, layout: Layout, seq_length: int) -> Moved:
    """megatron-core's cross entropy over logits [T, V / TP]; the backward scales the probabilities that are kept.

    Plain: a float32 copy, the largest, differences, exponentials, their sum and the quotients. "native" fuses
    differences, exponentials and sum; Transformer Engine's kernel reads the logits twice and writes their gradient.
    """
    size = layout.weight_bytes
    logits = layout.tokens(seq_length) * shape.vocab_size / layout.tp
    copied = 0 if size == FP32 else size + FP32
    if layout.fused_loss == "te":
        return Moved(streamed_forward=logits * 3 * size, streamed_backward=logits * 2 * size)
    passes = 8 if layout.fused_loss is None else 5  # max 1, subtract 2, exponential 2, sum 1, divide 2
    return Moved(streamed_forward=logits * (copied + passes * FP32), streamed_backward=logits * (2 * FP32 + copied))


def accumulation(parameters: float, layout: Layout, fused: float = 0.0) -> Moved:
    """Gradients of ``parameters`` dense weights, written by the products, read, and added to the buffer.

    ``fused``: how many of them belong to linear layers of megatron-core, whose products add to the buffer themselves
    with --gradient-accumulation-fusion; those of memory layers, norms and embeddings do not.
    """
    fused = min(fused, parameters) if layout.fused_accumulation else 0.0
    moved = (parameters - fused) * (2 * layout.weight_bytes + 2 * layout.grad_bytes)
    return Moved(streamed_backward=moved + fused * 2 * layout.grad_bytes)

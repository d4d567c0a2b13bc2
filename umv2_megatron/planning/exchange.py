"""Bytes that the ranks of a memory-parallel group send each other, step by step, equal to what ``parallel/exchange.py``
counts.

Letters: T tokens of one rank, P = h * K picks of a token, C cores, C' slices of a rank's columns that lie in one core
each (``TableShard.cores``), E virtual blocks, M ranks, s bytes of a weight, f of a score (4), i of a pick.

    dim  forward   rows (M-1) T P i; projected (M-1) T Dp/M s; pre_scores (M-1) T P f; weights (M-1) T P C' f;
                   output (M-1) T E Dv/M s
         backward  output_grad as output; weight_grads as weights; rho_grads as pre_scores; projected_grad as projected
    row  forward   pick_counts (M-1) T 4; rows n i; scores n C f; projected (M-1) T Dp s; output (M-1) T E Dv s
         backward  output_grad as output; score_grads r C f; projected_grad as projected

n picks go to other ranks and r come from them; both are T P (M-1)/M when picks fall evenly.
"""

from __future__ import annotations

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard

SCORE_BYTES = 4
FORWARD = ("pick_counts", "rows", "scores", "projected", "pre_scores", "weights", "output")
# Under way while the FFN of the same block computes: its forward, or its backward.
OVERLAPPED = ("pick_counts", "rows", "scores", "score_grads")
# Under way while keys are scored and searched, forward or backward, and, what is left of them, beside the FFN.
EARLY = ("projected", "projected_grad")
# Sent at once, whatever --memory-exchange-parts is.
WHOLE = ("pick_counts",)


def exchange_bytes(
    memory: MemoryConfig,
    mode: str,
    size: int,
    tokens: int,
    rows: int,
    weight_bytes: int,
    sent_picks: float | None = None,
    received_picks: float | None = None,
) -> dict[str, float]:
    """Bytes that one rank sends to others for one memory layer and micro-batch, by step, forward and backward.

    Args:
        memory: sizes of the layer.
        mode, size: "dim" or "row", and M; with M = 1 nothing is sent.
        tokens: T.
        rows: A, of the whole table.
        weight_bytes: s.
        sent_picks, received_picks: n and r of row mode; None for their expectation.
    """
    if size == 1:
        return {}
    others, picks, blocks = size - 1, memory.num_heads * memory.topk, memory.num_blocks
    pre, value = memory.pre_value_dim, memory.value_dim
    sent: dict[str, float] = {}
    if mode == "dim":
        columns = len(TableShard("dim", size, 0).cores(value, memory.num_cores))
        sent["rows"] = others * tokens * picks * _index_bytes(rows * blocks)
        sent["weights"] = sent["weight_grads"] = others * tokens * picks * columns * SCORE_BYTES
        if memory.hashes:  # whose scores are ones
            del sent["weight_grads"]
        sent["output"] = sent["output_grad"] = others * tokens * blocks * value // size * weight_bytes
        if pre:
            sent["projected"] = sent["projected_grad"] = others * tokens * pre // size * weight_bytes
            sent["pre_scores"] = sent["rho_grads"] = others * tokens * picks * SCORE_BYTES
        return sent
    expected = tokens * picks * others / size
    sent_picks = expected if sent_picks is None else sent_picks
    received_picks = expected if received_picks is None else received_picks
    sent["pick_counts"] = others * tokens * 4
    sent["rows"] = sent_picks * _index_bytes(-(-rows // size) * blocks)
    sent["scores"] = sent_picks * memory.num_cores * SCORE_BYTES
    if not memory.hashes:  # whose scores are ones
        sent["score_grads"] = received_picks * memory.num_cores * SCORE_BYTES
    sent["output"] = sent["output_grad"] = others * tokens * blocks * value * weight_bytes
    if pre:
        sent["projected"] = sent["projected_grad"] = others * tokens * pre * weight_bytes
    return sent


def _index_bytes(cells: int) -> int:
    """Bytes of a pick as it travels: int32 where that can number all cells."""
    return 4 if cells <= 2**31 else 8

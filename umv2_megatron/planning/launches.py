"""Operations that a rank starts in a step, for machines on which starting them takes longer than running them.

Counted by ``benchmarks/kernel_bytes.py --only ops`` on umv2-227m with megatron-core's own layers and without fusions:
non-view operations and kernels of one block, forward and backward; a sort counts as one. Fused operations, Transformer
Engine's modules and tensor parallelism change the dense count by a few; captured blocks (--cuda-graph-impl) are started
with one operation in each direction. tests/unit/ops/test_kernel_bytes.py holds DENSE_BLOCK, MEMORY_LAYER of
"scatter" and "triton", AROUND and FORWARD_SHARE to the counts. EXCHANGE and PART were counted once, on two gloo ranks
with "scatter", and no test holds them.
"""

from __future__ import annotations

from umv2_megatron.planning.layout import Layout

DENSE_BLOCK = 80
MEMORY_LAYER = {"scatter": 101, "triton": 63, "cpu": 57}
"""Beyond the dense block, by ``Layout.lookup``."""
EXCHANGE = {"dim": 19, "row": 51}
"""Beyond these where a layer's tables are sharded: collectives, and what puts their buffers in order."""
PART = 60
"""And for each further one of --memory-exchange-parts, with its lookup."""
AROUND = 60
"""Embedding, final norm, logits and loss of a micro-batch."""
FORWARD_SHARE = 0.45
"""Of a block's operations: 0.47 without a memory layer and with "scatter", 0.43 with "triton"."""


def micro_batch_launches(layout: Layout, blocks: int, memory_layers: int) -> float:
    """Operations started for one micro-batch on a rank with so many blocks, of which some have a memory layer."""
    if layout.graphs:
        return 2 * blocks + AROUND
    layer = MEMORY_LAYER[layout.lookup if layout.lookup in MEMORY_LAYER else "scatter"]
    if layout.memory_size > 1:
        layer += EXCHANGE[layout.memory_mode] + PART * (layout.exchange_parts - 1)
    return blocks * DENSE_BLOCK + memory_layers * layer + AROUND

"""FLOPs of Muon's iterations in one step of a rank: products only."""

from __future__ import annotations

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.rank_parameters import Parameter, chunk_parameters
from umv2_megatron.planning.state_bytes import dealt_out, learns


def muon_flops(shape: ModelShape, memory: MemoryConfig | None, layout: Layout, stage: int) -> float:
    """Of a rank of pipeline stage ``stage``, with dist_muon of the one that has the most; 0 with Adam.

    A matrix of m rows and n >= m columns (or turned) has X X^T, its square and B X in each step: 2 m^2 (2 n + m)
    operations. Of a matrix that tensor parallelism splits a rank computes its part (blockwise), all (duplicated), or a
    part of the products and all of the squares (distributed). The fused projection counts as three matrices.
    """
    if not layout.muon:
        return 0.0
    parameters = [
        each
        for chunk in range(layout.chunks)
        for each in chunk_parameters(shape, memory, layout, stage, chunk, layout.memory_size - 1)
        if learns(each, layout)
    ]
    dense = [each for each in parameters if not each.is_table]
    shares = dealt_out(dense, layout.dense_replicas) if layout.dealt else [dense]
    steps = [sum(_step(each, shape, layout) for each in share if each.is_matrix) for share in shares]
    return layout.muon_steps * max(steps)


def _step(matrix: Parameter, shape: ModelShape, layout: Layout) -> float:
    columns = matrix.elements // matrix.rows
    parts = [matrix.rows]
    if matrix.name.endswith("linear_qkv.weight"):
        keys = shape.key_value_size // layout.tp
        parts = [matrix.rows - 2 * keys, keys, keys]
    is_split = matrix.split and layout.tp > 1
    total = 0.0
    for rows in parts:
        smaller, larger = sorted((rows, columns))
        if is_split and layout.muon_tp_mode == "duplicated":
            tall, wide = (1, layout.tp) if _by_columns(matrix) else (layout.tp, 1)
            smaller, larger = sorted((rows * tall, columns * wide))
        elif is_split and layout.muon_tp_mode == "distributed":  # the side that is not split, however long
            smaller, larger = (rows, columns) if _by_columns(matrix) else (columns, rows)
        total += 2.0 * smaller**2 * (2 * larger + smaller)
    return total


def _by_columns(matrix: Parameter) -> bool:
    """Whether tensor parallelism splits the columns: those of the second of two linear layers."""
    return matrix.name.endswith(("linear_proj.weight", "linear_fc2.weight"))

"""Bytes that one rank sends in collectives other than the exchanges of the memory layers.

An all-gather or reduce-scatter of n bytes over g ranks sends (g-1)/g n from each, an all-reduce twice that.

    tensor parallel   4 per block forward and 6 backward of the hidden state (all-gather or reduce-scatter around each
                      pair of linear layers; the backward gathers the inputs again), 2 of the latter beside a product.
                      Without sequence parallelism 2 all-reduces each way, and the memory layer's output and its
                      gradient gathered, because tensor-parallel ranks share the tokens of a memory layer out
    context parallel  keys and values to the others, their gradients back
    pipeline          hidden state to the next stage, its gradient to the one before
    data parallel     gradients: all-reduce, or reduce-scatter and then an all-gather of weights (distributed optimizer)
"""

from __future__ import annotations

from dataclasses import dataclass

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.state_bytes import StateBytes


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends. Per block and micro-batch: ``tensor_forward``, ``tensor_backward`` (of it
    ``tensor_hidden`` beside a product; of either ``tensor_reduced`` in all-reduces), ``context`` (each way). Per
    virtual stage and micro-batch: ``pipeline`` (each way). Per step: ``dense_gradients``, ``table_gradients``,
    ``dense_weights``, ``table_weights``."""

    tensor_forward: float
    tensor_backward: float
    tensor_hidden: float
    tensor_reduced: float
    context: float
    pipeline: float
    dense_gradients: float
    table_gradients: float
    dense_weights: float
    table_weights: float


def traffic(shape: ModelShape, memory: MemoryConfig | None, layout: Layout, state: StateBytes) -> Traffic:
    """What a rank that holds ``state`` sends; see ``Traffic``."""
    tokens, size = layout.tokens(shape.seq_length), layout.weight_bytes
    hidden = _share(layout.tp) * tokens * shape.hidden_size * size
    forward, backward, beside = (4 * hidden, 6 * hidden, 2 * hidden)
    if not layout.sequence_parallel:
        shared_out = hidden if memory is not None else 0.0
        if shape.ngrams is not None:  # whose layers are in few blocks
            shared_out += hidden * sum(shape.ngrams.memory_layers(shape.num_layers)) / shape.num_layers
        forward, backward, beside = 4 * hidden + shared_out, 4 * hidden + shared_out, 0.0
    keys = 2 * tokens * shape.key_value_size // layout.tp * size
    reduced = 1 if layout.distributed_optimizer else 2
    dense, tables = _share(layout.dense_replicas), _share(layout.table_replicas)
    gathered = 1 if layout.distributed_optimizer or layout.dealt else 0
    return Traffic(
        tensor_forward=forward,
        tensor_backward=backward,
        tensor_hidden=beside,
        tensor_reduced=0.0 if layout.sequence_parallel else 4 * hidden,
        context=(layout.cp - 1) * keys,
        pipeline=layout.resident_tokens(shape.seq_length) * shape.hidden_size * size if layout.pp > 1 else 0,
        dense_gradients=reduced * dense * (state.gradients - state.table_gradients),
        table_gradients=reduced * tables * state.table_gradients,
        dense_weights=gathered * dense * (state.weights - state.table_weights),
        table_weights=gathered * tables * state.table_weights,
    )


def _share(ranks: int) -> float:
    """(g-1)/g."""
    return (ranks - 1) / ranks

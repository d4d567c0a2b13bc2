"""Floating-point operations per token, by part of the block.

Counted as Megatron-LM counts: a multiply-add is 2 operations, only sums of products count (no norms, activations,
softmax or top-k comparisons), causal attention sees half the sequence on average, training costs 3 forward passes, and
recomputation does not count. The log's TFLOP/s come from ``training_flops``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.parameters import memory_in_use


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward operations per token, summed over all blocks; ``logits`` is the output matrix.

    ``memory_projections``: Wq, Wp, Wg, Wv. ``memory_scoring``: queries against all keys, and the first stage's sums
    over ranks. ``memory_grid``: the K x K grid. ``memory_lookup``: pre-value products and the weighted sum of rows; of
    n-grams, the gate's product and the convolution.
    """

    attention_projections: int
    attention_scores: int
    ffn: int
    memory_projections: int
    memory_scoring: int
    memory_grid: int
    memory_lookup: int
    logits: int

    @property
    def memory(self) -> int:
        """All operations of the memory layers."""
        return self.memory_projections + self.memory_scoring + self.memory_grid + self.memory_lookup

    @property
    def blocks(self) -> int:
        """All operations of the blocks; everything but the logits."""
        return self.attention_projections + self.attention_scores + self.ffn + self.memory

    @property
    def memory_share(self) -> float:
        """Share of the blocks' operations that the memory layers take, 0 to 1 (the paper aims at 0.17)."""
        return self.memory / self.blocks

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.blocks + self.logits

    @property
    def training(self) -> int:
        """Forward and backward: 3 forward passes."""
        return 3 * self.forward

    @property
    def training_of_memory(self) -> int:
        """The same where memory layers alone learn: outputs, gradients of inputs, and those of the layers' weights."""
        return 2 * self.forward + self.memory

    @property
    def training_of_tables(self) -> int:
        """The same where rows of their tables alone learn."""
        return 2 * self.forward + self.memory_lookup

    def training_of(self, trainable: str) -> int:
        """Forward and backward with --trainable all, memory or rows."""
        others = {"memory": self.training_of_memory, "rows": self.training_of_tables}
        return others.get(trainable, self.training)


def flops_per_token(model_fields: Mapping[str, Any], memory_config: MemoryConfig | None) -> FlopsPerToken:
    """Operations per token in sequences of --seq-length tokens; arguments and errors as ``count_parameters``."""
    shape = ModelShape.from_fields(model_fields)
    memory_config = memory_in_use(model_fields, memory_config)
    layers, hidden = shape.num_layers, shape.hidden_size
    projections = hidden * (shape.query_size + 2 * shape.key_value_size) + shape.query_size * hidden
    memory = [0, 0, 0, 0]
    for family in shape.families(memory_config):
        count = sum(family.memory_layers(layers))
        memory = [total + count * part for total, part in zip(memory, memory_layer_flops(family, hidden))]
    return FlopsPerToken(
        attention_projections=layers * 2 * projections,
        # two products (scores, weighted values) of 2 * S/2 operations per channel
        attention_scores=layers * 2 * shape.seq_length * shape.query_size,
        ffn=layers * _ffn(shape),
        memory_projections=memory[0],
        memory_scoring=memory[1],
        memory_grid=memory[2],
        memory_lookup=memory[3],
        logits=2 * hidden * shape.vocab_size,
    )


def training_flops(model_fields: Mapping[str, Any], memory_config: MemoryConfig | None, tokens: int) -> int:
    """Operations that training on ``tokens`` tokens takes, forward and backward, over all ranks together."""
    return flops_per_token(model_fields, memory_config).training * tokens


def _ffn(shape: ModelShape) -> int:
    """One block's FFN; or its router, the experts that a token goes to, and the shared expert with its gate."""
    matrices = 3 if shape.gated else 2
    if not shape.num_experts:
        return 2 * shape.hidden_size * shape.ffn_hidden_size * matrices
    used = shape.experts_per_token * shape.expert_hidden_size + shape.shared_expert_hidden_size
    routed = shape.num_experts + (1 if shape.shared_expert_gate else 0)
    return 2 * shape.hidden_size * (used * matrices + routed)


def memory_layer_flops(m: MemoryConfig, hidden: int) -> tuple[int, int, int, int]:
    """One layer's projections, scoring, grid and lookup (steps 1-7 of docs/memory-layer.md), per token, forward."""
    heads, ranks, cores, kept = m.num_heads, m.tucker_rank, m.num_cores, m.key_topk
    value_rows = 0 if m.value_expansion == "none" else m.summed_dim
    pre_value_rows = m.pre_value_dim if m.has_pre_projection else 0
    projections = 2 * hidden * (m.query_rows + pre_value_rows + m.gate_rows + value_rows)
    if m.hashes:  # rows are joined as they are
        return projections, 0, 0, 2 * hidden * (1 + m.conv_kernel)
    lookup = heads * m.topk * 2 * (m.pre_value_dim + m.value_dim)
    if m.scoring == "additive":  # <q, key> per head, side and key; the sums of two scores are no products
        return projections, heads * 2 * m.scored_keys * 2 * m.key_dim, 0, lookup
    # <q, key> per head, side, key and rank, then the sums over ranks with u and t
    scoring = heads * 2 * m.scored_keys * ranks * (2 * m.key_dim + 2)
    # Srow C: [kept, R] x [R, R]; times Scol^T: [kept, R] x [R, kept]; for each core
    grid = heads * cores * (2 * kept * ranks**2 + 2 * kept**2 * ranks)
    return projections, scoring, grid, lookup

"""How many parameters a model has, by kind and by block.

Counts follow the modules one to one, so they are equal to what the built model holds: megatron-core's embedding,
attention, FFN and norms, and of each memory layer the parts listed in docs/planning.md (arXiv 2508.18756, section 3).
Buffers (the row shuffle, the singular vectors) are no parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning.model_shape import ModelShape


@dataclass(frozen=True)
class MemoryCount:
    """Parameters of one memory layer outside its table, by part, and the sizes of the table it brings."""

    query_projection: int
    keys: int
    gains: int
    cores: int
    pre_value_projection: int
    gate_projection: int
    value_projection: int
    table: int
    picked: int
    convolution: int = 0

    @property
    def dense(self) -> int:
        """All parts outside the table; every token uses all of them."""
        return (self.query_projection + self.keys + self.gains + self.cores + self.pre_value_projection
                + self.gate_projection + self.value_projection + self.convolution)

    @classmethod
    def of(cls, memory_config: MemoryConfig, hidden_size: int) -> MemoryCount:
        """Wq [2*Dk times R, h or 1, H], keys [h, 2, N, Dk, R], gains 2 x [Dk], cores [C, h, R, R], Wp [Dp, H],
        Wg [Dv*E, H], Wv [H, Dv*E]; which of them there are is a matter of the switches. Of n-grams: Wk (in the place of
        Wg) and Wv [H, Dv*E], gains 2 x [H], and the convolution's gain and taps, [H] and [H, taps].

        ``table``: the N*N rows of Dp + Dv that a layer brings, whichever layers share them. ``picked``: values in the
        h*K rows that one token reads.
        """
        m = memory_config
        row = m.pre_value_dim + m.value_dim
        return cls(
            query_projection=m.query_rows * hidden_size,
            keys=m.num_heads * 2 * m.scored_keys * m.key_dim * m.tucker_rank,
            gains=2 * hidden_size if m.hashes else m.norm_gains,
            cores=m.core_parameters,
            pre_value_projection=m.pre_value_dim * hidden_size if m.has_pre_projection else 0,
            gate_projection=m.gate_rows * hidden_size,
            value_projection=0 if m.value_expansion == "none" else hidden_size * m.summed_dim,
            table=m.rows_per_layer * row,
            picked=m.num_heads * m.topk * row,
            convolution=hidden_size * (1 + m.conv_kernel) if m.hashes and m.conv_kernel else 0,
        )


@dataclass(frozen=True)
class BlockCount:
    """Parameters of one block. ``memory`` is None in a block without a memory layer, ``ngrams`` in one without an
    n-gram layer beside it.

    With experts ``ffn`` counts the router, all experts and the shared one; a token does not use ``idle`` of them.
    """

    attention: int
    ffn: int
    norms: int
    memory: MemoryCount | None
    idle: int = 0
    ngrams: MemoryCount | None = None

    @property
    def layers(self) -> tuple[MemoryCount, ...]:
        """The memory layers of the block."""
        return tuple(layer for layer in (self.memory, self.ngrams) if layer is not None)

    @property
    def dense(self) -> int:
        """Everything outside the value tables."""
        return self.attention + self.ffn + self.norms + sum(layer.dense for layer in self.layers)

    @property
    def table(self) -> int:
        """Value-table parameters that this block brings."""
        return sum(layer.table for layer in self.layers)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model by kind; all figures are numbers of parameters.

    ``output`` is 0 when input and output embedding are one matrix; ``positions`` counts learned position embeddings;
    ``final_norm`` is the norm after the last block. ``stored`` is what a checkpoint holds.
    """

    embedding: int
    positions: int
    output: int
    final_norm: int
    blocks: tuple[BlockCount, ...]

    @property
    def attention(self) -> int:
        """Attention of all blocks, query and key norms included."""
        return sum(block.attention for block in self.blocks)

    @property
    def ffn(self) -> int:
        """FFNs of all blocks, or their experts."""
        return sum(block.ffn for block in self.blocks)

    @property
    def idle(self) -> int:
        """Parameters of the experts that a token does not go to."""
        return sum(block.idle for block in self.blocks)

    @property
    def norms(self) -> int:
        """Norms before attention and FFN, and the final one."""
        return sum(block.norms for block in self.blocks) + self.final_norm

    @property
    def memory_layers(self) -> tuple[MemoryCount, ...]:
        """The memory layers in the order of their blocks."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    @property
    def memory(self) -> int:
        """Memory layers outside their tables."""
        return sum(layer.dense for layer in self.memory_layers)

    @property
    def tables(self) -> int:
        """Value and pre-value tables, each once."""
        return sum(layer.table for layer in self.memory_layers)

    @property
    def picked(self) -> int:
        """Table parameters that one token reads."""
        return sum(layer.picked for layer in self.memory_layers)

    @property
    def activated_without_embeddings(self) -> int:
        """What one token uses: the blocks and the final norm without idle experts, and the rows it picks."""
        return self.attention + self.ffn - self.idle + self.norms + self.memory + self.picked

    @property
    def activated(self) -> int:
        """As above with the vocabulary matrix once (tied or not: the input side of a token is a single row)."""
        return self.activated_without_embeddings + self.embedding

    @property
    def total(self) -> int:
        """Everything but embeddings and output matrix, as the paper counts."""
        return self.attention + self.ffn + self.norms + self.memory + self.tables

    @property
    def stored(self) -> int:
        """Everything."""
        return self.total + self.embedding + self.positions + self.output


def memory_in_use(model_fields: Mapping[str, Any], memory_config: MemoryConfig | None) -> MemoryConfig | None:
    """``memory_config`` checked against the model, or None where --ffn-variant leaves memory layers out."""
    shape = ModelShape.from_fields(model_fields)
    if memory_config is None or not shape.has_memory:
        return None
    for family in shape.families(memory_config):
        family.validate(shape.hidden_size, shape.num_layers)
    return memory_config


def count_parameters(model_fields: Mapping[str, Any], memory_config: MemoryConfig | None) -> ParameterCount:
    """Parameters of the model that these flags describe.

    Args:
        model_fields: Megatron's flag names with underscores -> values; ``ffn_variant`` (default umv2) says whether
            memory layers or experts count, ``engram_layer_freq`` whether n-gram layers do, too.
        memory_config: the memory layers of the variant; None for none.

    Raises:
        ValueError: one sentence naming the flag whose value cannot work.
    """
    shape = ModelShape.from_fields(model_fields)
    memory_config = memory_in_use(model_fields, memory_config)
    memory, ngrams = (_by_block(each, shape) for each in (memory_config, shape.ngrams))
    norm = shape.hidden_size * (2 if shape.norm_bias else 1)
    attention = _attention(shape)
    ffn, idle = _experts(shape) if shape.num_experts else (_ffn(shape, shape.ffn_hidden_size), 0)
    return ParameterCount(
        embedding=shape.vocab_size * shape.hidden_size,
        positions=shape.learned_positions * shape.hidden_size,
        output=shape.vocab_size * shape.hidden_size if shape.untied else 0,
        final_norm=norm,
        blocks=tuple(
            BlockCount(attention, ffn, 2 * norm, memory[block], idle, ngrams[block])
            for block in range(shape.num_layers)
        ),
    )


def _by_block(family: MemoryConfig | None, shape: ModelShape) -> list[MemoryCount | None]:
    """The layer of one family in each block."""
    if family is None:
        return [None] * shape.num_layers
    layer = MemoryCount.of(family, shape.hidden_size)
    return [layer if here else None for here in family.memory_layers(shape.num_layers)]


def _attention(shape: ModelShape) -> int:
    """Projections of query, key and value, output projection, and the norms of query and key over the head dim."""
    qkv = shape.query_size + 2 * shape.key_value_size
    weights = shape.hidden_size * qkv + shape.query_size * shape.hidden_size
    biases = (qkv if shape.qkv_bias else 0) + (shape.hidden_size if shape.linear_bias else 0)
    qk_norms = sum(shape.qk_norm_sizes) * (2 if shape.norm_bias else 1)
    return weights + biases + qk_norms


def _ffn(shape: ModelShape, width: int) -> int:
    """Up (and gate) and down projection of an FFN of ``width``."""
    inner = width * (2 if shape.gated else 1)
    weights = shape.hidden_size * (inner + width)
    return weights + (inner + shape.hidden_size if shape.linear_bias else 0)


def _experts(shape: ModelShape) -> tuple[int, int]:
    """Router, experts and shared expert of a block, and those of them that a token does not use."""
    expert = _ffn(shape, shape.expert_hidden_size)
    router = shape.num_experts * (shape.hidden_size + (1 if shape.linear_bias else 0))
    shared = _ffn(shape, shape.shared_expert_hidden_size) if shape.shared_expert_hidden_size else 0
    gate = shape.hidden_size if shape.shared_expert_gate else 0
    idle = (shape.num_experts - shape.experts_per_token) * expert
    return router + shape.num_experts * expert + shared + gate, idle

"""Which tensor of a Megatron checkpoint is which tensor of a Hugging Face export: one table, read in both directions.

Every difference between the two sides is one of rows (the first axis): Q, K and V lie interleaved by group in one
tensor there and are three tensors here; gate and up are one there; a value table is one there and numbered chunks here.
So a row of the table says which rows of the Megatron tensor make up each Hugging Face tensor, and going back is that
statement read backwards. Rows of a padded vocabulary belong to no Hugging Face tensor.

This module imports nothing: ``Sizes`` is filled from a checkpoint's or an export's configuration by ``conversion/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

Ranges = tuple[tuple[int, int], ...]
"""Row ranges [start, stop) of a Megatron tensor, in the order in which they follow each other in the other tensor."""


@dataclass(frozen=True)
class MemorySizes:
    """Sizes of one memory layer; ``table_rows`` is 0 where another layer owns the table."""

    heads: int
    keys: int
    key_dim: int
    rank: int
    cores: int
    """0 with additive scores, which need none."""
    query_norm: bool
    key_norm: bool
    query_rows: int
    pre_value_dim: int
    value_dim: int
    projected: int
    """Columns of the value projection; 0 where there is none."""
    table_rows: int
    gate_rows: int
    """Rows of the gate's projection; 0 without a gate."""
    projects_input: bool
    """Whether pre-values are multiplied with a projection of the input."""
    ngram_size: int = 0
    """Of a layer whose rows are addressed by n-grams; 0 with queries and keys."""
    conv_kernel: int = 0
    """Taps of an n-gram layer's convolution; 0 without one."""


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of a block's experts; ``shared`` is the width of the shared expert, 0 without one."""

    count: int
    ffn: int
    shared: int
    shared_gate: bool
    bias_of_choice: bool


@dataclass(frozen=True)
class Sizes:
    """What decides the names and shapes of a model's tensors. ``vocabulary`` is without padding."""

    vocabulary: int
    positions: int
    """Learned positions; 0 with any other kind of position embedding."""
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    tied: bool
    gated: bool
    linear_bias: bool
    qkv_bias: bool
    norm_bias: bool
    qk_norm: bool
    memory: tuple[Optional[MemorySizes], ...]
    """One for each block; None in blocks without a memory layer."""
    chunk_rows: int
    """Rows of a chunk of a value table; the last one may have fewer."""
    post_norm: bool = False
    """Whether norms stand behind attention and FFN, and not before them."""
    wide_qk_norm: bool = False
    """Whether the norms of queries and keys have a gain for each element of all heads."""
    ngrams: tuple[Optional[MemorySizes], ...] = ()
    """The n-gram layers beside the memory layers, one for each block as these; empty where there are none."""
    experts: Optional[ExpertSizes] = None
    """What every block has in the place of the FFN; None with an FFN."""


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor and the rows of the Megatron tensor that make it up."""

    name: str
    ranges: Ranges

    @property
    def rows(self) -> int:
        """Length of its first axis."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class Pairing:
    """A Megatron tensor and the Hugging Face tensors with the same numbers."""

    key: str
    shape: tuple[int, ...]
    """Of the Megatron tensor, without padding of the vocabulary."""
    parts: tuple[Part, ...]
    dtype: str
    """"weights": that of all weights; "float32"; "index": int32 or int64."""
    padded: bool
    """Whether the Megatron tensor may have further rows."""


@dataclass(frozen=True)
class _Row:
    """A row of the table. ``key`` may contain {layer}; ``names`` are the Hugging Face tensors."""

    key: str
    names: tuple[str, ...]
    shape: Callable[[Sizes], tuple[int, ...]]
    when: Callable[[Sizes], bool] = lambda s: True
    split: Callable[[Sizes], tuple[Ranges, ...]] | None = None
    dtype: str = "weights"
    padded: bool = False


@dataclass(frozen=True)
class _MemoryRow:
    """A row for what a memory layer holds: the same name on both sides."""

    name: str
    shape: Callable[[MemorySizes, Sizes], tuple[int, ...]]
    when: Callable[[MemorySizes], bool] = lambda m: True
    dtype: str = "weights"
    chunked: bool = False


def _qkv(sizes: Sizes) -> tuple[Ranges, ...]:
    """Rows of Q, K and V: for each group its query heads, its key head, its value head."""
    head, queries = sizes.head_dim, sizes.heads // sizes.groups * sizes.head_dim
    starts = range(0, sizes.groups * (queries + 2 * head), queries + 2 * head)
    bounds = ((0, queries), (queries, queries + head), (queries + head, queries + 2 * head))
    return tuple(tuple((at + first, at + last) for at in starts) for first, last in bounds)


def _gate_up(sizes: Sizes) -> tuple[Ranges, ...]:
    return ((0, sizes.ffn),), ((sizes.ffn, 2 * sizes.ffn),)


def _shared_gate_up(sizes: Sizes) -> tuple[Ranges, ...]:
    size = _experts(sizes).shared
    return ((0, size),), ((size, 2 * size),)


def _experts(sizes: Sizes) -> ExpertSizes:
    assert sizes.experts is not None
    return sizes.experts


def _has_shared(sizes: Sizes) -> bool:
    return _experts(sizes).shared > 0


def _qkv_rows(sizes: Sizes) -> int:
    return (sizes.heads + 2 * sizes.groups) * sizes.head_dim


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FIRST = (
    _Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",),
         lambda s: (s.vocabulary, s.hidden), padded=True),
    _Row("embedding.position_embeddings.weight", ("model.embed_positions.weight",),
         lambda s: (s.positions, s.hidden), lambda s: s.positions > 0),
)  # fmt: skip
_OF_A_LAYER = (
    _Row("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), lambda s: (s.hidden,),
         lambda s: not s.post_norm),
    _Row("self_attention.linear_qkv.layer_norm_bias", ("input_layernorm.bias",), lambda s: (s.hidden,),
         lambda s: not s.post_norm and s.norm_bias),
    _Row("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV),
         lambda s: (_qkv_rows(s), s.hidden), split=_qkv),
    _Row("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV),
         lambda s: (_qkv_rows(s),), lambda s: s.qkv_bias, split=_qkv),
    _Row("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",),
         lambda s: (s.head_dim * (s.heads if s.wide_qk_norm else 1),), lambda s: s.qk_norm),
    _Row("self_attention.q_layernorm.bias", ("self_attn.q_norm.bias",), lambda s: (s.head_dim,),
         lambda s: s.qk_norm and s.norm_bias),
    _Row("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",),
         lambda s: (s.head_dim * (s.groups if s.wide_qk_norm else 1),), lambda s: s.qk_norm),
    _Row("self_attention.k_layernorm.bias", ("self_attn.k_norm.bias",), lambda s: (s.head_dim,),
         lambda s: s.qk_norm and s.norm_bias),
    _Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",),
         lambda s: (s.hidden, s.heads * s.head_dim)),
    _Row("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",), lambda s: (s.hidden,),
         lambda s: s.linear_bias),
    _Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), lambda s: (s.hidden,),
         lambda s: not s.post_norm),
    _Row("pre_mlp_layernorm.bias", ("post_attention_layernorm.bias",), lambda s: (s.hidden,),
         lambda s: not s.post_norm and s.norm_bias),
    _Row("self_attention.post_layernorm.weight", ("post_attention_layernorm.weight",), lambda s: (s.hidden,),
         lambda s: s.post_norm),
    _Row("self_attention.post_layernorm.bias", ("post_attention_layernorm.bias",), lambda s: (s.hidden,),
         lambda s: s.post_norm and s.norm_bias),
    _Row("mlp.post_layernorm.weight", ("post_feedforward_layernorm.weight",), lambda s: (s.hidden,),
         lambda s: s.post_norm),
    _Row("mlp.post_layernorm.bias", ("post_feedforward_layernorm.bias",), lambda s: (s.hidden,),
         lambda s: s.post_norm and s.norm_bias),
)  # fmt: skip
_OF_AN_FFN = (
    _Row("mlp.ffn.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
         lambda s: (2 * s.ffn, s.hidden), lambda s: s.gated, split=_gate_up),
    _Row("mlp.ffn.linear_fc1.bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
         lambda s: (2 * s.ffn,), lambda s: s.gated and s.linear_bias, split=_gate_up),
    _Row("mlp.ffn.linear_fc1.weight", ("mlp.up_proj.weight",), lambda s: (s.ffn, s.hidden), lambda s: not s.gated),
    _Row("mlp.ffn.linear_fc1.bias", ("mlp.up_proj.bias",), lambda s: (s.ffn,),
         lambda s: not s.gated and s.linear_bias),
    _Row("mlp.ffn.linear_fc2.weight", ("mlp.down_proj.weight",), lambda s: (s.hidden, s.ffn)),
    _Row("mlp.ffn.linear_fc2.bias", ("mlp.down_proj.bias",), lambda s: (s.hidden,), lambda s: s.linear_bias),
)  # fmt: skip
# The first axis of experts is the expert, on both sides: what lies in one tensor there does here.
_OF_EXPERTS = (
    _Row("mlp.router.weight", ("mlp.router.weight",), lambda s: (_experts(s).count, s.hidden)),
    _Row("mlp.router.bias", ("mlp.router.bias",), lambda s: (_experts(s).count,), lambda s: s.linear_bias),
    _Row("mlp.router.expert_bias", ("mlp.router.expert_bias",), lambda s: (_experts(s).count,),
         lambda s: _experts(s).bias_of_choice, dtype="float32"),
    _Row("mlp.experts.experts.linear_fc1.weight", ("mlp.experts.gate_up_proj",),
         lambda s: (_experts(s).count, 2 * _experts(s).ffn, s.hidden), lambda s: s.gated),
    _Row("mlp.experts.experts.linear_fc1.bias", ("mlp.experts.gate_up_proj_bias",),
         lambda s: (_experts(s).count, 2 * _experts(s).ffn), lambda s: s.gated and s.linear_bias),
    _Row("mlp.experts.experts.linear_fc1.weight", ("mlp.experts.up_proj",),
         lambda s: (_experts(s).count, _experts(s).ffn, s.hidden), lambda s: not s.gated),
    _Row("mlp.experts.experts.linear_fc1.bias", ("mlp.experts.up_proj_bias",),
         lambda s: (_experts(s).count, _experts(s).ffn), lambda s: not s.gated and s.linear_bias),
    _Row("mlp.experts.experts.linear_fc2.weight", ("mlp.experts.down_proj",),
         lambda s: (_experts(s).count, s.hidden, _experts(s).ffn)),
    _Row("mlp.experts.experts.linear_fc2.bias", ("mlp.experts.down_proj_bias",),
         lambda s: (_experts(s).count, s.hidden), lambda s: s.linear_bias),
    _Row("mlp.shared_experts.linear_fc1.weight", ("mlp.shared_expert.gate_proj.weight",
                                                  "mlp.shared_expert.up_proj.weight"),
         lambda s: (2 * _experts(s).shared, s.hidden), lambda s: _has_shared(s) and s.gated, split=_shared_gate_up),
    _Row("mlp.shared_experts.linear_fc1.weight", ("mlp.shared_expert.up_proj.weight",),
         lambda s: (_experts(s).shared, s.hidden), lambda s: _has_shared(s) and not s.gated),
    _Row("mlp.shared_experts.linear_fc2.weight", ("mlp.shared_expert.down_proj.weight",),
         lambda s: (s.hidden, _experts(s).shared), _has_shared),
    _Row("mlp.shared_experts.gate_weight", ("mlp.shared_expert_gate.weight",),
         lambda s: (1, s.hidden), lambda s: _has_shared(s) and _experts(s).shared_gate),
)  # fmt: skip
_OF_A_MEMORY_LAYER = (
    _MemoryRow("retrieval.query.weight", lambda m, s: (m.query_rows, s.hidden), lambda m: not m.ngram_size),
    _MemoryRow("retrieval.keys", lambda m, s: (m.heads, 2, m.keys, m.key_dim, m.rank),
               lambda m: not m.ngram_size),
    _MemoryRow("retrieval.query_norm", lambda m, s: (m.key_dim,), lambda m: m.query_norm),
    _MemoryRow("retrieval.key_norm", lambda m, s: (m.key_dim,), lambda m: m.key_norm),
    _MemoryRow("retrieval.cores", lambda m, s: (m.cores, m.heads, m.rank, m.rank), lambda m: m.cores > 0),
    _MemoryRow("retrieval.u", lambda m, s: (m.heads, m.rank), lambda m: m.cores > 0, dtype="float32"),
    _MemoryRow("retrieval.t", lambda m, s: (m.heads, m.rank), lambda m: m.cores > 0, dtype="float32"),
    _MemoryRow("perm", lambda m, s: (m.keys**2,), lambda m: not m.ngram_size, dtype="index"),
    _MemoryRow("query_norm", lambda m, s: (s.hidden,), lambda m: m.ngram_size > 0),
    _MemoryRow("key_norm", lambda m, s: (s.hidden,), lambda m: m.ngram_size > 0),
    _MemoryRow("conv_norm", lambda m, s: (s.hidden,), lambda m: m.conv_kernel > 0),
    _MemoryRow("conv", lambda m, s: (s.hidden, m.conv_kernel), lambda m: m.conv_kernel > 0),
    _MemoryRow("multipliers", lambda m, s: (m.ngram_size,), lambda m: m.ngram_size > 0, dtype="index"),
    _MemoryRow("canonical", lambda m, s: (s.vocabulary,), lambda m: m.ngram_size > 0, dtype="index"),
    _MemoryRow("key_proj.weight", lambda m, s: (s.hidden, m.projected), lambda m: m.ngram_size > 0),
    _MemoryRow("pre_proj.weight", lambda m, s: (m.pre_value_dim, s.hidden), lambda m: m.projects_input),
    _MemoryRow("gate_proj.weight", lambda m, s: (m.gate_rows, s.hidden), lambda m: m.gate_rows > 0),
    _MemoryRow("value_proj.weight", lambda m, s: (s.hidden, m.projected), lambda m: m.projected > 0),
    _MemoryRow("table.values", lambda m, s: (m.table_rows, m.value_dim), lambda m: m.table_rows > 0, chunked=True),
    _MemoryRow("table.pre_values", lambda m, s: (m.table_rows, m.pre_value_dim),
               lambda m: m.table_rows > 0 and m.pre_value_dim > 0, chunked=True),
)  # fmt: skip
_LAST = (
    _Row("decoder.final_layernorm.weight", ("model.norm.weight",), lambda s: (s.hidden,)),
    _Row("decoder.final_layernorm.bias", ("model.norm.bias",), lambda s: (s.hidden,), lambda s: s.norm_bias),
    _Row("output_layer.weight", ("lm_head.weight",), lambda s: (s.vocabulary, s.hidden), lambda s: not s.tied,
         padded=True),
)  # fmt: skip


def pairings(sizes: Sizes) -> Iterator[Pairing]:
    """All tensors of a model of these sizes, in the order of its layers."""
    yield from _pair(_FIRST, sizes)
    for layer, memory in enumerate(sizes.memory):
        rows = _OF_A_LAYER + (_OF_AN_FFN if sizes.experts is None else _OF_EXPERTS)
        yield from _pair(rows, sizes, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
        if memory is not None:
            yield from _pair_memory(memory, sizes, layer, "memory")
        beside = sizes.ngrams[layer] if sizes.ngrams else None
        if beside is not None:
            yield from _pair_memory(beside, sizes, layer, "engram")
    yield from _pair(_LAST, sizes)


def _pair(rows: tuple[_Row, ...], sizes: Sizes, key_prefix: str = "", name_prefix: str = "") -> Iterator[Pairing]:
    for row in rows:
        if row.when(sizes):
            shape = row.shape(sizes)
            ranges = row.split(sizes) if row.split else (((0, shape[0]),),)
            parts = tuple(Part(name_prefix + name, own) for name, own in zip(row.names, ranges))
            assert len(ranges) == len(row.names) and sum(part.rows for part in parts) == shape[0], row.key
            yield Pairing(key_prefix + row.key, shape, parts, row.dtype, row.padded)


def _pair_memory(memory: MemorySizes, sizes: Sizes, layer: int, place: str) -> Iterator[Pairing]:
    for row in _OF_A_MEMORY_LAYER:
        if not row.when(memory):
            continue
        name, shape = f"model.layers.{layer}.{place}.{row.name}", row.shape(memory, sizes)
        if row.chunked:
            starts = range(0, shape[0], sizes.chunk_rows)
            parts = tuple(
                Part(f"{name}.{number}", ((start, min(start + sizes.chunk_rows, shape[0])),))
                for number, start in enumerate(starts)
            )
        else:
            parts = (Part(name, ((0, shape[0]),)),)
        yield Pairing(f"decoder.layers.{layer}.mlp.{place}.{row.name}", shape, parts, row.dtype, False)

"""The parameters that one rank holds, one by one and in the order of ``named_parameters``.

The order matters to the byte: mcore's DDP lays gradients out in it, pads between parameters with the distributed
optimizer, and cuts the buffer into buckets of a certain size. ``tests/distributed/test_planner_against_ranks.py``
compares names and sizes with those of built models.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape


@dataclass(frozen=True)
class Parameter:
    """``elements`` on this rank; ``kind``: embedding, attention, ffn, norms, memory or tables.

    ``ends_bucket``: the embedding of a tied model with several stages, which mcore reduces in a bucket of its own;
    ``columns``: of this rank's part of a value table, 0 of anything else; ``rows``: of a matrix outside embeddings and
    tables, 0 of anything else; ``split``: whether tensor parallelism splits that matrix.
    """

    name: str
    elements: int
    kind: str
    ends_bucket: bool = False
    columns: int = 0
    rows: int = 0
    split: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether Muon updates it (--optimizer muon): a matrix that all tokens are multiplied by."""
        return self.rows > 0

    @property
    def is_table(self) -> bool:
        """Whether this is a part of a value table (reduced over the ranks with the same part)."""
        return self.kind == "tables"


def chunk_parameters(
    shape: ModelShape, memory: MemoryConfig | None, layout: Layout, stage: int, chunk: int = 0, memory_rank: int = 0
) -> list[Parameter]:
    """Parameters of virtual stage ``chunk`` of a rank of pipeline stage ``stage``.

    ``memory_rank``: the rank's place in its memory-parallel group. ``memory`` is None without memory layers.
    """
    first, last = layout.is_first(stage, chunk), layout.is_last(stage, chunk)
    vocabulary = shape.vocab_size // layout.tp * shape.hidden_size
    alone = not shape.untied and layout.pp > 1
    found: list[Parameter] = []
    if first:
        found.append(Parameter("embedding.word_embeddings.weight", vocabulary, "embedding", alone and not last))
        if shape.learned_positions:
            positions = shape.learned_positions * shape.hidden_size
            found.append(Parameter("embedding.position_embeddings.weight", positions, "embedding"))
    families = [(family, family.memory_layers(shape.num_layers)) for family in shape.families(memory)]
    alike: dict[tuple[int | None, ...], tuple[Parameter, ...]] = {}
    for place, block in enumerate(layout.stage_blocks(shape.num_layers, stage, chunk)):
        prefix = f"decoder.layers.{place}."
        owned = tuple(owned_rows(shape, family, block) if here[block] else None for family, here in families)
        if owned not in alike:
            alike[owned] = _block(shape, memory, layout.tp, layout.shard(memory_rank), owned)
        found += [dataclasses.replace(each, name=prefix + each.name) for each in alike[owned]]
    if last:
        found += list(_norm("decoder.final_layernorm", shape.hidden_size, shape.norm_bias))
        if shape.untied or not first:
            found.append(Parameter("output_layer.weight", vocabulary, "embedding", alone))
    return found


def _block(
    shape: ModelShape, memory: MemoryConfig | None, tp: int, shard: TableShard, owned: tuple[int | None, ...]
) -> tuple[Parameter, ...]:
    """One block: norm, attention, norm, FFN, memory layers; ``owned``, of each family: rows of the table that its layer
    owns, 0 where it owns none, None where there is no layer."""
    found = _dense_block(shape, tp)
    for family, rows in zip(shape.families(memory), owned, strict=True):
        if rows is not None:
            found = itertools.chain(found, _memory_layer(shape, family, shard, rows))
    return tuple(found)


def _dense_block(shape: ModelShape, tp: int) -> Iterator[Parameter]:
    hidden = shape.hidden_size
    qkv = (shape.query_size + 2 * shape.key_value_size) // tp
    if not shape.post_norm:
        yield from _norm("input_layernorm", hidden, shape.norm_bias)
    yield from _linear("self_attention.linear_proj", shape.query_size // tp * hidden, hidden, shape.linear_bias,
                       "attention")
    yield from _linear("self_attention.linear_qkv", qkv * hidden, qkv, shape.qkv_bias, "attention")
    if shape.qk_norm:
        for side, size in zip("qk", shape.qk_norm_sizes):
            here = size // tp if shape.wide_qk_norm else size
            yield from _norm(f"self_attention.{side}_layernorm", here, shape.norm_bias, "attention")
    yield from _norm("self_attention.post_layernorm" if shape.post_norm else "pre_mlp_layernorm", hidden,
                     shape.norm_bias)
    inner = shape.ffn_hidden_size // tp
    up = inner * (2 if shape.gated else 1)
    yield from _linear("mlp.ffn.linear_fc1", up * hidden, up, shape.linear_bias, "ffn")
    yield from _linear("mlp.ffn.linear_fc2", inner * hidden, hidden, shape.linear_bias, "ffn")
    if shape.post_norm:
        yield from _norm("mlp.post_layernorm", hidden, shape.norm_bias)


def _memory_layer(shape: ModelShape, m: MemoryConfig, shard: TableShard, owned: int) -> Iterator[Parameter]:
    """All but the table is the same on every rank; the layer that owns a table has its part of it."""
    hidden, prefix = shape.hidden_size, f"mlp.{m.family}."
    sizes = {
        "retrieval.keys": m.num_heads * 2 * m.scored_keys * m.key_dim * m.tucker_rank,
        "retrieval.query_norm": m.key_dim if m.qk_norm != "none" else 0,
        "retrieval.key_norm": m.key_dim if m.qk_norm == "both" else 0,
        "retrieval.cores": m.core_parameters,
        "retrieval.query.weight": m.query_rows * hidden,
        "pre_proj.weight": m.pre_value_dim * hidden if m.has_pre_projection else 0,
        "gate_proj.weight": m.gate_rows * hidden,
        "value_proj.weight": hidden * m.summed_dim if m.value_expansion != "none" else 0,
    }
    rows = {
        "retrieval.query.weight": m.query_rows, "pre_proj.weight": m.pre_value_dim, "gate_proj.weight": m.gate_rows,
        "value_proj.weight": hidden, "key_proj.weight": hidden,
    }  # fmt: skip
    if m.hashes:  # in the order in which a module has its parameters: its own before those of its parts
        conv = hidden * m.conv_kernel
        sizes = {
            "query_norm": hidden, "key_norm": hidden, "conv_norm": hidden if conv else 0, "conv": conv,
            "key_proj.weight": m.gate_rows * hidden, "value_proj.weight": hidden * m.summed_dim,
        }  # fmt: skip
    for name, elements in sizes.items():
        if elements:
            yield Parameter(prefix + name, elements, "memory", rows=rows.get(name, 0))
    if owned:
        top, bottom = shard.rows(owned)
        for name, width in (("values", m.value_dim), ("pre_values", m.pre_value_dim)):
            left, right = shard.columns(width)
            if width:
                elements, columns = (bottom - top) * (right - left), right - left
                yield Parameter(f"{prefix}table.{name}", elements, "tables", columns=columns)


def owned_rows(shape: ModelShape, m: MemoryConfig, block: int) -> int:
    """A: rows of the table that the memory layer of ``block`` owns; 0 when it uses that of another layer."""
    layers = m.memory_layers(shape.num_layers)
    index = sum(layers[:block])
    if m.sharing == "none":
        return m.rows_per_layer
    if m.sharing == "block":
        return m.rows_per_layer * m.sharing_size if index % m.sharing_size == 0 else 0
    return m.rows_per_layer * sum(layers) if index == 0 else 0


def table_rows(m: MemoryConfig, memory_layers: int) -> int:
    """A: rows of the table that a memory layer looks up in, whoever owns it."""
    return m.rows_per_layer * {"none": 1, "block": m.sharing_size}.get(m.sharing, memory_layers)


def _norm(name: str, size: int, bias: bool, kind: str = "norms") -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", size, kind)
    if bias:
        yield Parameter(f"{name}.bias", size, kind)


def _linear(name: str, weights: int, outputs: int, bias: bool, kind: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", weights, kind, rows=outputs, split=True)
    if bias:
        yield Parameter(f"{name}.bias", outputs, kind)

"""Bytes of weights, gradients, optimizer state and buffers that a rank allocates, exact.

mcore's DDP keeps one gradient buffer per model chunk for dense parameters and one for the tables. With the distributed
optimizer the weights lie in such a buffer too, and both are padded: parameters start at multiples of 64 elements, and
buckets end at multiples of 128 and of the number of replicas, so that every replica owns an equal part of each bucket.
The optimizer's state of a replica is that of its parts (without the padding); with --optimizer dist_muon that of the
parameters dealt out to it. Muon's matrices have one moment. Where second moments of tables are kept by row, a replica
has one for each row that it owns elements of. With --memory-value-optimizer-offload the tables' state
is in host memory; the buffers of its copies, which do not depend on the model, are left out. So are Adam's step count,
one number per parameter with torch's own AdamW, and the scales of 8- and 16-bit state, one number per parameter and
kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from umv2_megatron.config.dealing import deal_out
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import rows_of_range
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.rank_parameters import Parameter, chunk_parameters

# mcore's default bucket: this many elements, or a million for each data-parallel rank.
SMALLEST_BUCKET = 40_000_000
FP32 = 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank. ``weights`` include the padding of the distributed optimizer, ``gradients`` are DDP's buffers,
    ``optimizer`` holds main weights (in bf16 runs) and both Adam moments, ``buffers`` the shuffles. ``updated``:
    elements whose state is on this rank; ``host``: optimizer state in host memory, which the others do not count, and
    ``updated_on_host`` its elements."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    table_weights: int
    table_gradients: int
    table_optimizer: int
    updated: int = 0
    host: int = 0
    updated_on_host: int = 0

    @property
    def all(self) -> int:
        """Everything that stays on the device from step to step."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class Bucket:
    """Elements ``start`` to ``stop`` of a gradient buffer, and where in them each parameter lies; ``columns`` of each
    parameter, as in ``Parameter``."""

    start: int
    stop: int
    parameters: tuple[tuple[int, int], ...]
    columns: tuple[int, ...] = field(default=(), compare=False)


def buckets_of(parameters: Sequence[Parameter], replicas: int, sharded: bool, limit: int | None) -> list[Bucket]:
    """How mcore lays ``parameters`` out: from the last to the first, in buckets of at least ``limit`` elements.

    ``replicas``: ranks that own an equal part each; ``sharded``: with the distributed optimizer; ``limit`` None: one.
    """
    start = 64 if sharded else 1
    end = math.lcm(replicas, 128) if sharded else 1
    buckets: list[Bucket] = []
    places: list[tuple[int, int]] = []
    columns: list[int] = []
    begin = position = 0

    def close() -> None:
        nonlocal begin, position, places, columns
        position = -(-position // end) * end
        buckets.append(Bucket(begin, position, tuple(places), tuple(columns)))
        begin, places, columns = position, [], []

    for parameter in reversed(parameters):
        position = -(-position // start) * start
        alone = parameter.ends_bucket and sharded
        if alone and places:
            close()
        places.append((position, position + parameter.elements))
        columns.append(parameter.columns)
        position += parameter.elements
        if alone or (limit is not None and position - begin >= limit):
            close()
    if places:
        close()
    return buckets


def owned_elements(buckets: Sequence[Bucket], replicas: int, replica: int | None) -> int:
    """Elements of parameters in the parts that ``replica`` owns; None: in the largest part, padding included."""
    if replica is None:
        return sum((bucket.stop - bucket.start) // replicas for bucket in buckets)
    total = 0
    for bucket in buckets:
        part = (bucket.stop - bucket.start) // replicas
        low, high = bucket.start + replica * part, bucket.start + (replica + 1) * part
        total += sum(max(0, min(stop, high) - max(begin, low)) for begin, stop in bucket.parameters)
    return total


def held_rows(buckets: Sequence[Bucket], replicas: int, replica: int | None) -> int:
    """Rows of tables that ``replica`` owns elements of, whole or in part; None: at most, whichever replica."""
    total = 0
    for bucket in buckets:
        part = (bucket.stop - bucket.start) // replicas
        places = list(zip(bucket.parameters, bucket.columns, strict=True))
        everything = sum((stop - begin) // width for (begin, stop), width in places)
        if replica is None:
            # one row more at the part's start and one at its end, besides those that its elements fill
            total += min(everything, part // min(bucket.columns) + 2)
            continue
        low, high = bucket.start + replica * part, bucket.start + (replica + 1) * part
        for (begin, stop), width in places:
            first, end = rows_of_range(max(begin, low) - begin, min(stop, high) - begin, width)
            total += end - first
    return total


def state_bytes(
    shape: ModelShape,
    memory: MemoryConfig | None,
    layout: Layout,
    stage: int,
    memory_rank: int | None = None,
    dense_replica: int | None = None,
    table_replica: int | None = None,
) -> StateBytes:
    """Bytes on a rank of pipeline stage ``stage``.

    Args:
        memory_rank: its place in the memory-parallel group; None for the last one, which has the most rows.
        dense_replica, table_replica: its places among the ranks that reduce dense and table gradients; None for an
            upper bound that holds on all of them (padding counted).
    """
    memory_rank = layout.memory_size - 1 if memory_rank is None else memory_rank
    totals = dict.fromkeys(("parameters", "weights", "gradients", "optimizer", "updated", "host", "updated_on_host"), 0)
    tables = dict.fromkeys(("weights", "gradients", "optimizer"), 0)
    chunks = [chunk_parameters(shape, memory, layout, stage, chunk, memory_rank) for chunk in range(layout.chunks)]
    learning = [each for parameters in chunks for each in parameters if learns(each, layout)]
    updated = updated_parameters(learning, layout, dense_replica, table_replica) if layout.dealt else None
    for chunk, parameters in enumerate(chunks):
        totals["parameters"] += sum(each.elements for each in parameters)
        if layout.learning is not None:  # the rest has weights, and nothing that learning needs
            frozen = [each for each in parameters if not learns(each, layout)]
            totals["weights"] += layout.weight_bytes * sum(each.elements for each in frozen)
            parameters = [each for each in parameters if learns(each, layout)]
        for is_table, replicas, replica in (
            (False, layout.dense_replicas, dense_replica), (True, layout.table_replicas, table_replica)
        ):
            own = [each for each in parameters if each.is_table is is_table]
            whole = own if updated is None else [each for each in own if id(each) in updated]
            added = _buffer_bytes(own, whole, layout, replicas // layout.optimizer_instances, replica,
                                  bucket_limit(layout, stage, chunk))
            for name, count in added.items():
                totals[name] += count
                if is_table and name in tables:
                    tables[name] += count
    buffers = _buffer_size(shape, memory, layout, stage)
    return StateBytes(buffers=buffers, table_weights=tables["weights"], table_gradients=tables["gradients"],
                      table_optimizer=tables["optimizer"], **totals)


def learns(parameter: Parameter, layout: Layout) -> bool:
    """Whether the optimizer updates ``parameter`` (--trainable)."""
    return layout.learning is None or parameter.kind in layout.learning


def updated_parameters(
    parameters: Sequence[Parameter], layout: Layout, dense_replica: int | None, table_replica: int | None
) -> set[int]:
    """With --optimizer dist_muon the ids of those of a rank's ``parameters``, of all its chunks, that it updates; for
    a replica that is None those of the rank with the largest state."""
    found: set[int] = set()
    for is_table, replicas, replica in (
        (False, layout.dense_replicas, dense_replica), (True, layout.table_replicas, table_replica)
    ):
        shares = dealt_out([each for each in parameters if each.is_table is is_table], replicas)
        share = max(shares, key=lambda each: kept_bytes(each, layout)) if replica is None else shares[replica]
        found |= {id(each) for each in share}
    return found


def dealt_out(parameters: Sequence[Parameter], replicas: int) -> list[list[Parameter]]:
    """With --optimizer dist_muon what each of ``replicas`` ranks updates of ``parameters``."""
    shares: list[list[Parameter]] = [[] for _ in range(replicas)]
    for each, owner in zip(parameters, deal_out([each.elements for each in parameters], replicas)):
        shares[owner].append(each)
    return shares


def kept_bytes(parameters: Sequence[Parameter], layout: Layout) -> int:
    """State that an optimizer has for whole ``parameters``."""
    total = 0
    for each in parameters:
        total += each.elements * (layout.exp_avg_bytes + (layout.main_param_bytes if layout.bf16 else 0))
        if layout.row_moments and each.is_table:
            total += FP32 * (each.elements // each.columns)
        elif not (layout.muon and each.is_matrix):
            total += each.elements * layout.exp_avg_sq_bytes
    return total


def bucket_limit(layout: Layout, stage: int, chunk: int) -> int | None:
    """Elements after which DDP closes a bucket; None for one bucket."""
    whole = stage > 0 or chunk > 0 or (layout.overlap_param_gather and layout.chunks > 1)
    if not layout.overlap_grad_reduce or whole:
        return None
    return layout.bucket_elements or max(SMALLEST_BUCKET, 1_000_000 * layout.dp)


def _buffer_bytes(
    parameters: list[Parameter], updated: list[Parameter], layout: Layout, replicas: int, replica: int | None,
    limit: int | None,
) -> dict[str, int]:
    """Weights, gradients and optimizer state of the parameters that share a gradient buffer; ``updated``: those that
    this rank updates without the distributed optimizer."""
    sharded = layout.distributed_optimizer
    buckets = buckets_of(parameters, replicas, sharded, limit)
    elements = buckets[-1].stop if buckets else 0
    if sharded:
        owned = owned_elements(buckets, replicas, replica)
        kept = owned * (layout.exp_avg_bytes + (layout.main_param_bytes if layout.bf16 else 0))
        if layout.row_moments and parameters and parameters[0].is_table:
            kept += FP32 * held_rows(buckets, replicas, replica)
        else:
            kept += owned * layout.exp_avg_sq_bytes
    else:
        owned, kept = sum(each.elements for each in updated), kept_bytes(updated, layout)
    on_host = layout.tables_on_host and bool(parameters) and parameters[0].is_table
    places = {"host": kept, "updated_on_host": owned} if on_host else {"optimizer": kept, "updated": owned}
    return {"weights": elements * layout.weight_bytes, "gradients": elements * layout.grad_bytes, **places}


def _buffer_size(shape: ModelShape, memory: MemoryConfig | None, layout: Layout, stage: int) -> int:
    """The shuffle [N^2] of every memory layer on the stage, int32 where that can number the cells, and u, t [h, R]; of
    n-grams the multipliers [n] and the canonical ids [vocabulary]."""
    blocks = [block for chunk in range(layout.chunks) for block in layout.stage_blocks(shape.num_layers, stage, chunk)]
    total = 0
    for family in shape.families(memory):
        layers = family.memory_layers(shape.num_layers)
        total += sum(layers[block] for block in blocks) * _layer_buffers(shape, family)
    return total


def _layer_buffers(shape: ModelShape, memory: MemoryConfig) -> int:
    if memory.hashes:
        return 8 * memory.ngram_size + 4 * shape.num_tokens
    cells = memory.scored_keys**2
    vectors = 2 * memory.num_heads * memory.tucker_rank if memory.scoring == "tucker" else 0
    return cells * (4 if cells <= 2**31 else 8) + vectors * FP32

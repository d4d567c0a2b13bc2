"""How often a model picks each row of its value tables over batches of a corpus, in any layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.data.batches import batch_iterator
from umv2_megatron.memory.row_counts import RowCounts
from umv2_megatron.model.builder import unwrap
from umv2_megatron.model.ffn_with_memory import memory_layers
from umv2_megatron.training.restore import RestoredModel
from umv2_megatron.training.step import evaluate


@dataclass(frozen=True)
class RowUsage:
    """What was counted: ``counts``, without origin; ``loss`` in nats per token of the same batches; ``share``: of all
    rows, picked by a batch (mean over batches and tables)."""

    counts: RowCounts
    loss: float
    share: float


def count_rows(restored: RestoredModel, dataset: Any, batches: int) -> RowUsage:
    """Run the model over the first ``batches`` global batches of ``dataset`` and count picks by row. Collective; every
    rank returns the same. Layers that share a table are counted together; n-gram layers beside others are not."""
    run, chunks = restored.run, restored.chunks
    every = [layer for chunk in chunks for _, layer in memory_layers(unwrap(chunk))]
    layers = [layer for layer in every if layer.config.family == MemoryConfig.family]
    device = layers[0].table.values.device if layers else torch.device("cpu")
    here = {layer.window.owner: layer.window.rows for layer in layers}
    batch = {owner: torch.zeros(rows, dtype=torch.int64, device=device) for owner, rows in here.items()}
    picks, used = ({owner: torch.zeros_like(each) for owner, each in batch.items()} for _ in range(2))
    for layer in layers:
        layer.row_counts = batch[layer.window.owner]
    stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    iterator = batch_iterator(
        dataset, 0, run.training.micro_batch_size, run.data.num_workers, run.virtual_pipeline_size
    )
    nats, tokens = 0.0, 0.0
    try:
        for _ in range(batches):
            for each in batch.values():
                each.zero_()
            total, count = evaluate(run, chunks, iterator, 1)
            nats, tokens = nats + total, tokens + count
            for owner, each in batch.items():
                # every rank of the stage has tokens of its own, also those that hold one table together
                torch.distributed.all_reduce(each, group=stage)
                picks[owner] += each
                used[owner] += each > 0
    finally:
        for layer in layers:
            layer.row_counts = None
    counts = _of_all_stages(picks, used, batches)
    rows = sum(len(each) for each in counts.batches.values())
    share = sum(int(each.sum()) for each in counts.batches.values()) / (rows * batches) if rows else 0.0
    return RowUsage(counts, nats / tokens, share)


def _of_all_stages(picks: dict[int, torch.Tensor], used: dict[int, torch.Tensor], batches: int) -> RowCounts:
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    first = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True).rank() == 0
    mine = [{owner: each.cpu() for owner, each in held.items()} if first else {} for held in (picks, used)]
    torch.distributed.all_gather_object(parts, mine)
    whole: list[dict[int, torch.Tensor]] = [{}, {}]
    for part in parts:
        for together, held in zip(whole, part, strict=True):
            together.update(held)
    return RowCounts(dict(sorted(whole[0].items())), dict(sorted(whole[1].items())), batches)

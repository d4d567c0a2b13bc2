"""``RowAdam`` in the place of Adam in that one of mcore's optimizers that updates the value tables.

mcore's optimizer around it stays: it deals out gradients and parameters, clips, and copies the results into the
weights. What this module adds is where each table's elements are, and which rows lie in the shares of several ranks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from umv2_megatron.checkpoint.optimizer_state import inner_parameters, optimizer_parts
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.memory.row_adam import RowAdam, TableRange
from umv2_megatron.memory.value_table import VALUE_GROUP
from umv2_megatron.parallel import groups

_SETTINGS = ("lr", "betas", "eps", "weight_decay")


def keep_second_moments_by_row(optimizer: MegatronOptimizer, run: RunConfig) -> None:
    """Let the value tables of ``run`` be updated by ``RowAdam``; nothing may have been updated yet."""
    for part in optimizer_parts(optimizer):
        if any(VALUE_GROUP in group for group in part.optimizer.param_groups):
            assert all(VALUE_GROUP in group for group in part.optimizer.param_groups), "tables have their own optimizer"
            _replace(part, run)


def _replace(part: Any, run: RunConfig) -> None:
    adam = part.optimizer
    assert not adam.state, "the optimizer has made steps"
    parts = run.memory.parallel_size if run.memory.parallel_mode == "dim" else 1
    owned = list(inner_parameters(part))
    ranges = [
        TableRange(held, table.shape[1], table.shape[1] * parts, start) for table, held, start in owned
    ]  # fmt: skip
    # mcore's settings of the groups, and of Adam's those that are RowAdam's too
    dropped = set(adam.defaults) - set(_SETTINGS)
    settings = [{key: value for key, value in group.items() if key not in dropped} for group in adam.param_groups]
    made = RowAdam(
        settings,
        ranges,
        decoupled=run.decoupled_weight_decay,
        sum_over_columns=_sum_over(groups.get_memory_parallel_group()) if parts > 1 else None,
    )
    if isinstance(part, DistributedOptimizer):
        shared = _shared_rows(part)
        numbers = {pair: number for number, pair in enumerate(shared)}
        slots, places, place = [], [], 0
        for (table, _, _), each in zip(owned, ranges, strict=True):
            for row in {each.first, each.first + each.rows - 1} if each.rows else ():
                if (id(table), row) in numbers:
                    slots.append(numbers[id(table), row])
                    places.append(place + row - each.first)
            place += each.rows
        made.share_rows(len(shared), slots, places, _sum_over(part.data_parallel_group))
    part.optimizer = made
    part.init_state_fn = lambda inner, config=None: inner.allocate()


def _shared_rows(part: DistributedOptimizer) -> list[tuple[int, int]]:
    """(id of the table, row of this rank's part of it) of all rows in which the share of one of the ranks ends that
    divide the optimizer's state; in the same order on all of them."""
    found = []
    for buffer in part.buffers:
        for table, (begin, end, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            share = bucket.grad_data.numel() // buffer.data_parallel_world_size
            first_cut = bucket.offset + ((begin - bucket.offset) // share + 1) * share
            cuts = [cut - begin for cut in range(first_cut, end, share)]
            rows = {cut // table.shape[1] for cut in cuts if cut % table.shape[1]}
            found += [(id(table), row) for row in sorted(rows)]
    return found


def _sum_over(group: torch.distributed.ProcessGroup) -> Any:
    return functools.partial(torch.distributed.all_reduce, group=group)

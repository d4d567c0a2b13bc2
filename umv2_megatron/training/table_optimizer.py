"""Our own Adam in the place of mcore's choice in that one of mcore's optimizers that updates the value tables.

    --memory-value-second-moment row         RowAdam
    --memory-value-optimizer-offload         HostAdam
    both                                     HostRowAdam
    --trainable rows                         SelectedRowsAdam, around CompactAdam or RowAdam

mcore's optimizer around it stays: it deals out gradients and parameters, clips, and copies the results into the
weights. What this module adds is where each table's elements are, and which rows lie in the shares of several ranks.

With offload, mcore's main weights of tables (``fp32_from_float16_groups``, ``shard_fp32_from_float16_groups``) become
placeholders without memory, whose gradients mcore sets, unscales and clips as ever. The host's Adam puts the new
weights into the model itself, so mcore's copies between main weights and weights are taken out of that optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.overrides import TorchFunctionMode

from umv2_megatron.checkpoint.optimizer_state import inner_parameters, optimizer_parts
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.memory.host_adam import HostAdam, HostRowAdam, HostTable, placeholder
from umv2_megatron.memory.row_adam import RowAdam, TableRange
from umv2_megatron.memory.row_counts import RowSelection
from umv2_megatron.memory.selected_rows import CompactAdam, SelectedPart, SelectedRange, SelectedRowsAdam
from umv2_megatron.memory.sharing import table_windows
from umv2_megatron.memory.value_table import SELECTED_ROWS, TABLE_ATTRIBUTE, VALUE_GROUP
from umv2_megatron.model.builder import unwrap
from umv2_megatron.model.ffn_with_memory import memory_layers
from umv2_megatron.parallel import groups

_SETTINGS = ("lr", "betas", "eps", "weight_decay")
_MAIN_WEIGHTS = ("fp32_from_float16_groups", "shard_fp32_from_float16_groups")  # of mcore's optimizers


def replace_table_optimizers(optimizer: MegatronOptimizer, run: RunConfig, chunks: Sequence[torch.nn.Module]) -> None:
    """Let the value tables of ``chunks`` be updated as the flags of ``run`` say; nothing may have been updated yet.

    Raises ``UsageError`` where --trainable-rows is no selection of rows of these tables.
    """
    by_row, offload = run.memory.value_second_moment == "row", run.memory.value_optimizer_offload
    selection = _selection(run, chunks) if run.training.trainable == "rows" else None
    if not (by_row or offload or selection):
        return
    for part in optimizer_parts(optimizer):
        if any(VALUE_GROUP in group for group in part.optimizer.param_groups):
            assert all(VALUE_GROUP in group for group in part.optimizer.param_groups), "tables have their own optimizer"
            assert not part.optimizer.state, "the optimizer has made steps"
            tables = _move_to_host(part) if offload else []
            if selection is not None:
                part.optimizer = _of_selected_rows(part, run, selection)
            elif by_row:
                part.optimizer = _by_row(part, run, tables)
            else:
                part.optimizer = HostAdam(part.optimizer.param_groups, tables, run.decoupled_weight_decay)
            part.init_state_fn = lambda inner, config=None: inner.allocate()


def start_table_updates(optimizer: MegatronOptimizer) -> None:
    """Let gradients of offloaded tables go to the host while the device updates the rest; a step has to follow."""
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, (HostAdam, HostRowAdam)):
            part.optimizer.start()


# ---------------------------------------------------------------------- on the host


class MainWeightsOnHost(TorchFunctionMode):
    """Inside, the copies that mcore makes of 16-bit tables, to become float32 main weights, are made on the host.

    Otherwise each would first take device memory of twice the table's size (optimizer.py:674, distrib_optimizer.py:399
    of mcore 0.16.1).
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        parameters = [each for chunk in chunks for each in chunk.parameters() if hasattr(each, TABLE_ATTRIBUTE)]
        self._memory = {each.untyped_storage().data_ptr() for each in parameters}
        self.moved = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func is torch.Tensor.clone and not args[0].is_meta  # a dry run's tensors have no place
        if made and args[0].untyped_storage().data_ptr() in self._memory:
            self.moved += 1
            return args[0].to("cpu", copy=True)
        return func(*args, **(kwargs or {}))


def _move_to_host(part: Any) -> list[HostTable]:
    """The tables of mcore's optimizer ``part``, which from now on has no main weights on the device."""
    tables, places = [], {}
    for parameter, held, start in inner_parameters(part):
        weights = parameter.detach().view(-1)[start : start + held.numel()]
        if parameter.dtype == torch.float32:
            tables.append(HostTable(held, weights, None))
            continue
        places[id(held)] = stand_in = placeholder(held, parameter.device)
        tables.append(HostTable(stand_in, weights, held.view(-1)))
        parameter.main_param = stand_in  # type: ignore[attr-defined]  # mcore's handle to it
    kept = [group for name in _MAIN_WEIGHTS for group in getattr(part, name, ())]
    for group in (*kept, *(group["params"] for group in part.optimizer.param_groups)):
        group[:] = [places.get(id(each), each) for each in group]

    def reload(state_dict: Any = None) -> None:
        assert state_dict is None, "main weights follow the model's weights"
        for table in tables:
            if table.main is not None:
                table.main.copy_(table.weights)

    part._copy_main_params_to_model_params = lambda: None
    part._copy_model_params_to_main_params = reload
    return tables


# ---------------------------------------------------------------------- second moments by row


def _by_row(part: Any, run: RunConfig, tables: list[HostTable]) -> RowAdam:
    owned = _owned(part, run)
    ranges = [each.range for each in owned]
    settings, over_columns = _row_settings(part), _sum_over_columns(run)
    if run.memory.value_optimizer_offload:
        made: RowAdam = HostRowAdam(settings, ranges, tables, over_columns)
    else:
        made = RowAdam(settings, ranges, run.decoupled_weight_decay, over_columns)
    if isinstance(part, DistributedOptimizer):
        _share_rows(made, part, [(each.table, each.range) for each in owned], _shared_rows(part))
    return made


@dataclass(frozen=True)
class _Owned:
    """A parameter of a table, and the range of it that mcore's optimizer updates here."""

    table: torch.nn.Parameter
    range: TableRange


def _owned(part: Any, run: RunConfig) -> list[_Owned]:
    parts = run.memory.parallel_size if run.memory.parallel_mode == "dim" else 1
    return [
        _Owned(table, TableRange(held, table.shape[1], table.shape[1] * parts, start))
        for table, held, start in inner_parameters(part)
    ]


def _row_settings(part: Any) -> list[dict[str, Any]]:
    """mcore's settings of the groups, and of Adam's those that are RowAdam's too."""
    dropped = set(part.optimizer.defaults) - set(_SETTINGS)
    return [{key: value for key, value in group.items() if key not in dropped} for group in part.optimizer.param_groups]


def _sum_over_columns(run: RunConfig) -> Any:
    by_columns = run.memory.parallel_mode == "dim" and run.memory.parallel_size > 1
    return _sum_over(groups.get_memory_parallel_group()) if by_columns else None


def _share_rows(
    made: RowAdam,
    part: DistributedOptimizer,
    owned: Sequence[tuple[torch.nn.Parameter, TableRange]],
    shared: list[tuple[int, int]],
) -> None:
    """Let ranks add up what they have of the rows ``shared``, as ``_shared_rows`` names them; ``owned`` are the ranges
    of ``made``."""
    numbers = {pair: number for number, pair in enumerate(shared)}
    slots, places, place = [], [], 0
    for table, each in owned:
        for row in {each.first, each.first + each.rows - 1} if each.rows else ():
            if (id(table), row) in numbers:
                slots.append(numbers[id(table), row])
                places.append(place + row - each.first)
        place += each.rows
    made.share_rows(len(shared), slots, places, _sum_over(part.data_parallel_group))


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


# ---------------------------------------------------------------------- selected rows alone


def leave_gradients_of_selected_rows(optimizer: MegatronOptimizer) -> None:
    """With --trainable rows, let gradients of all other rows be zero; they must be final."""
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, SelectedRowsAdam):
            part.optimizer.leave_gradients_of_selected()


@dataclass(frozen=True)
class _Selection:
    """The rows of --trainable-rows in this rank's parts of tables, by the identity of their parameters."""

    parts: dict[int, SelectedPart]
    sha256: str


def _selection(run: RunConfig, chunks: Sequence[torch.nn.Module]) -> _Selection:
    assert run.training.trainable_rows is not None
    flag, path = "--trainable-rows", run.training.trainable_rows
    windows = table_windows(run.memory, sum(run.memory.memory_layers(run.num_layers)))
    try:
        chosen = RowSelection.read(flag, path)
        chosen.check(flag, path, {window.owner: window.rows for window in windows})
    except ValueError as error:
        raise UsageError(str(error)) from error
    parts = {}
    for chunk in chunks:
        for _, layer in memory_layers(unwrap(chunk)):
            if layer.owns_table:
                rows = chosen.rows[layer.layer_index]
                top, bottom = layer.table.shard.rows(layer.table.rows)
                before, after = (int(torch.searchsorted(rows, each)) for each in (top, bottom))
                part = SelectedPart(rows[before:after] - top, before, len(rows))
                parts.update({id(table): part for table in layer.table.tables()})
    return _Selection(parts, chosen.sha256)


def _of_selected_rows(part: Any, run: RunConfig, selection: _Selection) -> SelectedRowsAdam:
    owned = _owned(part, run)
    ranges = [SelectedRange(each.range, selection.parts[id(each.table)]) for each in owned]
    compact = {id(each.whole.held): each.compact for each in ranges}
    settings = [{**group, SELECTED_ROWS: selection.sha256} for group in _row_settings(part)]
    inner_settings = [{**group, "params": [compact[id(each)] for each in group["params"]]} for group in settings]
    if run.memory.value_second_moment != "row":
        return SelectedRowsAdam(settings, ranges, CompactAdam(inner_settings, run.decoupled_weight_decay))
    rows = RowAdam(inner_settings, [each.range for each in ranges], run.decoupled_weight_decay, _sum_over_columns(run))
    if isinstance(part, DistributedOptimizer):
        _share_rows(
            rows,
            part,
            [(each.table, selected.range) for each, selected in zip(owned, ranges, strict=True)],
            list(_selected_among(_shared_rows(part), selection.parts)),
        )
    return SelectedRowsAdam(settings, ranges, rows)


def _selected_among(shared: list[tuple[int, int]], parts: dict[int, SelectedPart]) -> Iterator[tuple[int, int]]:
    """Those of ``shared`` that are selected, numbered among the selected rows of this rank's part."""
    for table, row in shared:
        rows = parts[table].rows
        place = int(torch.searchsorted(rows, row))
        if place < len(rows) and int(rows[place]) == row:
            yield table, place

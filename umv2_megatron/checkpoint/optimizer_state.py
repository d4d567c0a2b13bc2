"""The optimizer's state by parameter, the same whatever the layout and whoever shards it.

A checkpoint holds, under the parameter's own key and with its global shape,

    optimizer.state.exp_avg.KEY, optimizer.state.exp_avg_sq.KEY    moments
    optimizer.state.exp_avg_sq_row.KEY                             instead of exp_avg_sq: a number for each row of a
                                                                   table (--memory-value-second-moment row)
    optimizer.state.momentum_buffer.KEY                            Muon's, of a matrix, instead of Adam's moments
    optimizer.state.fp32_param.KEY                                 the fp32 main parameter, where the weight is 16-bit

(with --trainable rows the moments of a table are those of the selected rows alone, in their order, and it has the
shape of a table of that many rows)

and beside the tensors ("optimizer_groups" of the common state) each parameter group's settings with its step count. A
rank stores and loads the boxes it owns (`optimizer_shards.py`), with mcore's distributed optimizer and without, so
checkpoints of both load into both, in any layout. Tensors are read and written in place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, param_group_identifier_keys

from umv2_megatron.checkpoint.optimizer_shards import pieces, row_pieces
from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.memory.host_adam import main_weights
from umv2_megatron.memory.row_adam import ROW_MOMENT, RowAdam, TableRange
from umv2_megatron.memory.selected_rows import SelectedPart, SelectedRowsAdam
from umv2_megatron.memory.value_table import SELECTED_ROWS, TABLE_FAMILY, VALUE_GROUP

PREFIX = "optimizer.state"
MAIN_PARAM = "fp32_param"
MOMENTUM = "momentum_buffer"
MATRIX_GROUP = "muon"
"""Key of the parameter groups that Muon updates."""
KERNEL_CHOICES = ("foreach", "fused")
"""Keys of a parameter group of torch's Adam that say how it computes, not what; checkpoints do not hold them."""
_MCORE_MAIN_PARAM = "param"  # mcore's own "fully_reshardable" type calls it so, and stores it for fp32 weights too

Group = dict[str, Any]


def is_main_param(key: str) -> bool:
    """Whether a key of a checkpoint is that of an fp32 main parameter."""
    return key.startswith((f"{PREFIX}.{MAIN_PARAM}.", f"{PREFIX}.{_MCORE_MAIN_PARAM}."))


def main_param_name(keys: Sequence[str]) -> str | None:
    """What the checkpoint with these keys calls main parameters; None when it has none (saved in fp32)."""
    for name in (MAIN_PARAM, _MCORE_MAIN_PARAM):
        if any(key.startswith(f"{PREFIX}.{name}.") for key in keys):
            return name
    return None


def optimizer_parts(optimizer: Any) -> list[Any]:
    """mcore's optimizers inside a chain (or the one that is none), without the stubs of ranks that train nothing."""
    parts = [] if optimizer is None else list(getattr(optimizer, "chained_optimizers", [optimizer]))
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def check_second_moments(keys: Sequence[str], optimizer: Any, path: object) -> None:
    """Raise CheckpointError where the checkpoint with these keys, at ``path``, has another kind of second moments of
    value tables than ``optimizer`` has."""
    parts = optimizer_parts(optimizer)
    if not any(VALUE_GROUP in group for part in parts for group in part.optimizer.param_groups):
        return
    kinds = {True: "row", False: "full"}
    saved = kinds[any(key.startswith(f"{PREFIX}.{ROW_MOMENT}.") for key in keys)]
    here = kinds[any(isinstance(getattr(part.optimizer, "inner", part.optimizer), RowAdam) for part in parts)]
    if saved != here:
        raise CheckpointError(
            f"--memory-value-second-moment is {here}; expected {saved}, with which {path} was saved, or --no-load-optim"
        )


def check_selected_rows(groups: Sequence[Group], optimizer: Any, path: object) -> None:
    """Raise CheckpointError where ``groups``, of the checkpoint at ``path``, have other selected rows
    (--trainable rows) than ``optimizer`` has."""
    tables = [group for part in optimizer_parts(optimizer) for group in part.optimizer.param_groups]
    here, saved = ({group.get(SELECTED_ROWS) for group in all_ if VALUE_GROUP in group} for all_ in (tables, groups))
    if here and saved and here != saved:
        told = [each.pop() or "none" for each in (here, saved)]
        raise CheckpointError(
            f"--trainable-rows is a file with SHA-256 {told[0]}; expected the one with which {path} was saved, SHA-256 "
            f"{told[1]}, or --no-load-optim"
        )


def check_kind(keys: Sequence[str], optimizer: Any, path: object) -> None:
    """Raise CheckpointError where the checkpoint with these keys, at ``path``, is of Adam alone and ``optimizer`` has
    Muon, or the other way round."""
    saved = any(key.startswith(f"{PREFIX}.{MOMENTUM}.") for key in keys)
    groups = [group for part in optimizer_parts(optimizer) for group in part.optimizer.param_groups]
    here = any(MATRIX_GROUP in group for group in groups)
    if saved != here:
        shown, expected = ("muon or dist_muon", "adam") if here else ("adam", "muon or dist_muon")
        raise CheckpointError(
            f"--optimizer is {shown}; expected {expected}, with which {path} was saved, or --no-load-optim"
        )


def has_step_tensors(part: Any) -> bool:
    """torch's own Adam keeps a step count per parameter; the fused ones of TE and Apex keep it in the group."""
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def allocate_moments(part: Any) -> None:
    """Give the optimizer the state it has before its first step, so that saving and loading then work as later."""
    if not has_step_tensors(part):
        if part.init_state_fn is None:
            raise CheckpointError(
                f"the state of {type(part.optimizer).__name__} cannot be saved: use another optimizer"
            )
        part.init_state_fn(part.optimizer, part.config)
        return
    for group in part.optimizer.param_groups:
        for param in group["params"]:
            if not part.optimizer.state[param]:
                part.optimizer.state[param] = {
                    # torch's fused kernels want the count beside the parameter, the others on the CPU
                    "step": torch.zeros((), device=param.device if group["fused"] else "cpu"),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


# ---------------------------------------------------------------------- tensors


@dataclass
class _Owned:
    """What this rank holds of one parameter's state: flat tensors for its local elements from ``start`` on, and of a
    value table the second moments of the rows of ``range``, where they are kept by row."""

    part: Any
    parameter: torch.nn.Parameter
    start: int
    tensors: dict[str, torch.Tensor]
    range: TableRange | None = None
    row_moment: torch.Tensor | None = None
    selected: SelectedPart | None = None
    """Where only the selected rows of the parameter have this state: elements, ``start`` and ``range`` are those of the
    table of these rows."""


class OptimizerState:
    """This rank's part of the state of ``optimizer``; model_state is the model's sharded state dict."""

    def __init__(self, optimizer: Any, model_state: ShardedStateDict) -> None:
        self.parts = optimizer_parts(optimizer)
        for part in self.parts:
            allocate_moments(part)
        self._items = {
            id(item.data): item
            for item in nested_values(model_state)
            if isinstance(item, (ShardedTensor, ShardedTensorFactory))
        }
        self._owned = [owned for part in self.parts for owned in _owned(part)]
        self._main_param: str | None = MAIN_PARAM

    def sharded(self, main_param: str | None = MAIN_PARAM) -> dict[str, ShardedTensor]:
        """The pieces to save or to fill. main_param: the checkpoint's name for main parameters, None: not asked for."""
        self._main_param = main_param
        found: list[ShardedTensor] = []
        for owned in self._owned:
            item = self._items.get(id(owned.parameter))
            assert item is not None, f"a parameter {tuple(owned.parameter.shape)} is not in the model's state"
            if isinstance(owned.part, DistributedOptimizer) or getattr(owned.part, "is_dealt", False):
                item = replace(item, replica_id=_replica_of_range(owned, item.replica_id))
            if owned.selected is not None:
                if not owned.selected.total:
                    continue
                item = _table_of_selected(item, owned.selected)
            for name, tensor in owned.tensors.items():
                stored = main_param if name == MAIN_PARAM else name
                if stored is not None:
                    found += pieces(item, tensor, owned.start, f"{PREFIX}.{stored}")
            if owned.range is not None and owned.row_moment is not None:
                assert isinstance(item, ShardedTensor), f"{item.key} is not stored as one table"
                first, inside = owned.range.first, owned.range.begins_inside
                found += row_pieces(item, owned.row_moment, first, inside, f"{PREFIX}.{ROW_MOMENT}")
        return {str(number): piece for number, piece in enumerate(found)}

    @torch.no_grad()
    def restore(self, groups: list[Group]) -> None:
        """After the pieces and the weights were loaded: group settings, step counts, what the pieces did not hold."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                _set_group(part, group, groups)
        for owned in self._owned:
            if MAIN_PARAM in owned.tensors and self._main_param is None:
                main = owned.tensors[MAIN_PARAM]
                main.copy_(owned.parameter.view(-1)[owned.start : owned.start + main.numel()])
            if _holds_main_params(owned.part):
                tensors = {"param" if name == MAIN_PARAM else name: kept for name, kept in owned.tensors.items()}
                owned.part._set_main_param_and_optimizer_states(owned.parameter, tensors)


def _replica_of_range(owned: _Owned, replica_id: Any) -> tuple[int, int, int]:
    """The number that tells apart the ranks that hold the same range of a parameter; all zeros for the one that saves.

    mcore's numbers are (pipeline copy, tensor-parallel copy, data-parallel copy) of the parameter. The optimizer's own
    data-parallel ranks hold different ranges (or, with dist_muon, different parameters); for tables and experts these
    are the tensor-parallel ranks too.
    """
    pipeline, tensor, _data = replica_id
    over_all = not getattr(owned.parameter, "allreduce", True)
    return pipeline, 0 if over_all else tensor, getattr(owned.part, "distributed_optimizer_instance_id", 0)


def _table_of_selected(item: ShardedTensor, selected: SelectedPart) -> ShardedTensor:
    """The entry of a table's part in the model's sharded state dict, as if there were no rows but the selected ones."""
    shape = (len(selected.rows), item.local_shape[1])
    return replace(
        item,
        data=torch.empty(shape, dtype=item.dtype, device="meta"),
        local_shape=shape,
        global_shape=(selected.total, item.global_shape[1]),
        global_offset=(selected.before, item.global_offset[1]),
        axis_fragmentations=None,
    )


def _owned_of_selected(part: Any, parameter: torch.nn.Parameter, inner: torch.Tensor, start: int) -> Iterator[_Owned]:
    if parameter.dtype != torch.float32:
        yield _Owned(part, parameter, start, {MAIN_PARAM: inner.detach().view(-1)})
    selected = part.optimizer.ranges[inner]
    moments = dict(part.optimizer.state[selected.compact])
    row_moment = moments.pop(ROW_MOMENT, None)
    owned = selected.range if row_moment is not None else None
    yield _Owned(part, parameter, selected.range.start, moments, owned, row_moment, selected.part)


def _owned(part: Any) -> Iterator[_Owned]:
    for parameter, inner, start in inner_parameters(part):
        if isinstance(part.optimizer, SelectedRowsAdam):
            yield from _owned_of_selected(part, parameter, inner, start)
            continue
        if _holds_main_params(part):
            # Transformer Engine's optimizer stores them scaled; these are copies, put back by `restore`.
            held = part._get_main_param_and_optimizer_states(parameter)
            held[MAIN_PARAM] = held.pop("param")
        else:
            held = dict(part.optimizer.state[inner])
            if parameter.dtype != torch.float32:
                held[MAIN_PARAM] = main_weights(part.optimizer, inner)
        tensors = {name: kept.detach().view(-1) for name, kept in held.items() if name != "step"}
        row_moment = tensors.pop(ROW_MOMENT, None)
        assert all(kept.numel() == inner.numel() for kept in tensors.values()), tensors.keys()
        owned = part.optimizer.ranges[inner] if isinstance(part.optimizer, RowAdam) else None
        yield _Owned(part, parameter, start, tensors, owned, row_moment)


def inner_parameters(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int]]:
    """Of all that this rank owns of mcore's optimizer ``part``: the model's parameter, what the optimizer updates for
    it, and the place of its first element in the parameter."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            owned = part._get_model_param_range_map(parameter)["param"]
            inner = part.optimizer.param_groups[group]["params"][order]
            assert inner.numel() == owned.end - owned.start, "mcore's map of parameters has another order"
            yield parameter, inner, owned.start
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from ((parameter, main, 0) for parameter, main in zip(models, mains, strict=True))
        for group in part.fp32_from_fp32_groups:
            yield from ((parameter, parameter, 0) for parameter in group)
    else:
        yield from ((parameter, parameter, 0) for parameter in part.get_parameters())


def _holds_main_params(part: Any) -> bool:
    """Whether main parameters are inside the inner optimizer (--use-precision-aware-optimizer)."""
    return bool(getattr(part.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False))


# ---------------------------------------------------------------------- groups


def local_groups(optimizer: Any) -> list[Group]:
    """Settings and step count ("step", None where this rank updates nothing) of every parameter group of this rank."""
    found = []
    for part in optimizer_parts(optimizer):
        allocate_moments(part)
        for group in part.optimizer.param_groups:
            values = {key: value for key, value in group.items() if key not in ("params", "step", *KERNEL_CHOICES)}
            found.append(values | {"step": _step(part, group)})
    return found


def merge_groups(everyone: list[list[Group]]) -> list[Group]:
    """The groups of all ranks, each once. Raises CheckpointError when ranks disagree about one."""
    merged: dict[tuple, Group] = {}
    for rank, groups in enumerate(everyone):
        for group in groups:
            first = merged.setdefault(_identity(group), dict(group))
            if first["step"] is None:
                first["step"] = group["step"]
            expected = first if group["step"] is not None else first | {"step": None}
            if group != expected:
                raise CheckpointError(f"rank {rank} has a parameter group {group}, another rank has {expected} of it")
    return list(merged.values())


def groups_of_mcore(state: dict[Any, Any]) -> list[Group]:
    """The groups in the common state that mcore's own types wrote: of one optimizer, or of a chain by number."""
    parts = [state] if "param_groups" in state or "optimizer" in state else list(state.values())
    found = []
    for part in parts:
        inner = part.get("optimizer", part)
        common_step = inner.get("state", {}).get("common_step", 0.0)
        for group in inner["param_groups"]:
            values = {key: value for key, value in group.items() if key != "params"}
            found.append(values | {"step": float(values.get("step", common_step))})
    return found


# mcore 0.19 tells groups apart by settings, too, which the flags of a resumed run may change.
_SETTINGS = ("max_lr", "min_lr", "start_wd", "end_wd", "optimizer")
_IDENTITY = tuple(key for key in param_group_identifier_keys if key not in _SETTINGS)


def _identity(group: Group) -> tuple:
    """What tells a group from the others in every layout; settings that a schedule or a flag changes do not count."""
    of_tables = (VALUE_GROUP in group, group.get(TABLE_FAMILY))
    return (*(group.get(key) for key in _IDENTITY), *of_tables, MATRIX_GROUP in group)


def _step(part: Any, group: Group) -> float | None:
    if not group["params"]:
        return None
    if not has_step_tensors(part):
        return float(group.get("step", 0))
    steps = {float(part.optimizer.state[param]["step"]) for param in group["params"]}
    if len(steps) > 1:
        raise CheckpointError(
            f"the parameters of one group have made {sorted(steps)} optimizer steps: expected one number"
        )
    return steps.pop()


def _set_group(part: Any, group: Group, saved: list[Group]) -> None:
    match = next((one for one in saved if _identity(one) == _identity(group)), None)
    if match is None:
        if not group["params"]:
            return
        raise CheckpointError(
            f"the checkpoint has no parameter group {_identity(group)} of {_IDENTITY}, {VALUE_GROUP}, {TABLE_FAMILY} "
            f"and {MATRIX_GROUP}: give --no-load-optim, or the flags that it was saved with"
        )
    group.update((key, value) for key, value in match.items() if key not in ("step", *KERNEL_CHOICES))
    if match["step"] is None or not group["params"]:
        return
    if not has_step_tensors(part):
        group["step"] = int(match["step"])
        return
    for param in group["params"]:
        state = part.optimizer.state[param]
        state["step"] = torch.full_like(state["step"], match["step"])

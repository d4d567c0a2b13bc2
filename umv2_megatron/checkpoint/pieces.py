"""What a rank has to write of the run's state: parts of global tensors, and objects, as `shard_writing.Piece`.

This is the only step of a save that looks at the run's own memory. It takes the checksums there, and refuses NaN and
Inf: a run that went on from them would be lost, with the good checkpoints pruned one by one.
"""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

from umv2_megatron.checkpoint.fp8_state import to_plain
from umv2_megatron.checkpoint.shard_writing import Piece
from umv2_megatron.checkpoint.tensor_checks import checksum, examine, first_not_finite
from umv2_megatron.checkpoint.torch_dist_io import is_extra_state
from umv2_megatron.durable_files import CheckpointError


def plan_pieces(sharded: ShardedStateDict) -> list[Piece]:
    """What this rank has to write of ``sharded``: the main replicas, with their checksums. Tensors are not copied.

    Weights that the engine keeps in FP8 (--fp8-param-gather) are written in bfloat16, as mcore loads them: a checkpoint
    holds plain tensors only. Raises CheckpointError naming the tensors that hold NaN or Inf.
    """
    force_all_tensors_to_non_fp8(sharded)
    pieces, tensors = [], []
    for item in nested_values(sharded):
        if not is_main_replica(item.replica_id):
            continue
        if isinstance(item, ShardedObject):
            data = to_plain(item.unique_key, item.data) if is_extra_state(item.unique_key) else item.data
            serialized = _serialized([data])
            pieces.append(Piece(item.unique_key, serialized, checksum(serialized)))
        elif item.data is None or item.data.numel() or not math.prod(item.global_shape):
            tensors.append(item)
    datas = [_data(item) for item in tensors]
    damaged = []
    for item, data, found in zip(tensors, datas, examine(datas), strict=True):
        if not found.finite:
            damaged.append((item, data))
        pieces.append(Piece(item.key, data, found.checksum, tuple(item.global_offset), tuple(item.global_shape)))
    if damaged:
        raise CheckpointError(_told_damage(damaged))
    return pieces


def _data(item: ShardedTensor) -> torch.Tensor:
    assert item.flattened_range is None and item.data is not None, f"{item.key} is not a rectangle of data"
    return item.data.detach()[(None,) * item.prepend_axis_num]  # axes that only the whole tensor has (experts)


def _told_damage(damaged: list[tuple[ShardedTensor, torch.Tensor]]) -> str:
    item, data = damaged[0]
    place = first_not_finite(data)
    where = tuple(start + inside for start, inside in zip(item.global_offset, place, strict=True))
    value = float(data[place])
    others = ", ".join(other.key for other, _ in damaged[1:4]) + (" ..." if len(damaged) > 4 else "")
    more = f", and {len(damaged) - 1} more parts are not finite ({others})" if len(damaged) > 1 else ""
    return (
        f"{item.key} holds {value} at {list(where)} on rank {torch.distributed.get_rank()}{more}: nothing was saved, "
        "and the earlier checkpoints are untouched; go on from one of them, with --ckpt-step from one before the "
        "values went wrong"
    )


def _serialized(data: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(data, stream)
    return stream.getvalue()

"""What a rank has to write of the run's state: parts of global tensors, and objects, as `shard_writing.Piece`.

This is the only step of a save that looks at the run's own memory. It takes the checksums there, and refuses NaN and
Inf: a run that went on from them would be lost, with the good checkpoints pruned one by one. It also refuses a tensor
that ranks hold and each leaves to another: what nobody writes, no later step can miss.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

from umv2_megatron.checkpoint.agreement import attempt, gather, tell_all
from umv2_megatron.checkpoint.fp8_state import to_plain
from umv2_megatron.checkpoint.shard_writing import Piece
from umv2_megatron.checkpoint.tensor_checks import checksum, examine, first_not_finite
from umv2_megatron.checkpoint.torch_dist_io import is_extra_state, unique_key
from umv2_megatron.durable_files import CheckpointError

_DIGEST = 8


def plan_pieces(sharded: ShardedStateDict, copies: bool = False) -> list[Piece]:
    """What this rank has to write of ``sharded``: the main replicas, with their checksums. Tensors are not copied.

    copies: all that this rank holds instead, also what another rank holds as well; each part once.
    Weights that the engine keeps in FP8 (--fp8-param-gather) are written in bfloat16, as mcore loads them: a checkpoint
    holds plain tensors only. Raises CheckpointError naming the tensors that hold NaN or Inf.
    """
    force_all_tensors_to_non_fp8(sharded)
    pieces, tensors = [], []
    taken: set[tuple[Any, ...]] = set()
    for item in nested_values(sharded):
        part = (unique_key(item), *(getattr(item, name, ()) for name in ("global_offset", "local_shape")))
        if part in taken if copies else not is_main_replica(item.replica_id):
            continue
        taken.add(part)
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


def held_keys(sharded: ShardedStateDict) -> set[str]:
    """Names of all tensors and objects of which this rank holds a part or a copy, whoever writes them."""
    return {unique_key(item) for item in nested_values(sharded)}


def check_written(held: set[str], pieces: Sequence[Piece]) -> None:
    """Raise CheckpointError naming a tensor or object that some rank holds and no rank writes. Collective.

    held: names on this rank. Only digests of 8 bytes are gathered, on rank 0: a rank has thousands of names.
    """
    written = {piece.key for piece in pieces}
    left_to_others = _digests(held - written)
    lost: frozenset[bytes] = frozenset()
    if everyone := gather((b"".join(_digests(written)), b"".join(left_to_others))):
        found, wanted = (frozenset().union(*map(_split, joined)) for joined in zip(*everyone, strict=True))
        lost = wanted - found
    lost = tell_all(lost)
    if lost:
        names = [left_to_others[digest] for digest in lost if digest in left_to_others]
        attempt("checking that all is written", lambda: _refuse(names))


def _refuse(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(
            f"{min(names)}{more} would be missing: each rank that holds it leaves it to another to write; nothing was "
            "saved, and the earlier checkpoints are untouched"
        )


def _digests(keys: Iterable[str]) -> dict[bytes, str]:
    return {hashlib.blake2b(key.encode(), digest_size=_DIGEST).digest(): key for key in keys}


def _split(joined: bytes) -> Iterable[bytes]:
    return (joined[start : start + _DIGEST] for start in range(0, len(joined), _DIGEST))


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

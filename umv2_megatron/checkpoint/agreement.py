"""What ranks find out together: an error of one is raised on all of them, so that nobody waits for it in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from umv2_megatron.checkpoint.many_objects import many_objects
from umv2_megatron.durable_files import CheckpointError

T = TypeVar("T")


def raise_together(error: BaseException | None, doing: str) -> None:
    """Raise the same CheckpointError on every rank when any rank passes an error. Collective over all ranks.

    The first failing rank's error decides; a CheckpointError keeps its kind and words, anything else is told with the
    rank and what it was `doing`.
    """
    mine: CheckpointError | None = None
    if isinstance(error, CheckpointError):
        mine = error
    elif error is not None:
        rank = torch.distributed.get_rank()
        mine = CheckpointError(f"{doing} failed on rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}")
    errors: list[CheckpointError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, mine)
    first = next((item for item in errors if item is not None), None)
    if first is not None:
        raise first from error


def attempt(doing: str, action: Callable[[], T]) -> T:
    """Run `action` on this rank, then let all ranks agree: returns its result, or raises on every rank."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    raise_together(failure, doing)
    return result  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """The value of every rank, in order, on rank 0; an empty list on the others. Collective over all ranks."""
    everyone: list[Any] | None = None
    if torch.distributed.get_rank() == 0:
        everyone = [None] * torch.distributed.get_world_size()
    with many_objects():
        torch.distributed.gather_object(value, everyone, dst=0)
    return everyone or []


def tell_all(value: T) -> T:
    """Rank 0's value on every rank. Collective over all ranks."""
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]

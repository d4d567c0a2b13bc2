"""What the first rank finds out for all: its result, or its refusal, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from umv2_megatron.checkpoint.agreement import attempt, tell_all
from umv2_megatron.config.usage import UsageError
from umv2_megatron.durable_files import CheckpointError

T = TypeVar("T")


def on_rank_0(doing: str, action: Callable[[], T]) -> T:
    """The result of ``action``, which runs on the first rank. Collective over all ranks.

    Every rank raises its ``ValueError`` as a ``UsageError``; other errors are raised as ``agreement.attempt`` does.
    """
    told: list[tuple[T | None, str | None]] = [(None, None)]

    def act() -> None:
        if torch.distributed.get_rank() == 0:
            try:
                told[0] = action(), None
            except CheckpointError:
                raise
            except ValueError as error:
                told[0] = None, str(error)

    attempt(doing, act)
    result, refusal = tell_all(told[0])
    if refusal is not None:
        raise UsageError(refusal)
    return result  # type: ignore[return-value]

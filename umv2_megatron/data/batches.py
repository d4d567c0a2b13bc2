"""From mcore's datasets to the batches of one rank: which samples, in which order, and what the model gets of them.

Order of samples: an optimizer step takes the next ``global_batch_size`` samples of the (already shuffled) dataset. They
are cut into micro-batches of ``micro_batch_size x data-parallel size``, and each rank takes its slice. So a step sees
the same samples on any number of ranks, and ``consumed_samples`` alone says where a run stands.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.utils.data import DataLoader, Dataset

from umv2_megatron.data.documents import STARTS, collate_documents, packed
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.parallel.launch import STOP_SIGNALS

_asks = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters  # mcore 0.19 does
_NOT_HYBRID: dict[str, Any] = {"is_hybrid_cp": False} if _asks else {}

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


class RankSampler:
    """Yields the sample indices of each micro-batch of this data-parallel rank, from ``consumed_samples`` on.

    Args:
        total_samples: samples of the dataset; the last ones that fill no whole micro-batch over all ranks are left out.
        consumed_samples: samples that all ranks together have used so far.
        micro_batch_size: samples per rank and forward pass.
        rank, world_size: of the data-parallel group.
    """

    def __init__(self, total_samples: int, consumed_samples: int, micro_batch_size: int, rank: int, world_size: int):
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return max(0, self.total_samples - self.consumed_samples) // (self.micro_batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro_batch_size * self.world_size
        first = self.consumed_samples + self.rank * self.micro_batch_size
        for start in range(first, first + len(self) * step, step):
            yield list(range(start, start + self.micro_batch_size))


def batch_iterator(
    dataset: Dataset | None,
    consumed_samples: int,
    micro_batch_size: int,
    num_workers: int,
    stages: int | None = None,
    apart_at: int | None = None,
) -> Any:
    """An iterator over this rank's micro-batches (a list of them, one per virtual stage, with ``stages``).

    Returns None on a pipeline stage that needs no data. Ranks of one tensor- or context-parallel group read the same
    samples. ``apart_at``: the end-of-document token, where documents are kept apart (``documents.py``).
    """
    if dataset is None:
        return [None] * stages if stages else None
    sampler = RankSampler(
        len(dataset),  # type: ignore[arg-type]
        consumed_samples,
        micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )

    def one() -> Iterator[dict[str, torch.Tensor]]:
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=None if apart_at is None else collate_documents(apart_at),
            pin_memory=torch.cuda.is_available(),
            # a generator of its own, so that making a loader does not move the training's random state
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_parent,
        )
        return iter(loader)

    return [one() for _ in range(stages)] if stages else one()


def _leave_signals_to_parent(worker: int) -> None:
    """A stop request may be sent to every process of a job (SLURM does); the loaders must live until the rank has
    saved. They end when their rank closes them or is gone."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def next_batch(iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The next micro-batch on this rank's device: tokens, labels, position_ids [b, s] int64, loss_mask [b, s] float32,
    attention_mask (None: causal), packed_seq_params (None: one document a sample; otherwise b is 1 and s that of all
    samples). Under context parallelism each rank keeps its part of the sequence."""
    loaded = next(iterator)
    batch: dict[str, torch.Tensor | None] = {
        key: loaded[key].to(cpu_platform.device(), non_blocking=True) for key in KEYS if key in loaded
    }
    batch.setdefault("attention_mask", None)
    if STARTS in loaded:
        return packed(batch, loaded[STARTS])
    return {**part_of_context_rank(batch), "packed_seq_params": None}


def part_of_context_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """The tensors [b, s, ...] of a batch cut to this context-parallel rank's chunks of the sequence."""
    group = parallel_state.get_context_parallel_group()  # without it, mcore 0.19 takes all ranks
    return get_batch_on_this_cp_rank(batch, cp_group=group, **_NOT_HYBRID)

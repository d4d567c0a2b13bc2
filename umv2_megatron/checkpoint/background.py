"""--async-save: a checkpoint is copied in the step of the save, written by other processes, and published steps later.

    start      pieces with their checksums (NaN and Inf are refused here, as in any save), temporary directory, a copy
               of the pieces in main memory; each rank's writer process begins
    written    asked after every step: have the writers of all ranks ended?
    finish     each rank takes the result of its writer; rank 0 publishes, or all ranks raise the first error

One save is in flight at most. All ranks call the same method at the same step; what a step does next never depends on
how far the writers are, so that an interrupted run does the same as another.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch

from umv2_megatron.checkpoint.agreement import attempt
from umv2_megatron.checkpoint.places import Place, SharedPlace
from umv2_megatron.checkpoint.shard_writing import Piece
from umv2_megatron.checkpoint.snapshot import Snapshot
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.checkpoint.writer_process import WriterProcess
from umv2_megatron.parallel import cpu_platform


@dataclass(frozen=True)
class _InFlight:
    place: Place
    iteration: int
    bytes_needed: int
    common: dict[str, Any]
    config: dict[str, Any]


class BackgroundSaves:
    """Saves in the background, into ``store`` where no other place is given. Its process is started here: make it
    before the model, whose building hides the seconds that the process takes to start."""

    def __init__(self, store: CheckpointStore) -> None:
        self._place = SharedPlace(store)
        self._snapshot = Snapshot()
        self._writer = WriterProcess(torch.distributed.get_rank(), self._snapshot.descriptor)
        self._in_flight: _InFlight | None = None

    @property
    def in_flight(self) -> int | None:
        """The iteration of the checkpoint that is not yet published, the same on all ranks."""
        return None if self._in_flight is None else self._in_flight.iteration

    @property
    def writer_pid(self) -> int:
        """Process id of this rank's writer."""
        return self._writer.pid

    def start(
        self,
        iteration: int,
        pieces: list[Piece],
        common: dict[str, Any],
        config: dict[str, Any],
        place: Place | None = None,
    ) -> None:
        """Copy ``pieces`` and begin to write them. Collective; raises CheckpointError on every rank when any fails."""
        assert self._in_flight is None, "the save before is not finished"
        place = place or self._place
        needed = place.begin(iteration, pieces)
        placed = attempt("copying the state to save", lambda: self._snapshot.take(pieces))
        self._writer.write(place.store.temporary_path(iteration), self._snapshot.size, placed)
        # training goes on and changes what the dictionaries may refer to
        self._in_flight = _InFlight(place, iteration, needed, copy.deepcopy(common), config)

    def written(self) -> bool:
        """Whether the writers of all ranks have ended, well or not. Collective, where a save is in flight."""
        if self._in_flight is None:
            return False
        done = torch.tensor([float(self._writer.done())], device=cpu_platform.device())
        torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
        return bool(done.item())

    def finish(self) -> int | None:
        """Wait for the writers and publish; returns the iteration, None where no save was in flight. Collective.

        Raises CheckpointError on every rank when any rank fails; the earlier checkpoints are then untouched.
        """
        saving, self._in_flight = self._in_flight, None
        if saving is None:
            return None
        try:
            saving.place.publish(
                saving.iteration, self._writer.result, saving.bytes_needed, saving.common, saving.config
            )
        except BaseException:
            saving.place.discard(saving.iteration)
            raise
        return saving.iteration

    def close(self) -> None:
        """End the process and give the memory back."""
        with contextlib.closing(self._snapshot):
            self._writer.close()

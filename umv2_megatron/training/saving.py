"""When a run's checkpoints are published, and who is told: at once, or with --async-save some steps later."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from umv2_megatron.checkpoint import save_load
from umv2_megatron.checkpoint.background import BackgroundSaves
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.observation.events import EventLog
from umv2_megatron.training.initialize import TrainingState, print_rank_0
from umv2_megatron.training.reporting import Reporter


class Saver:
    """Saves the present state; all methods are collectives, and raise CheckpointError on all ranks alike.

    Args:
        store: where checkpoints are published.
        state: model, optimizer, schedule, progress.
        config: what a checkpoint's config.json says of the run.
        reporter: where numbers go.
        events: where the history goes.
        background: of --async-save, else None.
    """

    def __init__(
        self,
        store: CheckpointStore,
        state: TrainingState,
        config: dict[str, Any],
        reporter: Reporter,
        events: EventLog,
        background: BackgroundSaves | None,
    ):
        self.store = store
        self.state = state
        self.config = config
        self.reporter = reporter
        self.events = events
        self.background = background
        self._last_saved = state.progress.iteration
        self._begun = self._blocked = 0.0

    def save(self, *, wait: bool) -> None:
        """A checkpoint of the present iteration, unless there is one. ``wait``: on return it is published, as is any
        that was in flight; without it --async-save lets it be written while training goes on."""
        self.finish()
        iteration = self.state.progress.iteration
        if self._last_saved == iteration:
            return
        self.reporter.flush()
        self._begun = time.perf_counter()
        in_background = self.background is not None and not wait
        save_load.save_checkpoint(
            self.store,
            iteration,
            self.state.chunks,
            self.state.optimizer,
            self.state.scheduler,
            dataclasses.asdict(self.state.progress),
            self.config,
            self.background if in_background else None,
        )
        self._last_saved = iteration
        self._blocked = time.perf_counter() - self._begun
        if not in_background:
            self._tell(iteration)

    def look(self) -> None:
        """Publish what is in flight, if it is written."""
        if self.background is not None and self.background.written():
            self.finish()

    def finish(self) -> None:
        """Wait for what is in flight, and publish it."""
        if self.background is None or self.background.in_flight is None:
            return
        begun = time.perf_counter()
        iteration = self.background.finish()
        assert iteration is not None
        self._blocked += time.perf_counter() - begun
        self._tell(iteration, blocked_seconds=round(self._blocked, 3))

    def _tell(self, iteration: int, **more: float) -> None:
        took = time.perf_counter() - self._begun
        print_rank_0(f" saved checkpoint of iteration {iteration} to {self.store.path(iteration)}")
        self.events.tell("checkpoint", iteration=iteration, seconds=round(took, 3), **more)
        published = {"checkpoint-iteration": iteration, "checkpoint-time": time.time(), "checkpoint-seconds": took}
        self.reporter.numbers(self.state.progress.iteration, {}, served=published)

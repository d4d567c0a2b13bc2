"""When a run's checkpoints are published, and who is told: at once, or with --async-save some steps later."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from umv2_megatron.checkpoint import save_load
from umv2_megatron.checkpoint.background import BackgroundSaves
from umv2_megatron.checkpoint.places import Place, SharedPlace
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.durable_files import NotSavedError
from umv2_megatron.observation.events import EventLog
from umv2_megatron.training.initialize import TrainingState, print_rank_0
from umv2_megatron.training.non_persistent import NonPersistent
from umv2_megatron.training.reporting import Reporter


class Saver:
    """Saves the present state; all methods are collectives, and raise CheckpointError on all ranks alike.

    Args:
        store: where persistent checkpoints are published.
        state: model, optimizer, schedule, progress.
        config: what a checkpoint's config.json says of the run.
        reporter: where numbers go.
        events: where the history goes.
        background: of --async-save, else None.
        non_persistent: of --non-persistent-save-interval, else None.
    """

    def __init__(
        self,
        store: CheckpointStore,
        state: TrainingState,
        config: dict[str, Any],
        reporter: Reporter,
        events: EventLog,
        background: BackgroundSaves | None,
        non_persistent: NonPersistent | None = None,
    ):
        self.store = store
        self.state = state
        self.config = config
        self.reporter = reporter
        self.events = events
        self.background = background
        self.non_persistent = non_persistent
        self._place: Place = SharedPlace(store)
        went_on_from_it = non_persistent is not None and non_persistent.loaded
        self._last_saved = None if went_on_from_it else state.progress.iteration
        self._begun = self._blocked = 0.0

    def save(self, *, wait: bool) -> None:
        """A persistent checkpoint of the present iteration, unless there is one. ``wait``: on return it is published,
        as is any that was in flight; without it --async-save lets it be written while training goes on."""
        self.finish()
        if self._last_saved != self.state.progress.iteration:
            self._save(SharedPlace(self.store), wait)
            self._last_saved = self.state.progress.iteration

    def save_non_persistent(self) -> None:
        """A checkpoint that the run can do without: where it cannot be written, that is told, and training goes on."""
        assert self.non_persistent is not None
        self.finish()
        try:
            self._save(self.non_persistent.place, wait=False)
        except NotSavedError as error:
            self._tell_unsaved(error)

    def _save(self, place: Place, wait: bool) -> None:
        iteration = self.state.progress.iteration
        self.reporter.flush()
        self._begun, self._place = time.perf_counter(), place
        in_background = self.background is not None and not wait
        save_load.save_checkpoint(
            place,
            iteration,
            self.state.chunks,
            self.state.optimizer,
            self.state.scheduler,
            dataclasses.asdict(self.state.progress),
            self.config,
            self.background if in_background else None,
        )
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
        try:
            iteration = self.background.finish()
        except NotSavedError as error:
            self._tell_unsaved(error)
            return
        assert iteration is not None
        self._blocked += time.perf_counter() - begun
        self._tell(iteration, blocked_seconds=round(self._blocked, 3))

    def end(self) -> None:
        """All iterations are done: non-persistent checkpoints have had their use, if the end is saved for good."""
        if self.non_persistent is not None and self._last_saved == self.state.progress.iteration:
            self.non_persistent.end()

    def _tell(self, iteration: int, **more: float) -> None:
        took, place = time.perf_counter() - self._begun, self._place
        if place.kind == "persistent":
            print_rank_0(f" saved checkpoint of iteration {iteration} to {place.store.path(iteration)}")
            self.events.tell("checkpoint", iteration=iteration, seconds=round(took, 3), **more)
            served = {"checkpoint-iteration": iteration, "checkpoint-time": time.time(), "checkpoint-seconds": took}
        else:
            whose = "every rank's part of the local" if place.alone else place.kind
            path = place.store.path(iteration)
            print_rank_0(f" saved {whose} checkpoint {iteration} in {took:.1f} s, {'here ' * place.alone}to {path}")
            self.events.tell("checkpoint", kind=place.kind, iteration=iteration, seconds=round(took, 3), **more)
            served = {"non-persistent-iteration": iteration, "non-persistent-seconds": took}
        self.reporter.numbers(self.state.progress.iteration, {}, served=served)

    def _tell_unsaved(self, error: NotSavedError) -> None:
        text = f"{self._place.kind} checkpoint not saved, the run goes on: {error}"
        print_rank_0(f"WARNING: {text}")
        self.events.tell("unsaved", text=text)

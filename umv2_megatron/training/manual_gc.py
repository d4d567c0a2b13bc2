"""``--manual-gc``: Python's garbage collector runs on all ranks after the same steps, not on each when it likes.

A collection stops a rank for tens of milliseconds, and every other rank then waits for it in the next collective. If
each rank collects at a step of its own, the run waits at almost every step.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


class ManualCollection:
    """Inside a ``with`` block the collector runs only when this says so; without ``on`` everything stays as it is.

    Args:
        on: --manual-gc.
        interval: collect after every iteration that is a multiple of it (--manual-gc-interval); 0 is never.
        around_evaluations: collect before and after each evaluation (--no-manual-gc-eval turns it off).
    """

    def __init__(self, on: bool, interval: int, around_evaluations: bool):
        self.on, self.interval, self.around_evaluations = on, interval, on and around_evaluations
        self._was_enabled = False

    def __enter__(self) -> ManualCollection:
        if self.on:
            self._was_enabled = gc.isenabled()
            gc.disable()
            gc.collect()  # what building the model has left
        return self

    def __exit__(self, *_: object) -> None:
        if self.on and self._was_enabled:
            gc.enable()

    def step(self, iteration: int) -> None:
        """Called with the number of finished iterations."""
        if self.on and self.interval and iteration % self.interval == 0:
            gc.collect()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation: what training has left goes before, what the evaluation has made goes after it."""
        if self.around_evaluations:
            gc.collect()
        yield
        if self.around_evaluations:
            gc.collect(generation=0)

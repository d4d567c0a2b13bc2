"""The thread that generates: a step of each request in turn, so that a long one holds up no short one.

Requests share the model by turns, not in batches. A step is one pass of the model, over a whole prompt or over one new
token. Choices of one request follow each other, so at most as many caches of keys and values exist as there are
requests.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from umv2_megatron.serving.choices import Piece
from umv2_megatron.serving.errors import ApiError, failed, overloaded, stopping

log = logging.getLogger("umv2_megatron.serving")

Deliver = Callable[["Piece | ApiError | None"], None]
"""Takes the pieces of an answer and then None, or an error. Called in the thread of the engine."""


class Job:
    """A request in the engine.

    Args:
        pieces: of its choices, one after another.
        deliver: see ``Deliver``.
    """

    def __init__(self, pieces: Iterator[Piece], deliver: Deliver) -> None:
        self._pieces = pieces
        self._deliver = deliver
        self._cancelled = False

    def cancel(self) -> None:
        """End it at its next turn; nobody takes its answer. From any thread, also when it has ended."""
        self._cancelled = True

    def step(self) -> bool:
        """One step; whether more follow. Every fault goes to the client, so that the thread lives on."""
        try:
            if not self._cancelled and (piece := next(self._pieces, None)) is not None:
                self._deliver(piece)
                return True
            self.end(None)
        except Exception:
            log.exception("a generation failed")
            self.end(failed())
        return False

    def end(self, last: ApiError | None) -> None:
        """Tell the client that nothing follows, and free the cache."""
        self._pieces = iter(())
        try:
            self._deliver(last)
        except RuntimeError:  # the event loop has closed: nobody waits
            log.debug("an answer came too late")


class Engine:
    """Runs jobs in a thread of its own.

    Args:
        max_concurrent: jobs that it takes at a time.
    """

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self._turns: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._inside = 0
        self._lock = threading.Lock()
        self._deadline: float | None = None
        threading.Thread(target=self._run, name="umv2 generate", daemon=True).start()

    def check(self) -> None:
        """Raise what ``submit`` would raise now, before work is spent on a request."""
        self.check_running()
        if self._inside >= self._max_concurrent:
            raise overloaded(self._max_concurrent)

    def check_running(self) -> None:
        """Raise ``ApiError`` from ``stop`` on."""
        if self._deadline is not None:
            raise stopping()

    def submit(self, pieces: Iterator[Piece], deliver: Deliver) -> Job:
        """Start a job. Raises ``ApiError`` where all places are taken, and when the server ends."""
        job = Job(pieces, deliver)
        with self._lock:
            self.check()
            self._inside += 1
        self._turns.put(job)
        return job

    def stop(self, grace: float) -> None:
        """Take no jobs from now on, and end those that still run after ``grace`` seconds. Safe in a signal handler."""
        if self._deadline is None:
            self._deadline = time.monotonic() + grace

    def _run(self) -> None:
        while True:
            job = self._turns.get()
            if self._deadline is not None and time.monotonic() > self._deadline:
                job.end(stopping())
            elif job.step():
                self._turns.put(job)
                continue
            with self._lock:
                self._inside -= 1

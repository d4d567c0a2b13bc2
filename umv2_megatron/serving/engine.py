"""The thread that generates: a step of each request in turn, so that a long one holds up no short one.

Requests share the model by turns, not in batches. A step is one pass of the model, over a whole prompt or over one new
token. Choices of one request follow each other, so at most as many caches of keys and values exist as there are
requests.
"""

from __future__ import annotations

import logging
import queue
import threading
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
        self._ended = False
        self._lock = threading.Lock()

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
        """Tell the client that nothing follows, and free the cache; only the first call does. From any thread."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
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
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()
        self._stopping = False
        threading.Thread(target=self._run, name="umv2 generate", daemon=True).start()

    def check(self) -> None:
        """Raise what ``submit`` would raise now, before work is spent on a request."""
        self.check_running()
        if len(self._jobs) >= self._max_concurrent:
            raise overloaded(self._max_concurrent)

    def check_running(self) -> None:
        """Raise ``ApiError`` from ``stop`` on."""
        if self._stopping:
            raise stopping()

    def submit(self, pieces: Iterator[Piece], deliver: Deliver) -> Job:
        """Start a job. Raises ``ApiError`` where all places are taken, and when the server ends."""
        job = Job(pieces, deliver)
        with self._lock:
            self.check()
            self._jobs.add(job)
        self._turns.put(job)
        return job

    def stop(self, grace: float) -> None:
        """Take no jobs from now on, and end those that still run after ``grace`` seconds."""
        self._stopping = True
        timer = threading.Timer(grace, self._break_off)
        timer.daemon = True
        timer.start()

    def _break_off(self) -> None:
        """In a thread of its own, because that of the engine may be inside a long pass of the model."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.end(stopping())

    def _run(self) -> None:
        while True:
            job = self._turns.get()
            if job.step():
                self._turns.put(job)
                continue
            with self._lock:
                self._jobs.discard(job)

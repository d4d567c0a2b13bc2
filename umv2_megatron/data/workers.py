"""Worker processes of a rank: each is given parts and writes them itself, so that no results travel between processes.

Parts that follow each other go to one worker where possible, because it then decompresses a file once. A worker that
has none left takes over the second half of another's.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from umv2_megatron.data.corpus import CorpusError
from umv2_megatron.data.encoding import Encoder, Work
from umv2_megatron.data.parts import Part, shares

_REPORT_SECONDS = 0.25
_POLL_SECONDS = 0.5
_SIGNAL_SECONDS = 1.0


class Workers:
    """``count`` processes; with one, this process does the work. Use as a context: leaving it ends them.

    Create it before anything is opened or locked that the processes should not hold: they are forked.
    """

    def __init__(self, count: int) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        if count == 1:
            return
        # Forked workers start in milliseconds; torch, whose threads forking would not survive, is not loaded here.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def make(self, parts: Sequence[Part], encoder: Encoder) -> Iterator[Optional[Work]]:
        """Make all ``parts``; yields what was done, and None now and then so that the caller can look around.

        Raises ``CorpusError`` as ``Encoder.make`` does, and for a worker that died.
        """
        if not self._processes:
            for part in parts:
                yield from encoder.make(part)
            encoder.close()
            return
        queues = [deque(share) for share in shares(parts, len(self._processes))]
        busy: dict[Any, int] = {}
        for i, pipe in enumerate(self._pipes):
            self._give(pipe, i, queues, busy, encoder)
        while busy:
            found: list[Any] = multiprocessing.connection.wait(list(busy), _POLL_SECONDS)
            for ready in found:
                try:
                    answer = ready.recv()
                except (EOFError, OSError):
                    raise self._death(busy[ready]) from None
                if isinstance(answer, Work):
                    yield answer
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    self._give(ready, busy.pop(ready), queues, busy, None)
            yield None

    def _death(self, i: int) -> CorpusError:
        """What to raise when worker ``i`` has died."""
        process = self._processes[i]
        process.join(_SIGNAL_SECONDS)
        if process.exitcode == -signal.SIGTERM:
            time.sleep(_SIGNAL_SECONDS)  # who ends all processes of a job signals this one too, and it ends here
            return CorpusError("a worker process was terminated")
        return CorpusError("a worker process died (out of memory?): use fewer --workers or less --max-line-mb")

    def _give(self, pipe: Any, i: int, queues: list[deque], busy: dict, encoder: Optional[Encoder]) -> None:
        """Give worker ``i`` its next part, if there is one."""
        if encoder is not None:
            pipe.send(encoder)
        if not queues[i]:
            richest = max(queues, key=len)
            for _ in range((len(richest) + 1) // 2):
                queues[i].appendleft(richest.pop())
        if queues[i]:
            pipe.send(queues[i].popleft())
            busy[pipe] = i


def _serve(pipe: Any, parent: int) -> None:
    """A worker: takes encoders and parts from ``pipe`` until its parent is gone."""
    # Signals are left to the parent, and it ends with the parent: a killed parent cannot tell its workers to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    encoder: Optional[Encoder] = None
    while True:
        try:
            given = pipe.recv()
        except (EOFError, OSError):
            return
        if isinstance(given, Encoder):
            encoder = given
            continue
        assert encoder is not None
        try:
            _make(encoder, given, pipe)
        except Exception as error:
            pipe.send(error)
        else:
            pipe.send("done")


def _make(encoder: Encoder, part: Part, pipe: Any) -> None:
    """Make a part and tell of it, not too often."""
    waiting: list[Work] = []
    last = time.monotonic()
    for work in encoder.make(part):
        waiting.append(work)
        if time.monotonic() > last + _REPORT_SECONDS:
            pipe.send(Work(*map(sum, zip(*waiting))))
            waiting.clear()
            last = time.monotonic()
    if waiting:
        pipe.send(Work(*map(sum, zip(*waiting))))

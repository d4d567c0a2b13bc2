"""--log-straggler: which rank makes the others wait.

All ranks of a run take equally long for a step, because they wait for each other. What tells a slow one is the time in
which it does not wait:

- CPU: wall-clock time of the training steps, without the time in which the main thread stands in a collective. A thread
  looks every few milliseconds where the main thread is; in torch.distributed, or at a call of ``wait()``, it waits.
  Time in the data loader, in the file system or without a core counts as the rank's own.
- GPU: the host does not wait in collectives there. What is measured is the device's time between begin and end of the
  forward passes, which contains exchanges of tensor- and memory-parallel ranks. This has not been run on a GPU.

mcore's ``StragglerDetector`` needs CUDA events, and so says nothing on a CPU.

Stages of a pipeline have different work, so a rank is compared with the median of its own stage.
"""

from __future__ import annotations

import contextlib
import linecache
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.reporting import Reporter

_LOOK_EVERY = 0.003
"""Seconds between two looks at the main thread."""


class StragglerReport:
    """Measures this rank's own time, and reports the slowest ranks; does nothing without --log-straggler.

    Args:
        run: the resolved configuration.
        chunks: the model, whose forward passes are timed on a GPU.
        reporter: where it is told.
    """

    def __init__(self, run: RunConfig, chunks: list[torch.nn.Module], reporter: Reporter):
        self.active = run.training.log_straggler
        self.count = run.training.straggler_minmax_count
        self.reporter = reporter
        self._steps = 0
        self._own = 0.0
        self._marks: list[tuple[Any, Any]] = []
        self._in_step = False
        if not self.active:
            return
        self._places: list[tuple[str, int]] = [("", 0)] * torch.distributed.get_world_size()
        place = (socket.gethostname(), parallel_state.get_pipeline_model_parallel_rank())
        torch.distributed.all_gather_object(self._places, place)
        self._watch = None if cpu_platform.device().type == "cuda" else _MainThread()
        if self._watch is None:
            for chunk in chunks:
                chunk.register_forward_pre_hook(self._begin)
                chunk.register_forward_hook(self._end)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a training step."""
        if not self.active:
            yield
            return
        self._in_step = True
        begin, waited = time.perf_counter(), self._watch.waited if self._watch else 0.0
        try:
            yield
        finally:
            self._in_step = False
        self._steps += 1
        if self._watch is not None:
            self._own += time.perf_counter() - begin - (self._watch.waited - waited)

    def report(self, iteration: int) -> None:
        """Tell who was slowest since the last report. A collective."""
        if not self.active or not self._steps:
            return
        if self._marks:
            cpu_platform.synchronize()
            self._own = sum(cpu_platform.milliseconds(begin, end) for begin, end in self._marks) / 1000
        own = torch.tensor([max(0.0, self._own) / self._steps], device=cpu_platform.device())
        gathered = [torch.empty_like(own) for _ in self._places]
        torch.distributed.all_gather(gathered, own)
        self._steps, self._own, self._marks = 0, 0.0, []
        seconds = torch.cat(gathered).tolist()
        line, numbers = described(seconds, self._places, self.count)
        self.reporter.line(line)
        self.reporter.numbers(iteration, numbers)

    def close(self) -> None:
        """End the thread."""
        if self.active and self._watch is not None:
            self._watch.stop()

    def _begin(self, *_: Any) -> None:
        if self._in_step:
            self._mark = cpu_platform.mark()

    def _end(self, *_: Any) -> None:
        if self._in_step:
            self._marks.append((self._mark, cpu_platform.mark()))


def described(seconds: list[float], places: list[tuple[str, int]], count: int) -> tuple[str, dict[str, float | None]]:
    """The line and the metrics of a report.

    Args:
        seconds: own time per step of every rank.
        places: host and pipeline stage of every rank.
        count: how many ranks are named at either end.
    """
    medians = {
        stage: statistics.median(own for own, (_, other) in zip(seconds, places) if other == stage)
        for stage in {stage for _, stage in places}
    }
    ratios = [own / (medians[stage] or 1e-9) for own, (_, stage) in zip(seconds, places)]
    order = sorted(range(len(seconds)), key=lambda rank: (-ratios[rank], rank))

    def told(ranks: list[int]) -> str:
        return ", ".join(
            f"rank {rank} on {places[rank][0]} {1000 * seconds[rank]:.1f} ms, {ratios[rank]:.2f} x median"
            for rank in ranks
        )

    slowest = order[0]
    line = f" own time per step, without waiting for others: slowest {told(order[:count])}"
    line += f" | fastest {told(order[::-1][:count])}"
    return line, {
        "straggler/rank": slowest,
        "straggler/seconds": seconds[slowest],
        "straggler/ratio": ratios[slowest],
        "straggler/median-seconds": medians[places[slowest][1]],
    }


class _MainThread:
    """Seconds that the main thread has spent waiting for other ranks, by looking at it now and then."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._main = threading.main_thread().ident or 0
        self._over = threading.Event()
        self._known: dict[tuple[Any, int], bool] = {}
        self._thread = threading.Thread(target=self._look, name="straggler report", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._over.wait(_LOOK_EVERY):
            frame = sys._current_frames().get(self._main)
            now = time.perf_counter()
            if frame is not None and self._waits(frame):
                self.waited += now - last
            last = now

    def _waits(self, frame: Any) -> bool:
        place = (frame.f_code, frame.f_lineno)
        if place not in self._known:
            name = frame.f_code.co_filename
            line = linecache.getline(name, frame.f_lineno or 0)
            self._known[place] = "/torch/distributed/" in name or ".wait(" in line
        return self._known[place]

"""``--profile``: look into some iterations, with torch.profiler or with an outer nsys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from umv2_megatron.config.run_config import RunConfig


class StepProfiler:
    """Profiles the iterations from --profile-step-start up to --profile-step-end on the ranks of --profile-ranks.

    With --use-pytorch-profiler a Chrome trace is written to ``<save>/profile/rank<r>.json`` (or ./profile); without
    it the CUDA profiler is switched on and off, which ``nsys profile --capture-range=cudaProfilerApi`` waits for.
    """

    def __init__(self, run: RunConfig, iteration: int):
        training = run.training
        ranks = {int(rank) for rank in training.profile_ranks.split(",") if rank.strip()}
        self.active = training.profile and torch.distributed.get_rank() in ranks
        self.first, self.end = training.profile_step_start, training.profile_step_end
        self.use_torch = training.use_pytorch_profiler
        self.directory = Path(training.save or ".") / "profile"
        self._profiler: Any = None
        self._running = False
        self.step(iteration)

    def step(self, iteration: int) -> None:
        """Called with the number of finished iterations."""
        if not self.active:
            return
        if not self._running and iteration + 1 == self.first:
            self._start()
        elif self._running and iteration + 1 == self.end:
            self._stop()

    def _start(self) -> None:
        self._running = True
        if self.use_torch:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        elif torch.cuda.is_available():
            torch.cuda.cudart().cudaProfilerStart()

    def _stop(self) -> None:
        self._running = False
        if self._profiler is not None:
            self._profiler.stop()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.directory / f"rank{torch.distributed.get_rank()}.json"))
            self._profiler = None
        elif torch.cuda.is_available():
            torch.cuda.cudart().cudaProfilerStop()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()

"""``--profile``: where the time of some iterations goes, as a table and as a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import get_model_config

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.model_ranges import WatchedModel
from umv2_megatron.training.ranges import NO_RANGES, NoRanges, Ranges, rows_of, table
from umv2_megatron.user_paths import local_folder


class StepProfiler:
    """Profiles the iterations from --profile-step-start up to --profile-step-end on the ranks of --profile-ranks.

    Each of these ranks prints a table of named ranges (docs/profiling.md) and writes it to
    ``<save>/profile/rank<r>-ranges.json`` (or ./profile). With --use-pytorch-profiler a Chrome trace that has the
    ranges by name is written to ``rank<r>.json`` beside it; without it the CUDA profiler is switched on and off, which
    ``nsys profile --capture-range=cudaProfilerApi`` waits for, and the ranges are given to NVTX.

    Args:
        run: the configuration.
        iteration: finished iterations.
        chunks: the model, whose parts are watched while the profiler runs.
    """

    def __init__(self, run: RunConfig, iteration: int, chunks: list[torch.nn.Module]):
        training = run.training
        ranks = {int(rank) for rank in training.profile_ranks.split(",") if rank.strip()}
        self.rank = torch.distributed.get_rank()
        self.active = training.profile and self.rank in ranks
        self.first, self.end = training.profile_step_start, training.profile_step_end
        self.use_torch = training.use_pytorch_profiler
        self.directory = local_folder(training.save) / "profile"
        self.ranges: NoRanges = NO_RANGES
        """What the training step opens its ranges with."""
        self._chunks = chunks
        self._profiler: Any = None
        self._watched: WatchedModel | None = None
        self._iteration = self._started_at = iteration
        if self.active and iteration + 1 > self.first:
            print(
                f"--profile: nothing is profiled on rank {self.rank}, because the run goes on at iteration "
                f"{iteration + 1}, after --profile-step-start {self.first}",
                flush=True,
            )
        self.step(iteration)

    def step(self, iteration: int) -> None:
        """Called with the number of finished iterations."""
        self._iteration = iteration
        if not self.active:
            return
        if self._watched is None and iteration + 1 == self.first:
            self._start()
        elif self._watched is not None and iteration + 1 == self.end:
            self._stop()

    def _start(self) -> None:
        self._started_at = self._iteration
        if self.use_torch:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        elif torch.cuda.is_available():
            torch.cuda.cudart().cudaProfilerStart()
        cpu_platform.synchronize()
        ranges = Ranges(_named_to_torch if self.use_torch else _named_to_nvtx)
        self._watched = WatchedModel(self._chunks, ranges)
        self.ranges = ranges
        config = get_model_config(self._chunks[0])
        self._finalize = config.finalize_model_grads_func

        def finalize(*args: Any, **kwargs: Any) -> None:
            with ranges("gradient reduce"):
                self._finalize(*args, **kwargs)

        config.finalize_model_grads_func = finalize

    def _stop(self) -> None:
        assert self._watched is not None and isinstance(self.ranges, Ranges)
        whole, spent = self.ranges.stop()
        self._watched.release()
        get_model_config(self._chunks[0]).finalize_model_grads_func = self._finalize
        self._watched, self.ranges = None, NO_RANGES
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.directory / f"rank{self.rank}.json"))
            self._profiler = None
        elif torch.cuda.is_available():
            torch.cuda.cudart().cudaProfilerStop()
        if self._iteration > self._started_at:
            self._report(whole, spent)

    def _report(self, whole: float, spent: Any) -> None:
        first, last = self._started_at + 1, self._iteration
        steps = last - first + 1
        rows = rows_of(whole, spent, steps)
        title = f"profile of iterations {first} to {last} on rank {self.rank}: {whole / steps:.2f} ms per step"
        print(table(rows, title), flush=True)
        found = {
            "rank": self.rank,
            "first_iteration": first,
            "last_iteration": last,
            "ms_per_step": whole / steps,
            "device": str(cpu_platform.device()),
            "rows": rows,
        }
        path = self.directory / f"rank{self.rank}-ranges.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watched is not None:
            self._stop()


def _named_to_torch(name: str) -> Callable[[], None]:
    """A range of torch.profiler, and what closes it."""
    opened = torch.profiler.record_function(name)
    opened.__enter__()
    return lambda: opened.__exit__(None, None, None)


def _named_to_nvtx(name: str) -> Callable[[], None]:
    """A range of NVTX where there is CUDA, and what closes it."""
    if not torch.cuda.is_available():
        return lambda: None
    number = torch.cuda.nvtx.range_start(name)
    return lambda: torch.cuda.nvtx.range_end(number)

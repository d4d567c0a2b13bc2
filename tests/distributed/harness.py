"""Runs a function on several gloo ranks, each a process of its own, and collects what it returns.

    def ranks_agree(scale):                     # at the top level of the test's file
        x = torch.tensor([float(torch.distributed.get_rank())]) * scale
        torch.distributed.all_reduce(x)
        return x.item()

    assert run_ranks(2, ranks_agree, 10.0) == [10.0, 10.0]

Importing torch and mcore takes seconds, so a fork server imports them once (first use) and every rank is forked from
it: a rank is ready after about 0.1 s. Ranks start with the CPU platform installed, OMP_NUM_THREADS=1 and the process
group of the world joined over a file (no port to collide); mcore's groups are for the function to make. The function
is found by file and name, so it must be at the top level of its file; arguments and results travel by pickle.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{_ROOT}:{_HERE}"}


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list:
    """Call ``function(*args, **kwargs)`` on ``world_size`` ranks; returns what each rank returned, rank 0 first.

    Args:
        timeout: seconds after which all ranks are ended and the call fails.

    Raises:
        AssertionError: a rank raised, died, or ran out of time; the message holds that rank's output.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        where = (function.__code__.co_filename, function.__qualname__)
        context = _fork_server()
        jobs = [(rank, world_size, folder, where, args, kwargs, timeout) for rank in range(world_size)]
        # Not daemons: mcore's checkpoint writer starts processes of its own, which daemons may not.
        processes = [context.Process(target=_rank_main, args=job, daemon=False) for job in jobs]
        try:
            for process in processes:
                process.start()
            complaint = _wait(processes, timeout)
        finally:
            _end(processes)
        outputs = [_read(Path(folder, f"output_{rank}")) for rank in range(world_size)]
        if complaint:
            told = "\n".join(f"--- rank {rank} ---\n{text[-6000:]}" for rank, text in enumerate(outputs))
            raise AssertionError(f"{function.__name__} on {world_size} ranks: {complaint}\n{told}")
        return [pickle.loads(Path(folder, f"result_{rank}").read_bytes()) for rank in range(world_size)]


@cache
def _fork_server() -> Any:
    """The multiprocessing context whose processes are forked from one that has torch and mcore loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness_preload"])
    before = {name: os.environ.get(name) for name in _RANK_ENVIRONMENT}
    os.environ.update(_RANK_ENVIRONMENT)
    try:
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _wait(processes: list, timeout: float) -> str:
    """Wait for all ranks; returns what went wrong, "" if nothing. No rank runs on afterwards."""
    deadline = time.monotonic() + timeout
    complaint = ""
    while any(process.is_alive() for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed and not complaint:
            complaint = f"rank {failed[0]} failed (exit code {processes[failed[0]].exitcode})"
            deadline = min(deadline, time.monotonic() + 3.0)  # the others now wait for it in vain
        if time.monotonic() > deadline:
            complaint = complaint or f"still running after {timeout:.0f} s"
            _end(processes)
        time.sleep(0.01)
    for rank, process in enumerate(processes):
        process.join()
        if process.exitcode != 0 and not complaint:
            complaint = f"rank {rank} failed (exit code {process.exitcode})"
    return complaint


def _end(processes: list) -> None:
    """Kill the ranks that still run, each with the processes that it started."""
    for process in processes:
        if process.pid is not None and process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
                os.killpg(process.pid, signal.SIGKILL)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else "(no output)"


def _rank_main(
    rank: int, world_size: int, folder: str, where: tuple[str, str], args: tuple, kwargs: dict, timeout: float
) -> None:
    """What a rank does, from the fork to its result file."""
    os.setsid()
    output = os.open(os.path.join(folder, f"output_{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = _load(*where)(*args, **kwargs)
        Path(folder, f"result_{rank}").write_bytes(pickle.dumps(result))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _load(file: str, name: str) -> Callable[..., Any]:
    folder = str(Path(file).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)

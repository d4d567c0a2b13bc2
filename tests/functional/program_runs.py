"""Whole runs of pretrain_umv2.py for tests, on forked ranks that start in about 0.1 s.

    finished = train(2, tiny_run(train_iters=4, save=directory))
    assert finished.codes == [0, 0]

Ranks are forked from the fork server of tests/distributed/harness.py and call the program's own ``main`` through
``run_program``, in the environment that torchrun would give them; so exit codes, outputs and signals are the real ones.
``Job`` is for tests that interfere with a run; ``train`` waits for its end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

from harness import _fork_server  # noqa: E402

# A model of two blocks on 32 tokens: about 20 ms per step and rank.
TINY: dict[str, Any] = {
    "model_preset": "umv2-tiny",
    "num_layers": 2,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "mock_data": True,
    "tokenizer_type": "NullTokenizer",
    "num_workers": 0,
    "lr": 1e-3,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "log_interval": 1,
    "eval_iters": 0,
    "distributed_timeout_minutes": 1,
}


def tiny_run(**changes: Any) -> list[str]:
    """A command line of ``TINY`` with ``changes``; True is a switch, None leaves the setting out."""
    return command_line({**TINY, **changes})


def command_line(settings: dict[str, Any]) -> list[str]:
    """Settings by flag name, with underscores, as arguments."""
    argv: list[str] = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        elif value is not None and value is not False:
            argv += [flag, str(value)]
    return argv


@dataclass
class Finished:
    """What a run left: exit code (negative: the signal) and output of every rank."""

    codes: list[int]
    outputs: list[str]

    @property
    def text(self) -> str:
        """The output of all ranks."""
        return "\n".join(f"--- rank {rank}\n{output}" for rank, output in enumerate(self.outputs))

    @property
    def weights(self) -> str:
        """The hash of rank 0's weights that a finished run prints."""
        found = re.search(r"weights of rank 0: sha256 ([0-9a-f]{64})", self.outputs[0])
        assert found, self.text[-6000:]
        return found[1]


class Job:
    """A running program on ``world_size`` ranks. ``prepare(*arguments)`` runs on each rank before the program; it must
    be a function at the top level of its file."""

    def __init__(
        self,
        world_size: int,
        argv: list[str],
        folder: Path,
        prepare: Callable[..., None] | None = None,
        arguments: tuple = (),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"output_{rank}" for rank in range(world_size)]
        port, context = _free_port(), _fork_server()
        self._processes = [
            context.Process(target=_rank, args=(rank, world_size, port, argv, str(output), prepare, arguments))
            for rank, output in enumerate(self._outputs)
        ]
        for process in self._processes:
            process.start()

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self._processes if rank is None else [self._processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks; each leads a process group of its own."""
        return [process.pid for process in self._processes]

    @property
    def codes(self) -> list[int | None]:
        """Exit code of every rank so far, None while it runs."""
        return [process.exitcode for process in self._processes]

    def output(self) -> str:
        """What the ranks have written so far."""
        return "\n".join(path.read_text(errors="replace") for path in self._outputs if path.exists())

    def wait_for(self, pattern: str, timeout: float = 60.0) -> None:
        """Until the output matches ``pattern``; fails when the run ends before."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output()):
            assert self.running and time.monotonic() < deadline, f"{pattern!r} not in:\n{self.output()[-6000:]}"
            time.sleep(0.005)

    @property
    def running(self) -> bool:
        """Whether any rank still runs."""
        return any(process.is_alive() for process in self._processes)

    def wait(self, timeout: float = 100.0, grace: float = 8.0) -> Finished:
        """Until all ranks have ended; ``grace`` seconds after a failed one, the others are killed."""
        deadline = time.monotonic() + timeout
        while self.running:
            if any(process.exitcode not in (None, 0) for process in self._processes):
                deadline = min(deadline, time.monotonic() + grace)
                grace = timeout
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.005)
        for process in self._processes:
            process.join()
        codes = [process.exitcode for process in self._processes]
        return Finished(codes, [path.read_text(errors="replace") if path.exists() else "" for path in self._outputs])

    def kill(self) -> None:
        """End all ranks at once."""
        for process in self._processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()


def train(
    world_size: int,
    argv: list[str],
    folder: Path,
    prepare: Callable[..., None] | None = None,
    arguments: tuple = (),
    timeout: float = 100.0,
    codes: int | None = 0,
) -> Finished:
    """Run the program to its end; with ``codes`` every rank must end with that exit code."""
    job = Job(world_size, argv, folder, prepare, arguments)
    try:
        finished = job.wait(timeout)
    finally:
        job.kill()
    if codes is not None:
        assert finished.codes == [codes] * world_size, f"exit codes {finished.codes}\n{finished.text[-8000:]}"
    return finished


def losses(directory: Path | str) -> list[tuple[int, float]]:
    """(iteration, loss) of every training step recorded in ``metrics.jsonl``."""
    from umv2_megatron.training.metrics import read_metrics

    return [(record["iteration"], record["lm loss"]) for record in read_metrics(directory) if "lm loss" in record]


def _free_port() -> int:
    """A port below those that the system gives to connections, which would take it before the run listens there."""
    for _ in range(100):
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no free port among a hundred")


def _rank(
    rank: int, world_size: int, port: int, argv: list[str], output: str, prepare: Callable | None, arguments: tuple
) -> None:
    """What a rank does, from the fork to its exit code."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    # data loaders start their workers as in a program of its own, not as in a child of a fork server
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from umv2_megatron.commands import pretrain
    from umv2_megatron.training.program import run_program

    if prepare is not None:
        prepare(*arguments)
    run_program(pretrain.main, argv, "pretrain_umv2.py")

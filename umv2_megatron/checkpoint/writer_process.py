"""The process of a rank that writes shards while the rank trains: a program of its own, with no device and no ranks.

It is started anew (exec), not forked: a fork would share the rank's device context, its threads' locks and the lock of
--save. It runs at the lowest priority (nice 19, from which the kernel also derives that of its reads and writes), and
is killed by the kernel when the rank ends, however that ends: it must never write into the directory of a later job.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from umv2_megatron.durable_files import CheckpointError

_PR_SET_PDEATHSIG = 1


class WriterProcess:
    """Handle of the process of ``rank``, on the side of the rank. memory: descriptor of the snapshot (`snapshot.py`),
    which the process reads."""

    def __init__(self, rank: int, memory: int) -> None:
        self._rank = rank
        self._memory = memory
        self._busy = False
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [theirs.fileno(), self._memory, os.getpid()]
        # the modules of the rank, wherever it has found them; -c alone would look into the working directory first
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from umv2_megatron.checkpoint.writer_process import main; main{tuple(arguments)}"
        )
        # no device to be seen there, and one thread: the cores belong to the ranks
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], pass_fds=arguments[:2], env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._pipe = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self._process.pid

    def write(self, directory: Path, size: int, placed: list[Any]) -> None:
        """Have the process write the pieces ``placed`` in the snapshot of ``size`` bytes to ``directory``, as
        `write_shard` does. Returns at once; ``result`` tells the end. A process that has died in between is replaced.
        """
        assert not self._busy
        if self._process.poll() is not None:
            self._pipe.close()
            self._start()
        self._busy = True
        try:
            self._pipe.send((directory, self._rank, size, placed))
        except OSError:
            return  # it has died; `result` says so

    def done(self) -> bool:
        """Whether ``result`` need not wait."""
        return self._pipe.poll()

    def result(self) -> Any:
        """Wait for the end, and return the `WrittenShard`. Raises what the process has raised, and CheckpointError
        where it has died."""
        try:
            result = self._pipe.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
            raise CheckpointError(
                f"process {self.pid}, which writes the checkpoints of rank {self._rank} (--async-save), {how}: the "
                "checkpoint was not saved, and the published ones are untouched; look for a lack of memory on its host"
            ) from None
        finally:
            self._busy = False
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """End the process; what it has not finished stays unpublished."""
        if self._busy:
            self._process.kill()
        with contextlib.suppress(OSError):
            self._pipe.send(None)  # a closed pipe is not enough: workers of data loaders hold copies of it
        self._pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# ---------------------------------------------------------------------- in the process itself


def main(pipe: int, memory: int, parent: int) -> None:
    """Write what comes through ``pipe`` until it is closed, or None comes."""
    os.nice(19)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it had died before
    # requests to stop, which reach the whole process group, are the rank's: it lets a save finish
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    from umv2_megatron.checkpoint.shard_writing import write_shard  # torch: seconds, at low priority
    from umv2_megatron.checkpoint.snapshot import read_snapshot

    connection = Connection(pipe)
    while True:
        try:
            wanted = connection.recv()
        except EOFError:
            return
        if wanted is None:
            return
        directory, rank, size, placed = wanted
        result: Any
        try:
            result = write_shard(directory, rank, read_snapshot(memory, size, placed))
        except (OSError, RuntimeError) as error:
            result = error
        except Exception as error:
            result = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(result)

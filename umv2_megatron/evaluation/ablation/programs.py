"""The programs of trials: where they are, and how several run side by side, each with its share of the machine."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


# Becomes the command after it has asked for a SIGTERM, on which training saves and stops, when the process that started
# it is gone: killed, that one can end nothing, and a trial that went on would be in the way of the next start.
_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"launcher: error: {sys.argv[2]} cannot be started: {error.strerror}")
"""


class TrialFailed(Exception):
    """A trial's program ended with an error; the message is the program's own last words."""


def program_file(in_checkout: str, installed: str) -> Path:
    """The Python file of a program: that of the checkout which this package is part of, else the console script.

    A file and not ``-m``, because a plan's launcher may be any that takes one. Console scripts are installed together,
    so the others are where the running one is; else where pip puts them, of the environment or of the user (--user).
    Raises ``FileNotFoundError`` where there is none.
    """
    file = ROOT / in_checkout
    if file.is_file():
        return file
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    places = [Path(sys.argv[0]).absolute().parent, Path(sysconfig.get_path("scripts")), Path(user)]
    for place in places:
        if (place / installed).is_file():
            return place / installed
    raise FileNotFoundError(
        f"the program {installed} is not in {', '.join(str(place) for place in dict.fromkeys(places))}; expected it in "
        "one of them, as `pip install` leaves it there"
    )


class Programs:
    """Runs the programs of ``jobs`` trials at a time.

    The devices, or the cores, are dealt out to ``jobs`` places. With one place everything is left as it is.

    Args:
        jobs: places, at least 1.
        ranks: processes that the launcher starts for a trial.

    Raises ``ValueError`` when there are several places and the devices do not suffice, or cannot be told apart.
    """

    def __init__(self, jobs: int, ranks: int):
        self.jobs = jobs
        self._places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for environment in _shares(jobs, ranks):
            self._places.put(environment)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    @contextlib.contextmanager
    def place(self) -> Iterator[dict[str, str]]:
        """A free place, as what it adds to the environment; it is taken until the block ends."""
        environment = self._places.get()
        try:
            yield environment
        finally:
            self._places.put(environment)

    def call(self, command: list[str], *, environment: dict[str, str], log: Path) -> None:
        """Run a command, its output appended to ``log``. Raises ``TrialFailed`` with its last line when it fails."""
        with open(log, "ab") as file:
            file.write(("$ " + " ".join(command) + "\n").encode())
            file.flush()
            with self._lock:
                if self._ended:
                    raise TrialFailed("it was not started, because this program was told to end")
                process = subprocess.Popen(
                    [sys.executable, "-ISc", _WITH_PARENT, str(os.getpid()), *command],
                    stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment},
                )  # fmt: skip
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.remove(process)
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            told = [line for line in lines if ": error: " in line]
            raise TrialFailed(f"exit code {code}: {(told or lines)[-1].strip()} (all of it in {log})")

    def end(self) -> None:
        """Terminate what is running, on which training saves and stops, and start nothing more."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


def _shares(jobs: int, ranks: int) -> list[dict[str, str]]:
    """What each of ``jobs`` places adds to the environment."""
    if jobs == 1:
        return [{}]
    if torch.cuda.is_available():
        count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = [str(number) for number in range(count)] if named is None else re.split(r"\s*,\s*", named.strip())
        if len(devices) != count:
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES is {named}, of which {count} can be used; expected the names of devices that "
                "are there, so that --jobs can deal them out"
            )
        if jobs * ranks > count:
            most = f"at most {count // ranks}" if count // ranks > 1 else "1"
            raise ValueError(
                f"--jobs is {jobs}; expected {most}, because a trial has {ranks} ranks and this machine {count} devices"
            )
        return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[at * ranks : (at + 1) * ranks])} for at in range(jobs)]
    if "OMP_NUM_THREADS" in os.environ:
        return [{}] * jobs
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))
    return [{"OMP_NUM_THREADS": str(threads)}] * jobs

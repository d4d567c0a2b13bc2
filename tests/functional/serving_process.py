"""Servers for tests: tools/serve.py on a free port, in a process of its own that the fork server starts in a second."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "functional"))

from program_runs import _fork_server  # noqa: E402

NEEDED = ("starlette", "uvicorn", "openai")
LACKING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


class Server:
    """A server that takes requests. ``url`` ends in /v1."""

    def __init__(self, process: Any, url: str) -> None:
        self.process = process
        self.url = url

    def client(self, **options: Any) -> Any:
        """OpenAI's client, which does not try again by itself."""
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", **{"max_retries": 0, "timeout": 60.0, **options})

    def end(self, number: int = signal.SIGTERM) -> tuple[int | None, float]:
        """Send a signal; exit code (None: it runs on) and seconds until the end."""
        began = time.monotonic()
        os.kill(self.process.pid, number)
        self.process.join(20)
        return self.process.exitcode, time.monotonic() - began


@contextlib.contextmanager
def serving(export: Path, log: Path, *flags: str) -> Iterator[Server]:
    """A server of ``export``, killed at the end if it has not ended before. ``log`` gets its output."""
    argv = [str(export), "--port", "0", "--device", "cpu", *flags]
    process = _fork_server().Process(target=_serve, args=(argv, str(log)))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while True:
            told = log.read_text() if log.exists() else ""
            line = next((line for line in told.splitlines(True) if line.startswith("serving ")), "")
            if line.endswith("\n"):
                break
            assert process.is_alive() and time.monotonic() < deadline, told[-4000:]
            time.sleep(0.05)
        yield Server(process, line.rpartition(" at ")[2].strip())
    finally:
        process.kill()
        process.join()


def _serve(argv: list[str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(HF_HOME=f"{log}.no-cache", HF_HUB_OFFLINE="1")
    import torch

    torch.set_num_threads(1)
    sys.argv = ["serve.py", *argv]
    from umv2_megatron.commands.serve import run

    run()

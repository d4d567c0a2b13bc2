"""The process of one step of gpu_check.py.

    python -m benchmarks.gpu_kit.one_step <step> <file of its figures> [--dry] [--device <name>]
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit.report import Record

# Functions by module, so that a step imports no more than it needs.
FUNCTIONS = {
    "roofline": "figures", "lookup": "figures", "topk": "figures", "waits": "waits", "kernels": "runs",
    "layer": "runs", "fp8": "runs", "checkpoint": "runs", "other_tests": "runs",
}  # fmt: skip


def function_of(name: str, device: str | None) -> Callable[[Record, bool], Any]:
    """What computes the figures of a step; ``train-<local|te>-<backend>[-stream]`` are runs of the whole model."""
    if name.startswith("train-"):
        from benchmarks.gpu_kit.runs import train

        engine, backend, *stream = name.split("-")[1:]
        return partial(train, engine=engine == "te", backend=backend, stream=bool(stream), device=device)
    function = name.replace("-", "_")
    return getattr(importlib.import_module(f"benchmarks.gpu_kit.{FUNCTIONS[function]}"), function)


def main(argv: list[str]) -> int:
    """Run the step; a failure is an exception, for the log."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the whole program runs in the background
    name, path, *rest = argv
    device = rest[rest.index("--device") + 1] if "--device" in rest else None
    function_of(name, device)(Record(Path(path)), "--dry" in rest)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

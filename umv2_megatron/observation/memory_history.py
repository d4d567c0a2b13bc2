"""``--record-memory-history``: when a CUDA device runs out of memory, who holds what is written to a file.

torch keeps the last allocations with the Python lines that made them. At the moment of the failure, before anything is
freed on the way out, the snapshot goes to ``<save>/memory-snapshot/rank<r>.pickle``, which pytorch.org/memory_viz
shows.
"""

from __future__ import annotations

from pathlib import Path

import torch

from umv2_megatron.config.usage import UsageError

ENTRIES = 100_000
"""Allocations and frees that are kept, several KB each."""


def check_can_record() -> None:
    """Raise ``UsageError`` where torch records nothing."""
    if not torch.cuda.is_available():
        raise UsageError(
            "--record-memory-history is on; expected it left out on a machine without CUDA: torch records the "
            "allocations of CUDA devices only; --log-memory-to-tensorboard records the memory in use"
        )


def record_memory_history(directory: Path, rank: int) -> None:
    """Record from now on to the end of the process, and write ``directory``/rank<rank>.pickle at every failure."""
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    path = directory / f"rank{rank}.pickle"

    def out_of_memory(device: int, wanted: int, in_use: int, free: int) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except OSError as error:
            print(f"WARNING: no snapshot of the memory: {path} cannot be written ({error.strerror})", flush=True)
            return
        print(
            f"rank {rank}: CUDA device {device} has no {wanted:,} bytes left ({free:,} free); who holds what is in "
            f"{path}",
            flush=True,
        )

    # torch has no public name for it; torch.cuda's own tests and Megatron-LM use this one
    torch._C._cuda_attach_out_of_memory_observer(out_of_memory)

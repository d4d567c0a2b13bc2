"""How a program of ours ends: an exit code, and one line where a user erred."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from umv2_megatron.config.text_numbers import whole_number
from umv2_megatron.config.usage import TrainingStopped, UsageError
from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.training.error_file import tell_launcher
from umv2_megatron.user_paths import UserPathError


def run_program(main: Callable[[list[str]], int], argv: list[str], name: str) -> NoReturn:
    """Run ``main(argv)`` and exit: its code; 2 and one line for a usage error; 1 and one line for a failed run.

    Ranks tell the same usage error, so only the first prints it. A collective that failed is told with the ranks that
    are to blame. torchrun shows the sentence in its summary. ``--debug`` shows the traceback.
    """
    try:
        code = main(argv)
    except KeyboardInterrupt as error:
        _explain(error)
        _record("interrupted (Ctrl-C)", 130)
        code = 130
    except SystemExit as error:
        roll_call = _roll_call()
        if roll_call is None or not roll_call.joined():
            raise
        # the other ranks would wait for this one
        roll_call.explain(error)
        text = f"rank {_rank()} called sys.exit({error.code!r}) in mid-run"
        _record(text, 1)
        print(f"{name}: error: {text}", file=sys.stderr, flush=True)
        code = 1
    except Exception as error:
        code = _failed(error, argv, name)
    sys.stdout.flush()
    sys.stderr.flush()
    if roll_call := _roll_call():
        roll_call.leave(code)
    if code:
        os._exit(code)  # other ranks may wait in a collective: leave without joining them
    sys.exit(0)


def told_in_one_line(error: Exception) -> bool:
    """Whether ``error`` is a mistake of the user or a failure of the machine, whose message says all."""
    return isinstance(error, (ValueError, OSError, CheckpointError, TrainingStopped))


def _failed(error: Exception, argv: list[str], name: str) -> int:
    """Print what ``error`` means to the user and tell the other ranks; returns the exit code."""
    usage = isinstance(error, (UsageError, UserPathError))
    collective = _explain(error)
    known = collective is not None or told_in_one_line(error)
    if "--debug" in argv or not known:
        traceback.print_exc()
    text = " ".join((str(error) if collective is None else collective).split())
    if not usage:
        _record(text if known else f"{type(error).__name__}: {text}", 1, own=collective is None)
    tell_launcher(f"{name}: error: {text}" if known else f"{type(error).__name__}: {text}")
    if known and (_rank() == 0 or not usage):
        print(f"{name}: error: {text}", file=sys.stderr, flush=True)
    return 2 if usage else 1


def _record(text: str, code: int, own: bool = True) -> None:
    """Into the history of the run, where this process has begun one."""
    events = sys.modules.get("umv2_megatron.observation.events")
    log = events.current() if events is not None else None
    if log is not None:
        log.fault(text, code, own=own)


def _roll_call() -> ModuleType | None:
    """`parallel/roll_call.py` where this process has loaded it: without it no rank takes part in a collective."""
    return sys.modules.get("umv2_megatron.parallel.roll_call")


def _explain(error: BaseException) -> str | None:
    roll_call = _roll_call()
    return None if roll_call is None else roll_call.explain(error)


def _rank() -> int:
    # SLURM_PROCID comes last: it is 0 in all ranks that mpirun starts from a batch script
    for variable in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"):
        rank = whole_number(os.environ.get(variable, ""))
        if rank is not None:  # what else it may be, launch.discover refuses
            return rank
    return 0

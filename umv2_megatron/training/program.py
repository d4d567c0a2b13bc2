"""How a program of ours ends: an exit code, and one line where a user erred."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from umv2_megatron.config.flags import UsageError
from umv2_megatron.training.durable_files import CheckpointError
from umv2_megatron.training.loop import TrainingStopped


def run_program(main: Callable[[list[str]], int], argv: list[str], name: str) -> NoReturn:
    """Run ``main(argv)`` and exit: its code; 2 and one line for a usage error; 1 and one line for a failed run.

    Ranks tell the same usage error, so only the first prints it. ``--debug`` shows the traceback.
    """
    try:
        code = main(argv)
    except (ValueError, OSError, CheckpointError, TrainingStopped) as error:
        usage = isinstance(error, UsageError)
        if "--debug" in argv:
            traceback.print_exc()
        if _rank() == 0 or not usage:
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2 if usage else 1
    except KeyboardInterrupt:
        code = 130
    except Exception:
        # a bug of ours: interpreter exit could wait for the other ranks for ever
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # other ranks may wait in a collective: leave without joining them
    sys.exit(0)


def _rank() -> int:
    for variable in ("RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 0

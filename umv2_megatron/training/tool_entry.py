"""How the command-line tools end: a user's mistake is one line on stderr, never a traceback.

Exit codes: 0 done, 1 the data or the machine is at fault, 2 the command is, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from umv2_megatron.data.corpus import CorpusError
from umv2_megatron.training.error_file import tell_launcher


def run_tool(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> NoReturn:
    """Parse the command line, run ``work`` on it and exit. Adds --debug, which shows the traceback of an error."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    # On a login node torch built for CUDA would say at its import that there is no device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # As an exception, so that temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        work(arguments)
    except (ValueError, CorpusError, OSError) as error:
        if arguments.debug:
            raise
        tell_launcher(f"{parser.prog}: error: {error}")
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def program_name() -> str:
    """The program's name as it was started: ``plan.py`` in a checkout, ``umv2-plan`` where the package is installed."""
    return Path(sys.argv[0]).name


def quiet_mcore(*_: object) -> None:
    """Make megatron-core ready for a program that only reads its configurations: without its warnings."""
    for name in ("torch", "torch.utils.cpp_extension", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from umv2_megatron.parallel import cpu_platform  # loads torch

    cpu_platform.install()


def read_text(flag: str, path: str) -> str:
    """The text of the file that ``flag`` names. Raises ``ValueError`` where it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} is {path}; expected a readable UTF-8 text file: {error}") from error

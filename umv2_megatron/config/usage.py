"""Errors that end a program in one line, and a parser that makes them; loads neither torch nor mcore."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class UsageError(ValueError):
    """A user's mistake in flags, files or layout; shown as one line, exit code 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on: a loss or gradient is not finite and the policy says stop."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are ``UsageError`` instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def refuse(flag: str, value: Any, expected: str) -> NoReturn:
    """Raise the ``UsageError`` of a flag whose value is not what was expected."""
    raise UsageError(f"--{flag} is {' '.join(str(value).split())}; expected {expected}")

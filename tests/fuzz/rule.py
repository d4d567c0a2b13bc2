"""The rule that every drawn input must keep: a program succeeds, or ends with one sentence and a non-zero exit code.

    outcome = run_tool_with(parser(), main, ["--load", directory])     # fails where a traceback would be printed

Programs run in this process, so that thousands of inputs take minutes. ``FUZZ_EXAMPLES`` (`make fuzz` sets it) is the
number of inputs that each test draws; without it a test draws few, the same in every run. What broke the rule once is
kept in cases/ and tried in every run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from umv2_megatron.config.usage import UsageError
from umv2_megatron.training.program import told_in_one_line
from umv2_megatron.training.tool_entry import run_tool

CASES = Path(__file__).parent / "cases"
DRAWN = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def drawing(quick: int) -> settings:
    """Settings of a fuzz test: ``quick`` inputs that never change, or as many new ones as ``FUZZ_EXAMPLES`` says."""
    return settings(
        derandomize=not DRAWN,
        max_examples=DRAWN or quick,
        database=None,  # what was found is written into cases/
        deadline=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


def cases(name: str) -> list[Any]:
    """The inputs of a kind that once broke the rule: a JSON document on each line of cases/NAME.jsonl."""
    return [json.loads(line) for line in (CASES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@dataclass
class Outcome:
    """How a program ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


def run_tool_with(parser: argparse.ArgumentParser, main: Callable[..., None], argv: list[str]) -> Outcome:
    """Run a tool as ``run_tool`` does. Raises AssertionError where it breaks the rule."""
    with _captured("tool.py", argv) as (out, err):
        try:
            run_tool(parser, main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return keeps_the_rule(Outcome(code, out.getvalue(), err.getvalue()), argv)


def run_training_with(main: Callable[[list[str]], int], argv: list[str]) -> Outcome:
    """Run the training program's ``main`` as ``run_program`` does, without ending this process."""
    with _captured("pretrain_umv2.py", argv) as (out, err):
        try:
            code = main(argv)
        except SystemExit as end:  # argparse's own
            code = end.code if isinstance(end.code, int) else 1
        except Exception as error:
            if not told_in_one_line(error):
                raise
            code = 2 if isinstance(error, UsageError) else 1
            err.write(f"pretrain_umv2.py: error: {' '.join(str(error).split())}\n")
    return keeps_the_rule(Outcome(code, out.getvalue(), err.getvalue()), argv)


def keeps_the_rule(outcome: Outcome, argv: list[str]) -> Outcome:
    """``outcome``, where it is a success or a refusal in words."""
    text = f"{argv}\nexit code {outcome.code}\n{outcome.out[-2000:]}\n{outcome.err[-4000:]}"
    assert "Traceback" not in outcome.err + outcome.out, text
    if outcome.code:
        last = outcome.err.rstrip().rsplit("\n", 1)[-1]
        assert ": error: " in last and len(last.split(": error: ", 1)[1]) > 10, text
    return outcome


@contextlib.contextmanager
def _captured(program: str, argv: list[str]) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """The program's name, arguments and outputs in place of this process's; its signal handler is taken back."""
    out, err = io.StringIO(), io.StringIO()
    saved, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [program, *argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        sys.argv = saved
        signal.signal(signal.SIGTERM, handler)

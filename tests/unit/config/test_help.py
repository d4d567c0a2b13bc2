"""Help and usage errors come at once: no program loads torch or mcore to tell its flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOLS = sorted(path.stem for path in (ROOT / "umv2_megatron" / "commands").glob("[a-z]*.py"))

PROGRAM = """
import os
import sys
from umv2_megatron.commands.{name} import run
def tell(code):
    loaded = {{"torch", "megatron.core", "transformers"}} & set(sys.modules)
    print("loaded:", *sorted(loaded), file=sys.stderr, flush=True)
    leave(code)
leave, os._exit = os._exit, tell
try:
    run()
except SystemExit as end:
    tell(end.code or 0)
"""


def call(name: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(name=name), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", TOOLS)
def test_help_and_an_unknown_flag_load_nothing_heavy(name: str) -> None:
    done = call(name, "--help")
    assert done.returncode == 0 and "--" in done.stdout and "loaded:\n" in done.stderr, done.stderr
    done = call(name, "--no-such-flag")
    assert done.returncode == 2 and "loaded:\n" in done.stderr, done.stderr


USAGE_ERRORS = [
    ("pretrain", ["--num-layer", "3"]),
    ("pretrain", ["--model-preset", "umv2-tiny", "--train-iters", "3", "--hidden-dropout", "1.5"]),
    ("pretrain", ["--model-preset", "umv2-tiny", "--train-iters", "3", "--fp8-margin", "2"]),
    ("pretrain", ["--model-preset", "umv2-tiny", "--train-iters", "3", "--tensor-model-parallel-size", "2"]),
    ("pretrain", ["--model-preset", "umv2-tiny", "--train-iters", "3", "--tokenizer-type", "ByteLevelTokenizer",
                  "--data-path", "nowhere"]),
    ("plan", ["--model-preset", "umv2-tiny", "--tensor-model-parallel-size", "3"]),
    ("serve", ["nowhere"]),
    ("serve", ["nowhere", "--max-concurrent", "0"]),
    ("match", ["--model-preset", "umv2-tiny", "--to", "moe", "--hidden-dropout", "2"]),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments", USAGE_ERRORS)
def test_wrong_values_and_combinations_are_told_without_loading_anything(name: str, arguments: list[str]) -> None:
    done = call(name, *arguments)
    assert done.returncode == 2 and "loaded:\n" in done.stderr, done.stderr


def test_help_of_the_training_program_lists_every_section() -> None:
    done = call("pretrain", "--help")
    assert done.returncode == 0 and "--memory-topk" in done.stdout and "--overlap-grad-reduce" in done.stdout

"""Help and usage errors come at once: no program loads torch or mcore to tell its flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from umv2_megatron.config.help_cache import cached_help

ROOT = Path(__file__).resolve().parents[3]
TOOLS = sorted(path.stem for path in (ROOT / "umv2_megatron" / "commands").glob("[a-z]*.py") if path.stem != "pretrain")

PROGRAM = """
import sys
from umv2_megatron.commands.{name} import run
try:
    run()
finally:
    loaded = {{"torch", "megatron.core", "transformers"}} & set(sys.modules)
    print("loaded:", *sorted(loaded), file=sys.stderr)
"""


def call(name: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(name=name), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", TOOLS)
def test_help_and_an_unknown_flag_load_nothing_heavy(name: str) -> None:
    done = call(name, "--help")
    assert done.returncode == 0 and "--" in done.stdout and "loaded:\n" in done.stderr, done.stderr
    if name not in ("plan", "serve"):  # they take the flags of the training program, of transformers' server
        done = call(name, "--no-such-flag")
        assert done.returncode == 2 and "loaded:\n" in done.stderr, done.stderr


def test_help_of_the_training_program_is_kept(tmp_path: Path) -> None:
    first = call("pretrain", "--help", UMV2_CACHE_DIR=str(tmp_path))
    again = call("pretrain", "--help", UMV2_CACHE_DIR=str(tmp_path))
    assert first.returncode == again.returncode == 0 and "--memory-topk" in first.stdout
    assert first.stdout == again.stdout and "loaded:\n" in again.stderr and "torch" in first.stderr


def test_help_does_not_need_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UMV2_CACHE_DIR", str(tmp_path / "file"))
    assert cached_help("x.py", "", lambda: "text") == "text"

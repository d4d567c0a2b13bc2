"""What --eval-tasks needs is told before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.usage import UsageError

RUN = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "1", "--eval-tasks", "one", "two"]


@pytest.mark.parametrize(
    "there, flags, sentence",
    [
        (
            False,
            [],
            "--eval-tasks is one two, but the package lm_eval is not installed; install requirements-lm-eval.txt",
        ),
        (True, ["--eval-tasks-path", "nosuch"], "--eval-tasks-path is nosuch; expected a directory"),
        (True, ["--tokenizer-type", "NullTokenizer"], "no value with --tokenizer-type NullTokenizer"),
        (True, ["--eval-tasks-interval", "0"], "--eval-tasks-interval is 0; expected an integer of at least 1"),
    ],
)
def test_refused(there, flags, sentence, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: there or None if name == "lm_eval" else find(name, *more)
    )
    with pytest.raises(UsageError) as raised:
        resolve([*RUN, *flags])
    assert sentence in str(raised.value)


def test_a_dry_run_of_many_ranks_needs_no_lm_eval(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    run = resolve([*RUN, "--tokenizer-type", "ByteLevelTokenizer", "--dry-run", "--dry-run-world-size", "1"])
    assert run.training.eval_tasks == ["one", "two"]

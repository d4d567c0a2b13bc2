"""What evaluations while training must satisfy."""

from __future__ import annotations

import importlib.util
import os

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import UsageError, refuse


def check_evaluation(run: RunConfig) -> None:
    """Raise ``UsageError`` naming the flag where --full-validation or --eval-tasks cannot work; imports nothing of
    lm-eval, opens no file."""
    if run.training.full_validation:
        _check_full_validation(run)
    tasks = run.training.eval_tasks
    if not tasks:
        return
    named = " ".join(" ".join(tasks).split())
    if run.training.dry_run_world_size is None and importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f"--eval-tasks is {named}, but the package lm_eval is not installed; install "
            "requirements-lm-eval.txt, or leave the flag out"
        )
    for folder in run.training.eval_tasks_path or []:
        if not os.path.isdir(folder):
            refuse("eval-tasks-path", folder, "a directory with YAML files of tasks")
    if run.data.tokenizer_type == "NullTokenizer":
        refuse("eval-tasks", named, "no value with --tokenizer-type NullTokenizer, which reads no text")
    if run.cuda_graph_impl != "none":
        refuse("eval-tasks", named, "no value with --cuda-graph-impl: graphs are for one length of sequences")
    if run.fp8:
        refuse("eval-tasks", named, "no value with --fp8-format, whose scales an evaluation would change")


def _check_full_validation(run: RunConfig) -> None:
    if run.data.mock_data:
        refuse("full-validation", "on", "corpora: --mock-data has no end")
    if not run.training.eval_iters:
        refuse("full-validation", "on", "--eval-iters above 0, which turns evaluations on")
    for split, flag in (("validation", "--valid-data-path"), ("test", "--test-data-path")):
        try:
            blends = run.data.set_blends(split)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if any(weights is not None for _, weights in blends.values()):
            raise UsageError(f"{flag} has weights; expected none with --full-validation, which reads every token once")

"""--eval-tasks: tasks of lm-eval, scored on a model while it is trained.

Rank 0 holds the tasks and runs lm-eval; the other ranks take part in its forward passes (``shared_model.py``).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from umv2_megatron.checkpoint.agreement import tell_all
from umv2_megatron.checkpoint.rng_state import set_rng_state, sharded_rng_state
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.evaluation.shared_model import EvaluationLeft, SharedModel, cannot_generate
from umv2_megatron.observation.task_names import PREFIX
from umv2_megatron.training.restore import RestoredModel
from umv2_megatron.training.task_evaluation import TaskScores

_SEED = 1234  # lm-eval's default, also of few-shot examples
_RESAMPLES = 100
"""Resamples for the standard errors of metrics that have no formula for theirs."""


class LmEvalTasks:
    """The tasks of --eval-tasks, loaded with their data. Collective over all ranks.

    Raises ``UsageError`` on every rank where a task is not known, cannot be loaded or cannot run here.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._loaded: Any = None
        refusal = None
        if torch.distributed.get_rank() == 0:
            try:
                self._loaded = load_tasks(run)
            except UsageError as error:
                refusal = str(error)
        refusal = tell_all(refusal)
        if refusal is not None:
            raise UsageError(refusal)

    def evaluate(
        self, chunks: list[torch.nn.Module], tokenizer: Any, iteration: int, leave: Callable[[], bool]
    ) -> TaskScores:
        """See ``TaskEvaluation``. A task that raises ends the evaluation on all ranks, and its error is told; an error
        in a forward pass is raised, because the other ranks are in the middle of it."""
        states = sharded_rng_state().data
        try:
            restored = RestoredModel(chunks, tokenizer, self._run, iteration)
            model = SharedModel(restored, self._run.training.micro_batch_size, leave)
            if torch.distributed.get_rank() != 0:
                scores: TaskScores = model.follow()
                return scores
            try:
                scores = self._scores(model)
            except EvaluationLeft:
                scores = TaskScores(left=True)
            except Exception as error:
                if model.asking:
                    raise
                scores = TaskScores(failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
            model.finish(scores)
            return scores
        finally:
            set_rng_state(states)

    def _scores(self, model: SharedModel) -> TaskScores:
        import random

        import numpy as np
        from lm_eval.evaluator import evaluate

        from umv2_megatron.evaluation.lm_eval_model import NativeLM

        begun = time.perf_counter()
        # as lm-eval's simple_evaluate does, so that every evaluation asks the same
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        with _without_bars():
            results = evaluate(
                NativeLM(model),
                self._loaded,
                limit=self._run.training.eval_tasks_limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
            )
        assert results is not None, "lm-eval gives results on rank 0"
        return TaskScores(dict(named_scores(results["results"])), time.perf_counter() - begun)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval draws a bar of progress for every task, whoever calls it: none in the log of a run."""
    from lm_eval.api import task

    kept = task.tqdm
    task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        task.tqdm = kept


def named_scores(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """``lm-eval/<task>/<metric>`` and its number, of tasks and groups, standard errors included.

    lm-eval writes ``metric,filter``; the filter "none" is left out, another one follows the metric after a point.
    """
    for task, numbers in results.items():
        for name, value in numbers.items():
            metric, comma, chosen = name.partition(",")
            if comma and isinstance(value, (int, float)) and not isinstance(value, bool):
                yield f"{PREFIX}{task}/{metric}{'' if chosen == 'none' else f'.{chosen}'}", float(value)


def load_tasks(run: RunConfig) -> Any:
    """lm-eval's ``TaskDict`` of --eval-tasks, with the data of every task.

    Raises ``UsageError`` naming the task.
    """
    names, folders = run.training.eval_tasks or [], run.training.eval_tasks_path or []
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork this process for standard errors
    from lm_eval.tasks import TaskManager

    # to look through all of lm-eval's own tasks takes half a minute
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=list(folders))
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(f"--eval-tasks is {name}; expected a task, group or tag of lm-eval{_near(name, manager)}")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(names):
        try:
            found = manager.load([name])
        except Exception as error:  # of its data, its templates, its Python
            raise UsageError(
                f"--eval-tasks is {name}, which cannot be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:500]}"
            ) from error
        twice = sorted(found["tasks"].keys() & loaded["tasks"].keys())
        if twice:
            raise UsageError(f"--eval-tasks is {' '.join(names)}, where {twice[0]} comes twice; name it once")
        for kind, held in loaded.items():
            held.update(found.get(kind) or {})
    for name, task in loaded["tasks"].items():
        _check_task(run, name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _near(name: str, manager: Any) -> str:
    import difflib

    close = difflib.get_close_matches(name, manager.all_tasks, n=1)
    return f"; did you mean {close[0]}?" if close else ", or one in a directory of --eval-tasks-path"


def _check_task(run: RunConfig, name: str, task: Any) -> None:
    """Raise ``UsageError`` where the task needs what is not here."""
    from umv2_megatron.evaluation.lm_eval_model import GENERATION_SETTINGS

    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"--eval-tasks holds {name}, which needs more than text; leave it out")
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"--eval-tasks holds {name}, which runs code that a model has written; evaluate it apart, with lm-eval's "
            "own program"
        )
    if task.OUTPUT_TYPE != "generate_until":
        return
    layout = cannot_generate(run)
    if layout is not None:
        raise UsageError(
            f"--eval-tasks holds {name}, which generates text, and the layout of {layout} cannot; leave the task out, "
            "or evaluate checkpoints in another layout (docs/inference.md)"
        )
    settings = dict(task.get_config("generation_kwargs") or {})
    wrong = sorted(settings.keys() - {*GENERATION_SETTINGS, "max_new_tokens", "max_tokens", "max_completion_tokens"})
    if wrong:
        raise UsageError(
            f"--eval-tasks holds {name}, whose generation_kwargs has {wrong[0]}; expected some of "
            f"{', '.join(GENERATION_SETTINGS)}"
        )

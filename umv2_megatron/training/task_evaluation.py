"""What the training loop knows of evaluations on tasks (--eval-tasks), which the package above makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class TaskScores:
    """Scores by name (``observation/task_names.py``), and the seconds that they took; or why there are none: a task
    failed, or the evaluation was left when it was asked to be."""

    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str | None = None
    left: bool = False


class TaskEvaluation(Protocol):
    """Tasks that are ready to be evaluated."""

    def evaluate(
        self, chunks: list[torch.nn.Module], tokenizer: Any, iteration: int, leave: Callable[[], bool]
    ) -> TaskScores:
        """The scores of the model as it is, the same on all ranks; collective. Changes nothing that training reads,
        the random states included. ``leave``: asked on rank 0 now and then; True ends the evaluation."""
        ...

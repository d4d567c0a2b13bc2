"""--empty-unused-memory-level: how often a step gives memory of the device back, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from umv2_megatron.training import step
from umv2_megatron.training.optimizer import StepResult


@pytest.mark.parametrize("level, order", [
    (0, ["backward", "update"]), (1, ["backward", "empty", "update"]), (2, ["backward", "empty", "update", "empty"]),
])  # fmt: skip
def test_memory_is_given_back(level: int, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def told(name: str, result: Any = None) -> Any:
        return lambda *_, **__: (done.append(name), result)[1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", told("empty"))
    monkeypatch.setattr(step, "_run_schedule", told("backward", []))
    monkeypatch.setattr(step, "_mean_loss", lambda reports: torch.zeros(()))
    monkeypatch.setattr(step, "guarded_step", told("update", StepResult(False, 0.0, 0.0, None, False)))
    run = SimpleNamespace(
        global_batch_size=8, overlap_param_gather=True, training=SimpleNamespace(empty_unused_memory_level=level)
    )
    step.train_step(run, [], SimpleNamespace(zero_grad=lambda: None), None, iter(()))  # type: ignore[arg-type]
    assert done == order

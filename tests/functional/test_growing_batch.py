"""--rampup-batch-size: a batch that grows in whole runs, on one rank and two, interrupted, and with steps left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from program_runs import losses, tiny_run, train

from umv2_megatron.training.metrics import read_metrics

BATCHES = [2, 2, 2, 4, 4, 6, 8, 8]
"""Of 8 samples in the end: 2 more after every 6 samples."""
RAMP = {
    "rampup_batch_size": [2, 2, 18], "global_batch_size": 8, "micro_batch_size": 1, "train_iters": len(BATCHES),
    "log_interval": 1, "eval_iters": 0, "memory_balance_loss_coeff": 0.01, "lr_warmup_iters": 1,
}  # fmt: skip


def metric(save: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(save) if name in line]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_batch_it_had(tmp_path: Path) -> None:
    """Bitwise the same as an uninterrupted one; on one rank the same samples and, but for rounding, losses."""
    settings = {**RAMP, "save_interval": 100}
    whole = train(2, tiny_run(**settings, save=tmp_path / "whole"), tmp_path / "o1")
    argv = tiny_run(**settings, save=tmp_path / "parts", exit_interval=5)
    train(2, argv, tmp_path / "o2")
    finished = train(2, argv, tmp_path / "o3")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and finished.weights == whole.weights
    used = [sum(BATCHES[: number + 1]) for number in range(len(BATCHES))]
    for save in ("whole", "parts"):
        assert metric(tmp_path / save, "batch-size") == BATCHES
        assert metric(tmp_path / save, "consumed-samples") == used
    train(1, tiny_run(**settings, save=tmp_path / "one"), tmp_path / "o4")
    assert metric(tmp_path / "one", "consumed-samples") == used
    found, expected = losses(tmp_path / "one"), losses(tmp_path / "whole")
    assert [number for number, _ in found] == [number for number, _ in expected] == [*range(1, len(BATCHES) + 1)]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)


@pytest.mark.slow
def test_another_ramp_is_refused_at_a_resume(tmp_path: Path) -> None:
    settings = {**RAMP, "save": tmp_path / "save", "save_interval": 100}
    train(1, tiny_run(**{**settings, "exit_interval": 3}), tmp_path / "o1")
    done = train(1, tiny_run(**{**settings, "rampup_batch_size": [4, 4, 18]}), tmp_path / "o2", codes=2)
    assert "--rampup-batch-size is [4, 4, 18], but the checkpoint was trained with [2, 2, 18]" in done.text


@pytest.mark.slow
def test_a_step_left_out_has_its_own_batch(tmp_path: Path) -> None:
    """The fourth step, of 4 samples, is read and left out; the others see what they saw without that."""
    done = train(1, tiny_run(**RAMP, save=tmp_path / "save", iterations_to_skip=4), tmp_path / "o")
    assert "samples 6 to 9 of the training order are left out (4 so far)" in done.text
    assert metric(tmp_path / "save", "consumed-samples")[-1] == sum(BATCHES)


@pytest.mark.slow
def test_a_run_of_so_many_samples(tmp_path: Path) -> None:
    done = train(1, tiny_run(**{**RAMP, "train_iters": None, "train_samples": 27}), tmp_path / "o")
    assert re.findall(r"iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+)", done.text)[-1] == ("6", "6", "20")

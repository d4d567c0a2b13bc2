"""events.jsonl of real runs: killed ranks, signals, NaNs, changed settings, and the page of such a run."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from program_runs import Job, tiny_run, train

from umv2_megatron.observation.events import read_events
from umv2_megatron.observation.page import page
from umv2_megatron.observation.run_files import read_run

pytestmark = pytest.mark.thorough


def told(directory: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["iteration"]) for event in read_events(directory)]


def of_kind(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(directory) if event["event"] == kind]


@pytest.mark.slow
def test_a_rank_is_killed_then_a_signal_then_the_end(tmp_path: Path) -> None:
    save = tmp_path / "run"
    settings: dict[str, Any] = {"save": save, "train_iters": 2000, "save_interval": 3, "memory_log_interval": 2}
    job = Job(2, tiny_run(**settings), tmp_path / "o")
    try:
        job.wait_for(r"iteration +8/")
        job.send(signal.SIGKILL, rank=0)  # the last rank has to tell it
        killed = job.wait()
        assert killed.codes == [-signal.SIGKILL, 1], killed.text
        fault = of_kind(save, "fault")
        assert len(fault) == 1 and (fault[0]["rank"], fault[0]["code"]) == (1, 1) and fault[0]["iteration"] >= 8
        assert re.search(r"because rank 0 \(pid \d+ on .*\) is gone", fault[0]["text"])

        job = Job(2, tiny_run(**settings, clip_grad=0.5, allow_config_change=True), tmp_path / "second")
        job.wait_for(r"iteration +\d+/")
        job.send(signal.SIGUSR1, rank=1)
        assert job.wait().codes == [0, 0]
    finally:
        job.kill()
    first, second = of_kind(save, "start")
    assert first["iteration"] == 0 and second["iteration"] % 3 == 0 and second["iteration"] > 0
    assert second["reason"] == fault[0]["text"] and second["ranks"] == 2 and second["last_iteration"] == 2000
    assert second["changes"] == {"clip_grad": [1.0, 0.5], "allow_config_change": [False, True]}
    stopped = told(save)[-3:]
    iteration = stopped[0][1]
    assert stopped == [("checkpoint", iteration), ("stop", iteration), ("end", iteration)]
    assert of_kind(save, "stop")[0]["reason"] == "SIGUSR1"

    run = read_run(save)
    assert run.state() == ("stopped", "asked by SIGUSR1") and run.iteration == iteration
    assert run.series["lm loss"].iterations == list(range(1, iteration + 1)), "each step once"
    made = page(run, "t")
    for text in ("clip_grad", "stopped", "rows used", "is gone"):
        assert text in made


def spoil_a_gradient() -> None:
    """Every third step has a NaN gradient on this rank."""
    from umv2_megatron.training import optimizer, step

    guarded, count = optimizer.guarded_step, [0]

    def spoilt(made: Any, loss: torch.Tensor, *rest: Any) -> Any:
        count[0] += 1
        return guarded(made, loss * float("nan") if count[0] % 3 == 0 else loss, *rest)

    step.guarded_step = spoilt


def test_a_nan_is_told(tmp_path: Path) -> None:
    save = tmp_path / "run"
    argv = tiny_run(save=save, train_iters=4, nan_policy="skip")
    train(1, argv, tmp_path / "o", spoil_a_gradient)
    assert told(save) == [("start", 0), ("skipped", 2), ("checkpoint", 4), ("end", 4)]
    assert of_kind(save, "skipped")[0]["text"].startswith("iteration 3: loss nan")

    stops = tmp_path / "stops"
    train(2, tiny_run(save=stops, train_iters=4), tmp_path / "o", spoil_a_gradient, codes=1)
    faults = of_kind(stops, "fault")
    assert {event["rank"] for event in faults} == {0, 1}, "it happened on both"
    assert all("stopped before the update by --nan-policy stop" in event["text"] for event in faults)
    assert all(event["iteration"] == 2 for event in faults)


@pytest.mark.slow
def test_what_is_no_part_of_the_history(tmp_path: Path) -> None:
    """An evaluation, a dry run, and a start that is refused."""
    save = tmp_path / "run"
    settings: dict[str, Any] = {"save": save, "train_iters": 2, "eval_iters": 1}
    train(1, tiny_run(**settings), tmp_path / "o")
    before = told(save)
    assert before == [("start", 0), ("checkpoint", 2), ("end", 2)]
    train(1, tiny_run(**settings, skip_train=True), tmp_path / "o")
    train(1, tiny_run(**settings, dry_run=True), tmp_path / "o")
    train(1, tiny_run(**{**settings, "lr": 0.5}), tmp_path / "o", codes=2)
    assert told(save) == before
    train(1, tiny_run(**settings), tmp_path / "o")
    assert told(save) == [*before, ("start", 2), ("end", 2)]
    assert of_kind(save, "start")[1]["reason"] == "all iterations were done"

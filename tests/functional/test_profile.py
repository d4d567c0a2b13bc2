"""--profile in whole runs: the weights come out as without it, the table covers the step, and nothing stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from program_runs import tiny_run, train

WINDOW = {"train_iters": 4, "profile_step_start": 2, "profile_step_end": 4}


def rows_by_path(directory: Path, rank: int) -> dict[tuple[str, ...], dict[str, Any]]:
    found = json.loads((directory / "profile" / f"rank{rank}-ranges.json").read_text())
    assert (found["first_iteration"], found["last_iteration"], found["rank"]) == (2, 3, rank)
    rows = {tuple(row["path"]): row for row in found["rows"]}
    assert sum(row["ms"] for path, row in rows.items() if len(path) == 1) == pytest.approx(found["ms_per_step"])
    for path, row in rows.items():
        inside = sum(inner["ms"] for other, inner in rows.items() if other[:-1] == path)
        assert inside <= row["ms"] * 1.001 + 1e-6, f"the parts of {path} take longer than it"
        assert row["share"] == pytest.approx(row["ms"] / found["ms_per_step"])
    return rows


def test_parts_of_a_step(tmp_path: Path) -> None:
    """Two ranks with a table between them; two micro-batches of two blocks per step, twice forward for recompute."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    sharded = {"memory_parallel_size": 2, "memory_parallel_mode": "row"}
    settings = {"train_iters": WINDOW["train_iters"], **sharded, **recompute}
    plain = train(2, tiny_run(**settings), tmp_path / "plain")
    settings.update(WINDOW, save=tmp_path / "saved", profile=True, profile_ranks="1")
    profiled = train(2, tiny_run(**settings), tmp_path / "profiled")
    assert plain.weights == profiled.weights
    assert "profile of iterations 2 to 3 on rank 1" in profiled.outputs[1] and "ms/step" not in profiled.outputs[0]
    assert not (tmp_path / "saved" / "profile" / "rank0-ranges.json").exists()
    rows = rows_by_path(tmp_path / "saved", 1)
    blocks = {"attention": 4, "FFN": 4, "norms": 8, "memory: retrieval": 4, "memory: lookup": 4}
    for section in ("forward", "recompute", "backward"):
        for part, calls in blocks.items():
            extra = 2 if (part, section) in {("norms", "forward"), ("norms", "backward")} else 0  # the final one
            assert rows[section, part]["calls"] == calls + extra, (section, part)
    assert rows["forward", "embedding"]["calls"] == rows["backward", "output layer"]["calls"] == 2
    assert rows["backward", "embedding"]["calls"] == rows["backward", "loss"]["calls"] == 2
    assert rows["data",]["calls"] == 2 and rows["optimizer",]["calls"] == rows["gradient reduce",]["calls"] == 1
    assert rows["u, t refresh",]["calls"] == 1
    for section in ("forward", "recompute", "backward"):
        assert rows[section, "memory: lookup", "exchanges"]["ms"] > 0
    assert rows["other",]["share"] < 0.6


def test_trace_and_time_of_checkpoints(tmp_path: Path) -> None:
    settings = {**WINDOW, "save": tmp_path / "saved", "save_interval": 2, "profile": True, "use_pytorch_profiler": True}
    profiled = train(1, tiny_run(**settings), tmp_path / "profiled")
    assert profiled.outputs[0].count("ms/step") == 1
    rows = rows_by_path(tmp_path / "saved", 0)
    assert rows["evaluation and checkpoint",]["ms"] > rows["data",]["ms"]
    trace = (tmp_path / "saved" / "profile" / "rank0.json").read_text()
    for name in ("forward: attention", "backward: memory: lookup", "forward: memory: retrieval: query projection"):
        assert f'"name": "{name}"' in trace, name


def test_a_run_that_ends_inside_the_window_and_one_that_goes_on_after_its_begin(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train_iters": 3, "exit_interval": 2, "save": tmp_path}
    settings |= {"profile": True, "profile_step_start": 2, "profile_step_end": 90}
    finished = train(1, tiny_run(**settings), tmp_path / "run")
    assert "profile of iterations 2 to 2 on rank 0" in finished.outputs[0]
    resumed = train(1, tiny_run(**settings), tmp_path / "resumed")
    told = "nothing is profiled on rank 0, because the run goes on at iteration 3, after --profile-step-start 2"
    assert told in resumed.outputs[0] and "ms/step" not in resumed.outputs[0]

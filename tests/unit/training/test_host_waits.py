"""A training step waits for the device once, to know whether it may update the weights (``fake_device.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
FROM_STEP = "umv2_megatron/training/optimizer.py"
TWO_RANKS = {"world": 2, "vocab_size": 256}

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16, distributed optimizer, both losses": {
        "bf16": True, "use_distributed_optimizer": True, "memory_balance_loss_coeff": 0.1,
        "memory_tucker_penalty_coeff": 0.1,
    },
    "tensor parallel": {**TWO_RANKS, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}  # fmt: skip
MORE_RUNS: dict[str, dict[str, Any]] = {
    "rank 3": {"memory_tucker_rank": 3},
    "read delay": {"memory_read_delay": 1, "memory_layer_freq": "[1,0]"},
    "product keys": {"ffn_variant": "memory-plus", "memory_balance_loss_coeff": 0.1},
    "dense": {"ffn_variant": "dense"},
    "recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "context parallel": {**TWO_RANKS, "context_parallel_size": 2},
    "tables by dimension": {**TWO_RANKS, "memory_parallel_size": 2, "memory_parallel_mode": "dim"},
}  # fmt: skip


BY_ROW = {**TWO_RANKS, "memory_parallel_size": 2, "memory_parallel_mode": "row", "value": 32, "order": True}
PLANTED = [["read", "bool", "tolist", "host", "list"], ["sizes"], ["mask"]]


@pytest.fixture(scope="module")
def waits() -> dict[str, dict[str, Any]]:
    """What the program says of every run, by its name."""
    return told_of({**RUNS, "by row": BY_ROW, **{str(kinds): {"planted": kinds} for kinds in PLANTED}})


@pytest.fixture(scope="module")
def more_waits() -> dict[str, dict[str, Any]]:
    """The same of the runs that are not tried in every ``make test``."""
    return told_of(MORE_RUNS)


def told_of(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What ``fake_device.py`` prints of ``runs``, by their names."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("fake_device.py")), *map(json.dumps, runs.values())]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(runs, told, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_once(name, waits):
    check_one_wait(waits[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_RUNS)
def test_a_step_of_more_runs_waits_once(name, more_waits):
    check_one_wait(more_waits[name])


def check_one_wait(told):
    assert "error" not in told, told["error"][-3000:]
    assert told["devices"] == ["gpu:0"]
    # The first step may make what later ones find on the device.
    (found,) = told["steps"][1]
    assert found[0] == "read" and found[1].startswith(FROM_STEP)


def test_tables_by_row_wait_for_the_sizes_of_their_exchanges(waits):
    """Once for each layer and micro-batch more: the host must know what it sends."""
    told = waits["by row"]
    assert "error" not in told, told["error"][-3000:]
    *exchanges, last = told["steps"][1]
    assert last[1].startswith(FROM_STEP)
    assert len(exchanges) == told["layers"] * told["micro_batches"]
    assert all(kind == "read" and place.startswith("umv2_megatron/memory/row_sharded.py") for kind, place in exchanges)


def test_tables_by_row_wait_behind_the_ffn(waits):
    """The host waits for the sizes once the FFN has been launched, and a backward does not wait."""
    told = waits["by row"]
    layers, micro_batches = told["layers"], told["micro_batches"]
    forward = ["start projected", "start pick_counts", "wait pick_counts", "ffn", "read", "start rows", "start scores"]
    forward += ["wait rows", "wait scores", "wait projected", "start output", "wait output"]
    backward = ["start output_grad", "wait output_grad", "start score_grads", "start projected_grad", "ffn backward"]
    backward += ["wait score_grads", "wait projected_grad"]
    assert told["order"] == micro_batches * (layers * forward + layers * backward) + ["read"]


def test_planted_waits_are_found(waits):
    told = waits[str(PLANTED[0])]
    found = [kind for kind, place in told["steps"][1] if place.startswith("umv2_megatron/memory/retrieval.py")]
    assert found == ["read", "read", "read", "copy", "copy"] * told["layers"] * told["micro_batches"]


@pytest.mark.parametrize("kinds", PLANTED[1:])
def test_a_size_that_depends_on_numbers_ends_the_step(kinds, waits):
    assert "DynamicOutputShapeException" in waits[str(kinds)]["error"]

"""benchmarks/machine.py and benchmarks/planned_steps.py: do they run, and does the planner read what they write?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from umv2_megatron.planning.device import Device
from umv2_megatron.planning.machine_file import read_machine

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    """Standard output of a program of the benchmarks."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_machine_file_of_two_ranks(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    run("benchmarks/machine.py", "--quick", "--rounds", "1", "--ranks", "2", "--out", str(file))
    name, rates = read_machine(str(file))
    assert "2 ranks of 1 threads" in name
    of_a_gpu = {"host_bandwidth", "host_memory_bandwidth", "cache_bytes", "cache_bandwidth"}
    assert rates.keys() == vars(Device()).keys() - of_a_gpu
    assert 0 < rates["flops_efficiency"] <= 1 and rates["starts_ahead"] == 0 and rates["gpus_per_node"] == 2
    assert not list(tmp_path.glob(".machine*")), "the file in which ranks meet is left"


@pytest.mark.slow
def test_steps_beside_their_prediction(tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    layouts = ("one rank", "DP 2, M 2 by row")
    run("benchmarks/planned_steps.py", "--quick", "--rounds", "1", "--only", *layouts, "--json", str(file))
    found = json.loads(file.read_text())["results"]
    assert tuple(found) == layouts
    assert all(each["ratio"] == each["measured_ms"] / each["predicted_ms"] for each in found.values())

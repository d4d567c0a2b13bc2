"""tools/ablate.py on the plans in examples/, with the real program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ["dense", "umv2", "moe", "ultramem", "memory-plus", "pkm", "peer"]


def ablate(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "ablate.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)


def test_smoke_runs_every_variant_of_equal_size(tmp_path: Path) -> None:
    plan = tmp_path / "variants.yaml"
    plan.write_text((ROOT / "examples/ablations/variants.yaml").read_text().replace("seeds: [1, 2]", "seeds: [1]"))
    done = ablate(str(plan), "--output", str(tmp_path / "out"), "--smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|") for line in report.splitlines() if line.startswith("|")}
    assert [label for label in rows if label in VARIANTS] == VARIANTS
    results = [json.loads((tmp_path / "out" / label / "seed1" / "result.json").read_text()) for label in VARIANTS]
    # equal operations, and equal total parameters but for dense
    operations = [result["flops"] for result in results]
    parameters = [result["parameters"] for result in results[1:]]
    assert max(operations) / min(operations) < 1.02 and max(parameters) / min(parameters) < 1.02
    assert all([iteration for iteration, _ in result["training_curve"]] == [1, 2] for result in results)
    again = ablate(str(plan), "--output", str(tmp_path / "out"), "--smoke", "--trial", "3")
    assert again.returncode == 0 and "ultramem seed 1: was done" in again.stdout


def test_the_smallest_comparison_is_a_plan_that_can_run(tmp_path: Path) -> None:
    script = tmp_path / "array.sbatch"
    made = ablate("examples/ablations/smallest.yaml", "--output", str(tmp_path), "--slurm-array", str(script))
    assert made.returncode == 0 and "#SBATCH --array=0-2\n" in script.read_text(), made.stderr


def test_a_mistake_in_the_plan_is_one_sentence(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("runs: {umv2: {model-preset: umv2-4m}}\n")
    done = ablate(str(plan), "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith(f"ablate.py: error: {plan}, run 'umv2': --model-preset is 'umv2-4m'; expected one of")
    assert done.stderr.count("\n") == 1

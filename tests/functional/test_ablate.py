"""tools/ablate.py on the plans in examples/, with the real program.

One trial is started as a user starts it; the others, of which each would import torch for seconds, in forked processes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from program_runs import ROOT, train

from umv2_megatron.evaluation.ablation.plan import read_plan
from umv2_megatron.evaluation.ablation.programs import Programs
from umv2_megatron.planning import count_parameters, flops_per_token

VARIANTS = ROOT / "examples/ablations/variants.yaml"


def ablate(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "ablate.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)


def in_process(arguments: list[str], folder: Path) -> str:
    """What the tool prints, with each program that it starts in a forked process."""

    def call(self: Programs, command: list[str], *, environment: dict[str, str], log: Path) -> None:
        assert command[:2] == [sys.executable, str(ROOT / "pretrain_umv2.py")]
        train(1, command[2:], folder / "logs" / log.parts[-3])

    from umv2_megatron.commands import ablate as tool

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(Programs, "call", call)
        tool.main(tool.parser().parse_args(arguments))
    return printed.getvalue()


@pytest.mark.slow
def test_smoke_runs_a_plan(tmp_path: Path) -> None:
    """Other variants than these are trained in test_family.py."""
    plan, labels = tmp_path / "variants.yaml", ["dense", "umv2", "moe"]
    content = yaml.safe_load(VARIANTS.read_text())
    content.update(seeds=[1], runs={label: content["runs"][label] for label in labels})
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    smoke = [str(plan), "--output", str(tmp_path / "out"), "--smoke"]
    done = ablate(*smoke, "--trial", "1")
    assert done.returncode == 0 and "umv2 seed 1: done" in done.stdout, done.stdout + done.stderr
    assert "umv2 seed 1: was done" in in_process(smoke, tmp_path)
    report = (tmp_path / "out" / "report.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|") for line in report.splitlines() if line.startswith("|")}
    assert [label for label in rows if label in labels] == labels
    for label in labels:
        result = json.loads((tmp_path / "out" / label / "seed1" / "result.json").read_text())
        assert [iteration for iteration, _ in result["training_curve"]] == [1, 2]


def test_the_plan_of_variants_compares_equal_sizes(tmp_path: Path) -> None:
    """Equal operations, and equal total parameters but for dense, which has none to spare."""
    trials = [trial for trial in read_plan(VARIANTS, tmp_path).trials if trial.seed == 1]
    assert [trial.label for trial in trials] == ["dense", "umv2", "moe", "ultramem", "memory-plus", "pkm", "peer"]
    sizes = [(trial.run.values, trial.run.memory if trial.run.has_memory else None) for trial in trials]
    operations = [flops_per_token(*each).blocks for each in sizes]
    parameters = [count_parameters(*each).total for each in sizes[1:]]
    assert max(operations) / min(operations) < 1.02 and max(parameters) / min(parameters) < 1.02


def test_the_smallest_comparison_is_a_plan_that_can_run_and_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    script, plan = tmp_path / "array.sbatch", tmp_path / "plan.yaml"
    made = ["examples/ablations/smallest.yaml", "--output", str(tmp_path), "--slurm-array", str(script)]
    in_process(made, tmp_path)
    assert "#SBATCH --array=0-3\n" in script.read_text()
    plan.write_text("runs: {umv2: {model-preset: umv2-4m}}\n")
    done = ablate(str(plan), "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith(f"ablate.py: error: {plan}, run 'umv2': --model-preset is 'umv2-4m'; expected one of")
    assert done.stderr.count("\n") == 1

"""examples/bench_8gpu.sh: which layouts it runs, each beside the planner's prediction, and a run on two real ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import predicted
from umv2_megatron.commands.plan import plan
from umv2_megatron.config.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"M 1": [], **{f"M {size} {mode}": ["--memory-parallel-size", str(size), "--memory-parallel-mode", mode]
                         for size in (2, 4, 8) for mode in ("dim", "row")}}  # fmt: skip
RUN = """
import sys
print("ARGUMENTS", *sys.argv[2:])
for number in range(1, 21):
    ms = 900.0 if number < 4 else 250.0
    print(f" iteration {number:8d}/      20 | elapsed time per iteration (ms): {ms} | throughput per GPU "
          f"(TFLOP/s/GPU): 197.8 | lm loss: 5.0E+00 | tokens/s/rank: 131072.0 |")
"""


def bench(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """The script, with logs in ``folder``."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"RUN": str(folder), "MACHINE": str(folder / "none.json"), "PATH": path, **environment}
    command = [str(ROOT / "examples" / "bench_8gpu.sh"), *flags]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=280)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of results.jsonl by layout."""
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {line.pop("name"): line for line in found}


@pytest.mark.slow
def test_a_layout_is_run_and_predicted(tmp_path: Path) -> None:
    program = tmp_path / "run.py"
    program.write_text(RUN)
    launch = f"{sys.executable} {program}"
    done = bench(tmp_path, "--seed", "7", LAUNCH=launch, PLAN="--peak-tflops 1978", SIZES="1 8")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    assert list(found) == ["M 1", "M 8 dim", "M 8 row"]
    for name in found:
        log = (tmp_path / f"{name.replace(' ', '_')}.log").read_text()
        text = re.search("ARGUMENTS (.*)", log)[1]
        flags = text.split()
        assert text.endswith("--log-throughput" + "".join(f" {flag}" for flag in [*LAYOUTS[name], "--seed", "7"]))
        assert resolve([*flags, "--transformer-impl", "local"], 8).global_batch_size == 64
        step = plan([*flags, "--world-size", "8", "--peak-tflops", "1978"])["run"]["step_time"]["step"]
        row = found[name]
        assert row["measured_ms"] == 250 and row["iterations"] == 20
        assert row["predicted_ms"] == pytest.approx(1e3 * step) and row["ratio"] == pytest.approx(0.25 / step)
        assert row["tokens_per_second"] == 8 * 131072 and row["mfu"] == pytest.approx(0.1)
        line = rf"^{name} +250\.0 +{1e3 * step:.1f} +{0.25 / step:.2f} +1,048,576 +197\.8 +10\.0%$"
        assert re.search(line, done.stdout, re.M), done.stdout


@pytest.mark.slow
def test_two_ranks_on_a_cpu(tmp_path: Path) -> None:
    done = bench(tmp_path, "--dry", SIZES="2", MODES="row")
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    (name, row), *others = results(tmp_path).items()
    assert name == "M 2 row" and not others and row["iterations"] == 3 and row["ratio"] > 0
    assert re.search(r"memory_parallel_mode \.+ row", logs)


def test_every_layout_is_tried_and_failures_are_told_of(tmp_path: Path) -> None:
    done = bench(tmp_path, LAUNCH="false")
    assert done.returncode == 1
    assert done.stdout.splitlines()[1:] == [
        f"{name}: the run failed, see {tmp_path}/{name.replace(' ', '_')}.log" for name in LAYOUTS
    ]


def test_rates_of_the_machine(tmp_path: Path) -> None:
    """A machine file is the planner's; what it lacks keeps its default."""
    program, machine = tmp_path / "run.py", tmp_path / "machine.json"
    program.write_text(RUN)
    machine.write_text(json.dumps({"format": 1, "device": "a device", "rates": {"peak_tflops": 1978.0}}))
    done = bench(tmp_path, LAUNCH=f"{sys.executable} {program}", MACHINE=str(machine), SIZES="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path)["M 1"]["mfu"] == pytest.approx(0.1)


@pytest.mark.parametrize("flags", [[], ["--log", "nowhere"]])
def test_a_log_without_speeds(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert predicted.main(flags) == 2
    assert "--log is" in capsys.readouterr().err

"""Sets the planner's step time beside measured steps on this machine's CPU, in several layouts.

    python benchmarks/planned_steps.py        about 10 minutes on 2 quiet cores

First ``benchmarks/machine.py`` measures the machine, with as many ranks and threads as the layouts have; then each
layout trains as a user would train it, with ``pretrain_umv2.py`` in float32. The time of a step is the median of the
iterations without the first third; "ratio" is measured over predicted. The model is umv2-227m-1.2b with fewer blocks,
shorter sequences and a smaller vocabulary.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import predicted  # noqa: E402
from benchmarks.measure import Table, add_options, describe_machine, prepare, publish  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MODEL = ("--model-preset umv2-227m-1.2b --num-layers {layers} --seq-length {length} --max-position-embeddings {length} "
         "--vocab-size 5120 --global-batch-size 4 --train-iters {steps} --lr 1e-4 --mock-data "
         "--tokenizer-type NullTokenizer --num-workers 0 --eval-iters 0 --log-interval 1 --log-throughput")  # fmt: skip
LAYOUTS: dict[str, tuple[int, int, str]] = {
    "one rank": (1, 1, "--micro-batch-size 2"),
    "one rank, two threads": (1, 2, "--micro-batch-size 2"),
    "one rank, micro-batch 1": (1, 1, "--micro-batch-size 1"),
    "one rank, dense": (1, 1, "--micro-batch-size 2 --ffn-variant dense"),
    "recomputation": (1, 1, "--micro-batch-size 2 --recompute-granularity full --recompute-method uniform "
                            "--recompute-num-layers 1"),
    "DP 2": (2, 1, "--micro-batch-size 2"),
    "DP 2, distributed optimizer": (2, 1, "--micro-batch-size 2 --use-distributed-optimizer"),
    "DP 2, M 2 by column": (2, 1, "--micro-batch-size 2 --memory-parallel-size 2"),
    "DP 2, M 2 by row": (2, 1, "--micro-batch-size 2 --memory-parallel-size 2 --memory-parallel-mode row"),
    "TP 2": (2, 1, "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2": (2, 1, "--micro-batch-size 1 --pipeline-model-parallel-size 2"),
    "DP 2, TP 2": (4, 1, "--micro-batch-size 1 --tensor-model-parallel-size 2 --sequence-parallel"),
}  # fmt: skip
"""Ranks, threads of each, and flags, by name. Ranks times threads may be more than there are cores: rates are measured
with as many."""


def run(name: str, ranks: int, threads: int, flags: list[str], machine: Path, folder: Path) -> dict[str, Any]:
    """Train, and compare; ``RuntimeError`` with the end of the output where the run fails."""
    log = folder / f"{name.replace(' ', '_').replace(',', '')}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "pretrain_umv2.py", *flags]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "w", encoding="utf-8") as output:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode
    if code:
        raise RuntimeError(f"{name} ended with code {code}: {' '.join(log.read_text().splitlines()[-3:])}")
    plan = [*flags, "--transformer-impl", "local", "--machine", str(machine)]
    return predicted.compare(log, ranks, plan)


def main(argv: list[str]) -> int:
    """Measure, compare, print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="planned_steps.py", description=(__doc__ or "").split("\n")[0])
    add_options(parser, rounds=7)
    parser.add_argument("--only", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS), help="these layouts")
    parser.add_argument("--keep", type=Path, help="an empty or new folder for machine files and logs of the runs")
    options = parser.parse_args(argv)
    prepare(parser, options, "planned_steps.py")
    sizes = {"layers": 2, "length": 64, "steps": 3} if options.quick else {"layers": 4, "length": 512, "steps": 6}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        machines = {}
        for ranks, threads in sorted({LAYOUTS[each][:2] for each in options.only}):
            machines[ranks, threads] = folder / f"machine-{ranks}-{threads}.json"
            flags = ["--ranks", str(ranks), "--threads", str(threads), "--rounds", str(options.rounds)]
            flags += ["--out", str(machines[ranks, threads])]
            flags += ["--quick"] if options.quick else []
            subprocess.run([sys.executable, "benchmarks/machine.py", *flags], cwd=ROOT, check=True)
        for each in options.only:
            ranks, threads, flags_of = LAYOUTS[each]
            tables = [] if "dense" in flags_of else ["--memory-num-keys", "240"]
            flags = [*MODEL.format(**sizes).split(), *tables, *flags_of.split()]
            found[each] = run(each, ranks, threads, flags, machines[ranks, threads], folder)
            print(f"{each}: {found[each]['measured_ms']:.0f} ms, {found[each]['ratio']:.2f}", flush=True)
    columns = ("layout", "measured, ms", "predicted, ms", "measured / predicted")
    rows = [(each, f"{one['measured_ms']:,.0f}", f"{one['predicted_ms']:,.0f}", f"{one['ratio']:.2f}")
            for each, one in found.items()]  # fmt: skip
    title = (
        f"Step of umv2-227m-1.2b with {sizes['layers']} blocks, 4 sequences of {sizes['length']} tokens, float32."
    )
    publish("planned_steps.py", options, describe_machine(quick=options.quick), [Table(title, columns, rows)], found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

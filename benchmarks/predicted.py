"""Sets the speed of a training run beside the planner's prediction of its layout; used by examples/bench_8gpu.sh.

    python benchmarks/predicted.py --log run.log --name "M 4 row" --world-size 8 <flags of the run and of tools/plan.py>

Prints one line: measured and predicted milliseconds of a step, measured / predicted, tokens per second of all ranks,
TFLOP/s per rank and MFU. Measured is the median of the iterations in --log (--log-interval 1 --log-throughput) without
the first third. Flags of tools/plan.py may stand among the others, such as --machine. Exit code 2, with one line, for a
usage error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_kit.runs import lines_of, speed  # noqa: E402

COLUMNS = (("measured, ms", 12), ("predicted, ms", 13), ("ratio", 6), ("tokens/s", 12), ("TFLOP/s", 8), ("MFU", 6))
HEADER = " ".join([f"{'layout':<12}", *(name.rjust(width) for name, width in COLUMNS)])


def compare(log: Path, world_size: int, flags: list[str]) -> dict[str, Any]:
    """Measured and predicted figures; raises ``ValueError`` where the log has no speeds or the flags are wrong.

    Args:
        log: output of the run.
        world_size: ranks of the run.
        flags: of the run and of tools/plan.py.
    """
    from umv2_megatron.commands.plan import plan

    lines = lines_of(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else []
    if not lines:
        raise ValueError(f"--log is {log}; expected the output of a run with --log-interval 1 --log-throughput")
    measured = speed(lines)
    run = plan([*flags, "--world-size", str(world_size)])["run"]
    predicted = run["step_time"]["step"] * 1e3
    return {
        "measured_ms": measured["ms"],
        "predicted_ms": predicted,
        "ratio": measured["ms"] / predicted,
        "tokens_per_second": measured["tokens"] * world_size,
        "tflops": measured["tflops"],
        "mfu": measured["tflops"] / run["device"]["peak_tflops"],
        "iterations": len(lines),
    }


def main(argv: list[str]) -> int:
    """Print the line, or with --header the names of its columns."""
    parser = argparse.ArgumentParser(
        prog="predicted.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--header", action="store_true", help="print the names of the columns and stop")
    parser.add_argument("--log", type=Path, help="output of the run")
    parser.add_argument("--name", default="run", help="of the layout, for the line")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the run")
    parser.add_argument("--json", type=Path, help="add a line of JSON to this file")
    options, flags = parser.parse_known_args(argv)
    if options.header:
        print(HEADER)
        return 0
    try:
        if options.log is None:
            raise ValueError("--log is missing; expected the output of a run")
        found = compare(options.log, options.world_size, flags)
    except ValueError as error:
        print(f"predicted.py: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.name:<12} {found['measured_ms']:>12.1f} {found['predicted_ms']:>13.1f} {found['ratio']:>6.2f} "
        f"{found['tokens_per_second']:>12,.0f} {found['tflops']:>8.1f} {found['mfu']:>6.1%}"
    )
    if options.json is not None:
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": options.name, **found}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

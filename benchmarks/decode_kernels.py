"""Times a step of decoding by the compiled kernels of an export against PyTorch's operations and against its limit.

    python benchmarks/decode_kernels.py --dtype float32 --dtype bfloat16            two minutes, 6 GiB
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 UMV2_CPU_ARCH=x86-64-v3 \\
    python benchmarks/decode_kernels.py            the same as a CPU with AVX2 would compute it

One model with random weights, as in decode.py; both ways take turns in one process. The limit is that of decode.py.
``--no-plain`` leaves PyTorch's operations out: in bfloat16 on a CPU without instructions for it they take seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.decode import OURS, SIZES, check_counts, in_dtype, instructions, limit_ms  # noqa: E402
from benchmarks.decode_side import Memory, build_umv2  # noqa: E402
from benchmarks.measure import Table, add_options, describe_machine, prepare, publish  # noqa: E402
from benchmarks.spread import Spread, ratio  # noqa: E402

KERNELS, PLAIN = "kernels", "PyTorch"


@contextlib.contextmanager
def computed_by(way: str) -> Iterator[None]:
    """By ``KERNELS`` or by ``PLAIN``."""
    from umv2_megatron.hf import linear_umv2, lookup_umv2, step_umv2

    with contextlib.ExitStack() as stack:
        for module in (step_umv2, linear_umv2, lookup_umv2) if way == PLAIN else ():
            stack.enter_context(mock.patch.object(module, "usable", lambda x: False))
        yield


def run_batch(side: Memory, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step in every round by way, and the bytes that it reads."""
    side.prepare(batch, options.context)
    ways = [KERNELS] if options.no_plain else [KERNELS, PLAIN]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.rounds + 1):
        for way in ways if number % 2 == 0 else ways[::-1]:
            with computed_by(way):
                steps = side.time(options.steps + 1, clock=options.clock)[1:]  # the first finds other memory in cache
            if number:
                times[way].append(statistics.mean(steps))
    return {"batch": batch, "times": times, "sides": {OURS: side.count(3)}}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=sorted(SIZES), default="227m-1.2b")
    made.add_argument("--batch", type=int, action="append", help="default: 1, 8, 32; may be repeated")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: float32; repeatable")
    made.add_argument("--context", type=int, default=128, help="tokens in the cache (default: 128)")
    made.add_argument("--steps", type=int, default=4, help="steps of a way in one round (default: 4)")
    made.add_argument("--no-plain", action="store_true", help="leave out PyTorch's operations")
    add_options(made, rounds=7)
    return made


def main(argv: list[str]) -> int:
    """Measure and print."""
    made = parser()
    options = made.parse_args(argv)
    prepare(made, options, "decode_kernels.py")
    check_counts(made, options)
    if options.quick:
        options.size, options.rounds, options.steps, options.context = "tiny", 2, 1, 8
    machine = describe_machine("cpu", options.quick)
    rows, results, seconds = [], [], dict[str, Spread]()
    for dtype in options.dtype or ["float32"]:
        rates = in_dtype(machine, dtype, "cpu", options.quick)
        side = build_umv2({"preset": SIZES[options.size]["preset"], "dtype": dtype, "device": "cpu"})
        activated = side.describe()["activated"]
        for batch in options.batch or [1, 8, 32]:
            result = run_batch(side, batch, options)
            times, limit = result["times"], limit_ms(result, activated, rates)
            for way, found in times.items():
                seconds[f"{way}, {dtype}, batch {batch}"] = Spread.of([each / 1e3 for each in found])
            plain = ("", "")
            if PLAIN in times:
                plain = Spread.of(times[PLAIN]).text(), f"{ratio(times[PLAIN], times[KERNELS]).median:.2f}"
            rows.append((
                dtype, str(batch), Spread.of(times[KERNELS]).text(), *plain,
                f"{limit:.1f}", f"{statistics.median(times[KERNELS]) / limit:.2f}",
            ))  # fmt: skip
            results.append({"dtype": dtype, "limit_ms": limit, "gemm_flops_per_s": rates["gemm_flops_per_s"], **result})
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
        del side
    table = Table(
        f"{instructions()}Milliseconds per step after {options.context} cached tokens, medians of {options.rounds} "
        "rounds (lowest-highest).",
        ("dtype", "batch", KERNELS, PLAIN, "speed-up", "limit", f"{KERNELS} / limit"),
        rows,
    )
    publish("decode_kernels.py", options, machine, [table], results, seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

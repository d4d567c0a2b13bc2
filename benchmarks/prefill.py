"""The part of benchmarks/decode.py about prompts: tokens per second and memory of a forward over a whole prompt."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.spread import Spread, ratio
from benchmarks.text_table import Table


def run_prefill(contestants: Any, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time each side of ``contestants`` on a prompt of ``tokens`` tokens, in turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants.sides}
    grown = dict.fromkeys(times, 0)
    for number in range(options.rounds):
        names = list(contestants.sides)
        for name in names if number % 2 == 0 else names[::-1]:
            answer = contestants.ready(name, 1, options.context).ask("prefill", tokens=tokens, clock=options.clock)
            times[name].append(answer["ms"])
            grown[name] = max(grown[name], answer["grown_bytes"])
    return {"tokens": tokens, "ms": times, "grown_bytes": grown}


def prefill_table(rows: list[dict[str, Any]], ours: str, peer: str, flops_per_token: float, gemm: float) -> Table:
    """The table; the limit is that of products alone, without attention."""
    limit = gemm / flops_per_token
    return Table(
        "A prompt, batch 1: tokens per second (of the median, the slowest and the fastest round), and how far resident "
        "memory rose above the model's, GiB, the cache of keys and values included. Limit: "
        f"{limit:,.0f} tokens per second, from the operations of the activated parameters and the float32 GEMM rate.",
        ("tokens", ours, peer, "speed-up", f"limit / {ours}", f"memory, {ours}", f"memory, {peer}"),
        [
            (
                f"{row['tokens']:,}",
                *(_rates(row, name) for name in (ours, peer)),
                f"{ratio(row['ms'][peer], row['ms'][ours]).median:.2f}",
                f"{limit / (row['tokens'] * 1e3 / Spread.of(row['ms'][ours]).median):.2f}",
                *(f"{row['grown_bytes'][name] / 2**30:.2f}" for name in (ours, peer)),
            )
            for row in rows
        ],
    )


def _rates(row: dict[str, Any], name: str) -> str:
    spread = Spread.of(row["ms"][name])
    median, lowest, highest = (row["tokens"] * 1e3 / ms for ms in (spread.median, spread.highest, spread.lowest))
    return f"{median:,.0f} ({lowest:,.0f}-{highest:,.0f})"

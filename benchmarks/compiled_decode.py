"""Times a decoding step of the Hugging Face model compiled by torch.compile against the same step as it is.

    python benchmarks/compiled_decode.py                                   umv2-8m, batch 1, 8, 32: some minutes
    python benchmarks/compiled_decode.py --preset umv2-227m-1.2b --batch 1

Both steps belong to one model with random weights and write into one static cache; ``fullgraph=True``, compiled once
for each batch size by inductor. They take turns, and a round's ratio is of two steps that followed each other. The
largest difference of their logits is told, as a share of the largest logit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.decode_side import build_umv2  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    Table,
    add_options,
    describe_machine,
    prepare,
    publish,
    take_turns,
)
from benchmarks.spread import Spread, ratio  # noqa: E402
from umv2_megatron.config.presets import find_preset  # noqa: E402


def run_batch(side: Any, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both steps at one batch size, and how far their logits are apart."""
    side.prepare(batch, options.context)
    torch.compiler.reset()
    plain = side.model
    quick = torch.compile(plain, fullgraph=True, backend=options.backend)
    tokens = list(side.draw_tokens(options.rounds + 1))

    def step(model: Any, number: int) -> torch.Tensor:
        side.model = model
        try:
            return side.step(tokens[number])
        finally:
            side.model = plain

    expected, found = step(plain, 0), step(quick, 0)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    times = take_turns(
        {"as it is": lambda number: step(plain, number), "compiled": lambda number: step(quick, number)},
        options.rounds,
        options.clock,
    )
    return {"batch": batch, "difference": difference, **times}


def main(argv: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=30)
    parser.add_argument("--preset", default="umv2-8m", help="sizes of the model (default: umv2-8m)")
    parser.add_argument("--batch", type=int, action="append", help="sequences; may be repeated (default: 1, 8, 32)")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache (default: 128)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    options = parser.parse_args(argv)
    prepare(parser, options, "compiled_decode.py")
    try:
        find_preset(options.preset)
    except ValueError as problem:
        parser.error(str(problem))
    if options.quick:
        options.preset, options.batch, options.rounds, options.context = "umv2-tiny", [1], 2, 8
        options.backend = "eager"
    side = build_umv2({"preset": options.preset, "dtype": options.dtype, "device": "cpu"})
    results = [run_batch(side, batch, options) for batch in options.batch or [1, 8, 32]]
    rows = [
        (
            str(found["batch"]),
            Spread.of(found["as it is"]).text(2, 1e3),
            Spread.of(found["compiled"]).text(2, 1e3),
            ratio(found["as it is"], found["compiled"]).text(2),
            f"{found['difference']:.0e}",
        )
        for found in results
    ]
    title = (
        f"{options.preset}, {options.dtype}, {options.context} tokens in the cache, {options.rounds} rounds: "
        "milliseconds of a step, median (lowest-highest)"
    )
    columns = ("batch", "as it is", "compiled", "as it is / compiled", "difference of logits")
    machine = describe_machine(quick=options.quick)
    publish("compiled_decode.py", options, machine, [Table(title, columns, rows)], results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

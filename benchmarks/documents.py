"""Times training with documents kept apart (--reset-attention-mask): packed, with masks [s, s], and across documents.

    python benchmarks/documents.py                                    umv2-3m, half a minute on a quiet machine
    python benchmarks/documents.py --seq-length 2048 --lengths 2048 256 32

Forward and backward of one micro-batch of the preset's model, float32, without optimizer; the three ways take turns.
Documents have one length, so that attention's share is what the length says. "peak" is what torch's allocator held
beyond weights and inputs. Gradients of tables are added as in training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

from benchmarks.measure import Table, add_options, describe_machine, peak_bytes, prepare, publish, take_turns  # noqa: E402
from benchmarks.spread import Spread, ratio  # noqa: E402
from umv2_megatron.config.flags import read_mapping  # noqa: E402
from umv2_megatron.config.presets import PRESETS  # noqa: E402
from umv2_megatron.config.resolve import from_layers  # noqa: E402
from umv2_megatron.data.documents import document_starts, packed  # noqa: E402
from umv2_megatron.model.builder import build_model_chunks  # noqa: E402
from umv2_megatron.training.initialize import start_processes  # noqa: E402
from umv2_megatron.training.step import refresh_singular_vectors  # noqa: E402

ACROSS, PACKED, MASKED = "across documents", "packed", "masks [s, s]"


def micro_batch(samples: int, sequence: int, length: int, eod: int) -> dict[str, Any]:
    """Random tokens, the last of every ``length`` an end of document; a mask as mcore's loader makes it."""
    tokens = torch.randint(eod, (samples, sequence), generator=torch.Generator().manual_seed(1))
    tokens[:, length - 1 :: length] = eod
    positions = torch.arange(sequence)
    document = positions // length
    hidden = (positions[None] > positions[:, None]) | (document[None] != document[:, None])
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "position_ids": positions.expand(samples, -1).contiguous(),
        "attention_mask": hidden.expand(samples, 1, sequence, sequence).contiguous(),
    }


def ways_of(chunk: torch.nn.Module, batch: dict[str, Any], eod: int) -> dict[str, Callable[[int], Any]]:
    """A step of each way, by name."""

    def step(inputs: dict[str, Any]) -> None:
        chunk.zero_grad_buffer()
        names = ("tokens", "position_ids", "attention_mask")
        documents = inputs.get("packed_seq_params")
        arguments = {"labels": inputs["labels"], "packed_seq_params": documents}
        chunk(*(inputs[name] for name in names), **arguments).mean().backward()

    free = {**batch, "attention_mask": None}
    starts = document_starts(batch["tokens"], eod)
    return {
        ACROSS: lambda _: step(free),
        PACKED: lambda _: step(packed(free, starts)),  # what every micro-batch pays is timed, too
        MASKED: lambda _: step(batch),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="umv2-3m")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 256, 64, 16], help="tokens of a document")
    add_options(parser, rounds=5)
    options = parser.parse_args(argv)
    prepare(parser, options, "documents.py")
    if options.quick:
        options.seq_length, options.lengths, options.rounds = 32, [16], 1
    machine = describe_machine(quick=options.quick)
    changes = {
        "transformer_impl": "local", "seq_length": options.seq_length, "max_position_embeddings": options.seq_length,
        "micro_batch_size": options.micro_batch_size, "global_batch_size": options.micro_batch_size, "lr": 1e-4,
        "mock_data": True, "tokenizer_type": "NullTokenizer", "train_iters": 1,
    }  # fmt: skip
    layers = [
        ("preset", read_mapping(PRESETS[options.preset].flags(), "preset")),
        ("flag", read_mapping(changes, "flag")),
    ]
    run = from_layers(layers, 1)
    start_processes(run)
    eod = run.values["vocab_size"] - 1
    (chunk,) = build_model_chunks(run, run.values["vocab_size"])
    refresh_singular_vectors([chunk])
    rows, found = [], {}
    for length in options.lengths:
        batch = micro_batch(options.micro_batch_size, options.seq_length, length, eod)
        ways = ways_of(chunk, batch, eod)
        times = take_turns(ways, options.rounds, options.clock)
        peaks = {name: peak_bytes(lambda way=way: way(0)) for name, way in ways.items()}
        tokens = batch["tokens"].numel()
        for name in ways:
            rows.append((
                f"{length}", name,
                Spread.of([tokens / seconds for seconds in times[name]]).text(0),
                ratio(times[ACROSS], times[name]).text(2),
                f"{peaks[name] / 2**20:,.0f}",
            ))  # fmt: skip
        found[str(length)] = {"seconds": times, "peak_bytes": peaks}
    table = Table(
        f"Forward and backward of {options.preset}, {options.micro_batch_size} samples of {options.seq_length:,} "
        f"tokens, float32, --transformer-impl local; medians (lowest-highest) of {options.rounds}.",
        ("tokens of a document", "attention", "tokens/s", "rate / rate across documents", "peak, MiB"),
        rows,
    )
    publish("documents.py", options, machine, [table], found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Times whole training steps of three models of equal FLOPs per token: UltraMemV2, MoE (mcore's), and dense.

    python benchmarks/step.py                        about 4 minutes on 2 cores, needs 8 GiB
    python benchmarks/step.py --layers 4 --micro-batches 8 --json step.json
    python benchmarks/step.py --docs docs/performance.md         writes the tables between the file's markers

Each model trains in a process of its own: our builder, mcore's DDP and optimizer (Adam), our step, mock data, float32.
In every round each process runs one step while the others wait; the first round is not counted. The models:

- "umv2": the preset, cut to 2 of its 20 blocks and 2/20 of its vocabulary, so that blocks and output matrix keep their
  shares of the step. The whole preset in float32 would need 19 GB for parameters, gradients and Adam's moments.
- "moe": the same with mcore's MoE layers, 64 experts, 8 active, in place of FFN and memory; equal FLOPs per token and
  parameters. Grouped GEMM needs CUDA, so the experts run one after another (SequentialMLP).
- "dense": an FFN of equal FLOPs per token, with far fewer parameters.

A step is ``--micro-batches`` micro-batches of 2 sequences of 1,024 tokens and one update. The cost of the
update is proportional to the parameters and independent of the number of tokens. It is reported separately ("update":
gradient norm, clipping, Adam), because real batches are larger and its share is smaller there. "peak" is the largest
memory of the process minus its memory right after all modules were imported.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

from benchmarks import variants  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    Table,
    add_options,
    at_least_one,
    describe_machine,
    prepare,
    publish,
    timed,
)
from benchmarks.spread import Spread, ratio  # noqa: E402
from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.config.presets import PRESETS  # noqa: E402
from umv2_megatron.data.batches import batch_iterator  # noqa: E402
from umv2_megatron.data.datasets import build_datasets  # noqa: E402
from umv2_megatron.data.tokenizers import build_tokenizer  # noqa: E402
from umv2_megatron.training import step  # noqa: E402
from umv2_megatron.training.initialize import build_training_state, start_processes  # noqa: E402

UMV2, MOE, DENSE = "umv2", "moe", "dense"
TARGET = 1.5


# -- the models -----------------------------------------------------------------------------------------------------


def models(options: argparse.Namespace) -> dict[str, tuple[dict[str, Any], MemoryConfig | None]]:
    """Model fields and memory configuration of each model, by name."""
    preset = PRESETS[options.preset].model
    vocabulary = round(preset["vocab_size"] * options.layers / preset["num_layers"] / 128) * 128
    fields, memory = variants.preset_fields(
        options.preset,
        num_layers=options.layers,
        seq_length=options.seq_length,
        max_position_embeddings=options.seq_length,
        # the tokenizer of mock data adds one token
        vocab_size=max(128, vocabulary) - 1,
    )
    return {
        UMV2: (fields, memory),
        MOE: (variants.expert_fields(fields, memory), None),
        DENSE: (variants.dense_fields(fields, memory), None),
    }


def train(options: argparse.Namespace, name: str, threads: int, parent: Connection) -> None:
    """A process: train the model called ``name``, one step for every message; the times go back as messages."""
    sys.stdout = sys.stderr  # what mcore prints is no result
    device = cpu_platform.device().type
    torch.set_num_threads(threads)
    fields, memory = models(options)[name]
    extra = {"moe_token_dispatcher_type": options.dispatcher} if name == MOE else {}
    run = variants.configured(
        fields, memory, training=True, mock_data=True, tokenizer_type="NullTokenizer", num_workers=0, lr=3e-4,
        micro_batch_size=options.micro_batch_size, train_iters=options.rounds + 1,
        global_batch_size=options.micro_batch_size * options.micro_batches, **extra,
    )  # fmt: skip
    before = cpu_platform.max_memory_allocated()
    start_processes(run)
    tokenizer = build_tokenizer("NullTokenizer", None, fields["vocab_size"])
    state = build_training_state(run, tokenizer.vocab_size)
    step.connect(run, state.chunks, state.optimizer)
    samples = (options.rounds + 1) * run.global_batch_size
    dataset = build_datasets(run.data, tokenizer, run.model.seq_length, 1, (samples, 0, 0))[0]
    iterator = batch_iterator(dataset, 0, options.micro_batch_size, 0)
    updates: list[float] = []
    outcomes: list[step.StepResult] = []

    def one_step() -> None:
        outcomes.append(step.train_step(run, state.chunks, state.optimizer, state.scheduler, iterator))

    guarded = step.guarded_step
    step.guarded_step = partial(timed_call, guarded, updates, options.clock, device)
    parent.send(sum(parameter.numel() for chunk in state.chunks for parameter in chunk.parameters()))
    while parent.recv():
        seconds = timed(one_step, options.clock, device)
        assert outcomes[-1].updated, f"{name}: a step was not finite"
        peak = cpu_platform.max_memory_allocated() - before
        parent.send({"seconds": seconds, "update": updates[-1], "loss": outcomes[-1].loss, "peak_bytes": peak})
    torch.distributed.destroy_process_group()


def timed_call(
    work: Callable[..., Any], seconds: list[float], clock: str, device: str, *arguments: Any, **named: Any
) -> Any:
    """What ``work`` returns; the time it took is added to ``seconds``."""
    results: list[Any] = []
    seconds.append(timed(lambda: results.append(work(*arguments, **named)), clock, device))
    return results[0]


# -- turns ----------------------------------------------------------------------------------------------------------


class Side:
    """The process that trains one model."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.name = name
        self._pipe, theirs = _context().Pipe()
        arguments = (options, name, torch.get_num_threads(), theirs)
        self._process = _context().Process(target=train, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def reply(self) -> Any:
        """The next message of the process; ``RuntimeError`` when it has died."""
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of {self.name} ended with code {self._process.exitcode}") from None

    def step(self) -> dict[str, float]:
        """Train one step; its times, loss and the peak so far."""
        self._pipe.send(True)
        return self.reply()

    def end(self) -> None:
        """Let the process end, or end it."""
        with contextlib.suppress(OSError):
            self._pipe.send(False)
        self._process.join(60)
        self._process.kill()


@cache
def _context() -> Any:
    """Processes are forked from one that has loaded torch and mcore."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step"])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *([path] if path else [])])
    return context


@contextlib.contextmanager
def all_sides(options: argparse.Namespace, names: list[str]) -> Iterator[list[Side]]:
    """One process for each model, started and ended together."""
    sides: list[Side] = []
    try:
        for name in names:
            sides.append(Side(options, name))
        yield sides
    finally:
        for side in sides:
            side.end()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the tables and the JSON show."""
    sizes = {name: variants.Size.of(*model) for name, model in models(options).items()}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in sizes}
    with all_sides(options, list(sizes)) as sides:
        parameters = {side.name: side.reply() for side in sides}
        for number in range(options.rounds + 1):
            for side in sides:
                outcome = side.step()
                if number:
                    steps[side.name].append(outcome)
    tokens = options.seq_length * options.micro_batch_size * options.micro_batches
    seconds = {name: [step["seconds"] for step in taken] for name, taken in steps.items()}
    without = {name: [step["seconds"] - step["update"] for step in taken] for name, taken in steps.items()}
    return {
        "tokens_per_step": tokens,
        "models": {
            name: {
                "tokens_per_s": vars(Spread.of([tokens / each for each in seconds[name]])),
                "step_s": vars(Spread.of(seconds[name])),
                "update_s": vars(Spread.of([step["update"] for step in taken])),
                "peak_bytes": taken[-1]["peak_bytes"],
                "parameters": parameters[name],
                "forward_flops_per_token": sizes[name].flops.forward,
                "block_flops_per_umv2": sizes[name].flops.blocks / sizes[UMV2].flops.blocks,
                "block_parameters_per_umv2": sizes[name].parameters / sizes[UMV2].parameters,
                "loss": taken[-1]["loss"],
            }
            for name, taken in steps.items()
        },
        "umv2_speed_per": {other: vars(ratio(seconds[other], seconds[UMV2])) for other in (MOE, DENSE)},
        "umv2_speed_per_without_update": {other: vars(ratio(without[other], without[UMV2])) for other in (MOE, DENSE)},
    }


# -- output ---------------------------------------------------------------------------------------------------------


def describe(options: argparse.Namespace, result: dict[str, Any]) -> list[Table | str]:
    """The tables."""
    rows = []
    for name, row in result["models"].items():
        rows.append((
            name, Spread(**row["tokens_per_s"]).text(0), Spread(**row["step_s"]).text(2),
            Spread(**row["update_s"]).text(2), f"{row['peak_bytes'] / 2**30:.1f}",
            f"{row['parameters'] / 1e6:.1f}", f"{row['block_flops_per_umv2']:.3f}",
            f"{row['block_parameters_per_umv2']:.3f}",
        ))  # fmt: skip
    blocks = PRESETS[options.preset].model["num_layers"]
    share = "all" if options.layers == blocks else f"{options.layers} of {blocks}"
    title = (
        f"Training of {options.preset}, {share} blocks and the same share of its vocabulary, float32; "
        f"{result['tokens_per_step']:,} tokens per step in {options.micro_batches} micro-batches; moe with mcore's "
        f"{options.dispatcher} dispatcher. Medians (lowest-highest). The last two columns are relative to umv2 and "
        "count the blocks only."
    )
    columns = ("", "tokens/s", "step, s", "update, s", "peak, GiB", "M parameters", "FLOPs", "parameters")
    compared = [
        (f"umv2 / {other}" + (f" (target: at least {TARGET})" if other == MOE else ""),
         Spread(**result["umv2_speed_per"][other]).text(2),
         Spread(**result["umv2_speed_per_without_update"][other]).text(2))
        for other in (MOE, DENSE)
    ]  # fmt: skip
    return [
        Table(title, columns, rows),
        Table("Tokens per second: ratios, taken within each round.", ("", "step", "forward + backward"), compared),
    ]


def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="umv2-227m-1.2b")
    parser.add_argument("--layers", type=int, default=2, help="blocks (default: 2)")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=2, help="sequences in a micro-batch (default: 2)")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches in a step (default: 4)")
    parser.add_argument(
        "--dispatcher", choices=("alltoall", "allgather"), default="allgather",
        help="mcore's token dispatcher; the default was the faster one in layer.py",
    )  # fmt: skip
    add_options(parser, rounds=6)
    options = parser.parse_args(argv)
    if options.quick:
        options.preset, options.seq_length, options.micro_batches, options.rounds = "umv2-tiny", 32, 2, 1
    at_least_one(parser, options, "layers", "seq_length", "micro_batch_size", "micro_batches")
    prepare(parser, options, "step.py")
    machine = describe_machine(cpu_platform.device().type, options.quick)
    result = measure(options)
    times = {f"{kind} of {name}": Spread(**row[f"{kind}_s"])
             for name, row in result["models"].items() for kind in ("step", "update")}  # fmt: skip
    publish("step.py", options, machine, describe(options, result), result, times)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""How often the host waits for the GPU in one training step, and where.

torch.cuda.set_sync_debug_mode("warn") warns of reads, of sizes that depend on numbers and of copies that block. It says
nothing of waits that are asked for by name (``synchronize`` of the device, a stream or an event): these are counted by
wrapping them. tests/unit/training/fake_device.py counts the same without a GPU.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_kit.report import ROOT, Record
from benchmarks.text_table import Table

Waits = list[tuple[str, str]]
"""Kind, and place in our code or Megatron-Core's."""
MODELS = {
    False: {"model_preset": "umv2-227m-1.2b", "num_layers": 4, "micro_batch_size": 1, "memory_backend": "triton"},
    True: {"model_preset": "umv2-tiny", "num_layers": 2, "seq_length": 16, "max_position_embeddings": 16,
           "micro_batch_size": 1, "memory_backend": "scatter"},
}  # fmt: skip
"""Flags of the step, by ``dry``."""
SETTINGS = {
    "mock_data": True, "tokenizer_type": "NullTokenizer", "num_workers": 0, "lr": 1e-4, "train_iters": 4, "bf16": True,
    "use_distributed_optimizer": True, "transformer_impl": "local",
}  # fmt: skip


@contextmanager
def watched() -> Iterator[Waits]:
    """Everything that waits for the GPU inside, in its order; empty at the end where there is none."""
    found: Waits = []

    def note(kind: str) -> None:
        frames = traceback.extract_stack()
        ours = [frame for frame in frames if "umv2_megatron/" in frame.filename or "megatron/core" in frame.filename]
        where = "?"
        if ours:
            where = ours[-1].filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2] + f":{ours[-1].lineno}"
        found.append((kind, where))

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            note("debug mode")

    def counted(owner: Any) -> Any:
        old = owner.synchronize

        def synchronize(*arguments: Any, **named: Any) -> Any:
            note("synchronize")
            return old(*arguments, **named)

        return mock.patch.object(owner, "synchronize", synchronize)

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = show
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(counted(owner))
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
            found.clear()
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield found


def waits_of_a_step(flags: dict[str, Any]) -> tuple[Waits, int, int]:
    """Waits of the third training step of a run on one rank, its memory layers and its micro-batches.

    Args:
        flags: of pretrain_umv2.py, with underscores. Settings of the data may be left out.
    """
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()
    from umv2_megatron.config.resolve import resolve
    from umv2_megatron.data.batches import batch_iterator
    from umv2_megatron.data.datasets import build_datasets
    from umv2_megatron.data.tokenizers import build_tokenizer
    from umv2_megatron.model.ffn_with_memory import memory_layers
    from umv2_megatron.training import health, step
    from umv2_megatron.training.initialize import build_training_state, start_processes

    named = {**SETTINGS, "global_batch_size": 2, **flags}
    words = [[f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])] for key, value in named.items()]
    run = resolve([word for each in words for word in each], 1)
    start_processes(run)
    tokenizer = build_tokenizer("NullTokenizer", None, run.data.vocab_size)
    state = build_training_state(run, tokenizer.vocab_size)
    step.connect(run, state.chunks, state.optimizer)
    health.start_counting(state.chunks)
    size = run.training.micro_batch_size
    samples = (run.train_iters * run.global_batch_size, 0, 0)
    dataset = build_datasets(run.data, tokenizer, run.model.seq_length, 1, samples)[0]
    iterator = batch_iterator(dataset, 0, size, 0)
    for number in range(3):  # the first two compile kernels and make what later ones find on the device
        with watched() as found:
            result = step.train_step(run, state.chunks, state.optimizer, state.scheduler, iterator)
        assert result.updated, f"step {number + 1} was not finite"
    layers = sum(1 for chunk in state.chunks for _ in memory_layers(chunk))
    torch.distributed.destroy_process_group()
    return found, layers, run.num_microbatches


def waits(record: Record, dry: bool) -> None:
    """One wait is expected: whether the gradients are finite decides whether the weights are updated."""
    found, layers, micro_batches = waits_of_a_step(MODELS[dry])
    if dry:
        found = _on_the_fake_device()
    title = f"Waits of the host in one step of {micro_batches} micro-batches, {layers} memory layers; 1 is expected."
    figures = {"waits": found, "memory_layers": layers, "micro_batches": micro_batches}
    where = "on a fake device" if dry else "a step"
    table = Table(title, ("kind", "place"), found)
    record.keep(f"{len(found)} {where}, 1 expected", figures, [table])


def _on_the_fake_device() -> Waits:
    """What the fake device finds in the second step of a tiny run; ``RuntimeError`` when it fails."""
    import json
    import os
    import subprocess

    command = [sys.executable, str(ROOT / "tests" / "unit" / "training" / "fake_device.py"), "{}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not told or "error" in told[0]:
        raise RuntimeError(told[0]["error"] if told else done.stderr[-3000:])
    return [(kind, where) for kind, where in told[0]["steps"][1]]

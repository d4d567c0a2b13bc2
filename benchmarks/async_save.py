"""Training steps while --async-save writes a checkpoint, against steps without.

    python benchmarks/async_save.py --directory DISK/somewhere                     one rank
    python benchmarks/async_save.py --preset umv2-3m --ranks 2 --rounds 8

Each round saves in the background. While the save is in flight, steps with a writer that runs and with one that is
stopped (SIGSTOP) take turns, so that other load on the machine meets both; what the system still writes to the disk, it
writes in both. A step is timed with the question to all ranks after it. The ratio is the median over pairs of
neighbours. Then it saves without --async-save. Reported are medians, and per save the seconds that training waits
(checks and copy; publication) and the seconds of a save without --async-save. Each rank and its writer have one thread.
Where there are fewer cores than ranks and writers, the ratio shows what the writer takes from the steps at its low
priority; with a core to spare per writer it would not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

from benchmarks.text_table import Table  # noqa: E402
from umv2_megatron.checkpoint.background import BackgroundSaves  # noqa: E402
from umv2_megatron.checkpoint.save_load import save_checkpoint  # noqa: E402
from umv2_megatron.checkpoint.store import CheckpointStore  # noqa: E402
from umv2_megatron.config.resolve import resolve  # noqa: E402
from umv2_megatron.data.batches import batch_iterator  # noqa: E402
from umv2_megatron.data.datasets import build_datasets  # noqa: E402
from umv2_megatron.data.tokenizers import build_tokenizer  # noqa: E402
from umv2_megatron.training import step  # noqa: E402
from umv2_megatron.training.initialize import build_training_state, start_processes  # noqa: E402

STEPS_AT_MOST = 10_000


def timed(action: Callable[[], Any]) -> float:
    """Seconds, on this rank; a CUDA device is waited for."""
    start = time.perf_counter()
    action()
    cpu_platform.synchronize()
    return time.perf_counter() - start


def on_rank(rank: int, options: argparse.Namespace, folder: str, port: int, results: Any) -> None:
    """Train and save; rank 0 puts the times into ``results``."""
    ranks = str(options.ranks)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=ranks, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=ranks,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    sys.stdout = sys.stderr  # what mcore prints is no result
    torch.set_num_threads(1)
    batch = options.micro_batch_size * options.micro_batches * options.ranks
    argv = [
        "--model-preset", options.preset, "--mock-data", "--tokenizer-type", "NullTokenizer", "--num-workers", "0",
        "--lr", "1e-4", "--micro-batch-size", str(options.micro_batch_size), "--global-batch-size", str(batch),
        "--train-iters", str(STEPS_AT_MOST), "--use-distributed-optimizer", *options.run_flags,
    ]  # fmt: skip
    run = resolve(argv, options.ranks)
    start_processes(run)
    store = CheckpointStore(Path(folder) / "save", keep=1)
    background = BackgroundSaves(store)
    tokenizer = build_tokenizer("NullTokenizer", None, run.data.vocab_size)
    state = build_training_state(run, tokenizer.vocab_size)
    step.connect(run, state.chunks, state.optimizer)
    samples = (STEPS_AT_MOST * batch, 0, 0)
    dataset = build_datasets(run.data, tokenizer, run.model.seq_length, 1, samples)[0]
    iterator = batch_iterator(dataset, 0, options.micro_batch_size, 0)
    number = 0

    def one_step() -> None:
        step.train_step(run, state.chunks, state.optimizer, state.scheduler, iterator)

    def save(how: BackgroundSaves | None) -> None:
        nonlocal number
        number += 1
        save_checkpoint(store, number, state.chunks, state.optimizer, state.scheduler, background=how)

    times: dict[str, list[float]] = {"with": [], "without": [], "starts": [], "publishes": [], "saves": [], "per": []}
    for each in range(options.rounds + 1):
        found: dict[str, list[float]] = {name: [] for name in times}
        found["starts"].append(timed(lambda: save(background)))
        written = False
        while not written:
            for kind, number_of_signal in (("with", signal.SIGCONT), ("without", signal.SIGSTOP)):
                os.kill(background.writer_pid, number_of_signal)
                begun = time.perf_counter()
                one_step()
                written = background.written()
                found[kind].append(time.perf_counter() - begun)
        os.kill(background.writer_pid, signal.SIGCONT)
        found["publishes"].append(timed(background.finish))
        found["per"].append(len(found["with"]))
        found["saves"].append(timed(lambda: save(None)))
        if each:  # the first round warms up
            for name, values in found.items():
                times[name] += values
    if rank == 0:
        size = sum(path.stat().st_size for path in store.path(number).iterdir())
        results.put((times, size))
    background.close()
    torch.distributed.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", default="umv2-3m")
    made.add_argument("--ranks", type=int, default=1)
    made.add_argument("--rounds", type=int, default=6)
    made.add_argument("--micro-batch-size", type=int, default=2)
    made.add_argument("--micro-batches", type=int, default=1, help="per rank and step")
    made.add_argument("--run-flags", nargs=argparse.REMAINDER, default=[], help="last: more flags of the run")
    made.add_argument("--port", type=int, default=29611, help="of the ranks' rendezvous")
    made.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    return made


def main(argv: list[str]) -> int:
    """Measure and print a table."""
    options = parser().parse_args(argv)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="async_save_", dir=options.directory) as folder:
        ranks = [
            context.Process(target=on_rank, args=(rank, options, folder, options.port, results))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            print("error: a rank has failed, see above", file=sys.stderr)
            return 1
    times, size = results.get()
    found = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(one / other for one, other in zip(times["with"], times["without"], strict=True))
    rows = [
        ["step with a save in flight", f"{found['with'] * 1000:.1f} ms"],
        ["step with the writer stopped", f"{found['without'] * 1000:.1f} ms"],
        ["ratio, of pairs", f"{ratio:.3f}"],
        ["pairs of steps per save", f"{found['per']:.0f}"],
        ["training waits: checks and copy", f"{found['starts'] * 1000:.0f} ms"],
        ["training waits: publication", f"{found['publishes'] * 1000:.0f} ms"],
        ["a save without --async-save", f"{found['saves'] * 1000:.0f} ms"],
    ]
    title = (
        f"{options.preset}, ranks {options.ranks}, checkpoint of {size:,} bytes, medians of {options.rounds} rounds, "
        f"{len(times['with'])} steps each, {len(os.sched_getaffinity(0))} cores"
    )
    print(Table(title, ("", "median"), rows).text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

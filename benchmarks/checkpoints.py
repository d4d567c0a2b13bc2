"""Times and bytes of saving and loading checkpoints, and of joining what 1,024 ranks have written.

    python benchmarks/checkpoints.py --gib 8 --ranks 1 2 4 8 --directory DISK/somewhere
    python benchmarks/checkpoints.py --simulate-ranks 1024

The first form saves and loads the same tensors, split evenly over gloo ranks, and reports seconds per save, bytes of
the largest rank, the rate of the disk (plain synced writes of the same bytes by as many processes, before each save)
and the bytes that each rank reads. The second makes the records that so many ranks hand to rank 0, of --parts parts
each, and times what rank 0 and each rank do with them; the shards themselves are sparse files.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from benchmarks.text_table import Table
from umv2_megatron.checkpoint.checksum_files import Checksums, checksums_name, checksums_text, read_verified
from umv2_megatron.checkpoint.many_objects import many_objects
from umv2_megatron.checkpoint.pieces import plan_pieces
from umv2_megatron.checkpoint.places import SharedPlace, write_and_publish
from umv2_megatron.checkpoint.publishing import publish
from umv2_megatron.checkpoint.shard_reading import ShardReader
from umv2_megatron.checkpoint.shard_writing import Written, WrittenShard, write_hashed
from umv2_megatron.checkpoint.store import METADATA_FILE, CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import read_metadata_safely
from umv2_megatron.checkpoint.verification import share_out, verify_together

_COLUMNS = 1024
_TENSORS = 16
_BLOCK = bytes(64 << 20)


@dataclass(frozen=True)
class Rates:
    """Of one repetition on one rank: seconds and bytes."""

    disk_s: float
    check_s: float
    save_s: float
    load_s: float
    written: int
    read: int


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what ``action`` returns."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


# ---------------------------------------------------------------------- real ranks


def state(num_bytes: int, rank: int, world: int) -> dict[str, ShardedTensor]:
    """This rank's rows of ``_TENSORS`` float32 tensors of ``num_bytes`` in all."""
    rows = num_bytes // (_TENSORS * _COLUMNS * 4 * world)
    found = {}
    for number in range(_TENSORS):
        data = torch.full((rows, _COLUMNS), float(rank + number))
        offset = (rank, world)
        found[str(number)] = ShardedTensor.from_rank_offsets(f"tensor.{number}", data, (0, *offset))
    return found


def plain_write(path: Path, num_bytes: int) -> None:
    """What the disk alone takes for as many bytes."""
    with open(path, "wb", buffering=0) as file:
        for start in range(0, num_bytes, len(_BLOCK)):
            file.write(memoryview(_BLOCK)[: num_bytes - start])
        os.fsync(file.fileno())
    path.unlink()


def on_rank(rank: int, world: int, folder: str, num_bytes: int, repeats: int, results: Any) -> None:
    """Save and load ``repeats`` times; rank 0 puts the rates of all ranks into ``results``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(hours=1)
    )
    store = CheckpointStore(Path(folder) / "save", keep=1)
    mine: list[Rates] = []
    for iteration in range(1, repeats + 1):
        sharded = state(num_bytes, rank, world)
        torch.distributed.barrier()
        disk_s, _ = timed(lambda: (plain_write(Path(folder) / f"plain{rank}", num_bytes // world), _wait()))
        check_s, pieces = timed(lambda: plan_pieces(sharded))  # noqa: B023
        save_s, _ = timed(lambda: write_and_publish(SharedPlace(store), iteration, pieces, {}, {}))  # noqa: B023
        load_s, read = timed(lambda: load(store, iteration, sharded))  # noqa: B023
        mine.append(Rates(disk_s, check_s, save_s, load_s, sum(piece.num_bytes for piece in pieces), read))
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, mine)
    if rank == 0:
        results.put(everyone)
    torch.distributed.destroy_process_group()


def _wait() -> None:
    torch.distributed.barrier()


def load(store: CheckpointStore, iteration: int, sharded: dict[str, ShardedTensor]) -> int:
    """Verify and read as a resume does; returns the bytes that this rank has read."""
    path = store.path(iteration)
    manifest, hashed = verify_together(store, iteration, full=False)
    data = read_verified(path, METADATA_FILE, manifest)
    checksums = Checksums(path, manifest)
    reader = ShardReader(path, read_metadata_safely(path, data), checksums)
    reader.fill(sharded, lambda: None)
    return hashed + len(data) + checksums.bytes_read + reader.bytes_read


def result_of(ranks: Sequence[BaseProcess], results: Any) -> Any:
    """What a rank has put into ``results``. A rank that fails ends the program: the others would wait for it."""
    while results.empty():
        for rank, process in enumerate(ranks):
            if process.exitcode:
                raise SystemExit(f"rank {rank} ended with exit code {process.exitcode}; its message is above")
        time.sleep(0.1)
    return results.get()


def measure(world: int, num_bytes: int, repeats: int, directory: Path) -> list[str]:
    """A line of the table for one number of ranks."""
    folder = tempfile.mkdtemp(prefix="checkpoints_", dir=directory)
    context = get_context("spawn")
    results = context.SimpleQueue()
    arguments = [(rank, world, folder, num_bytes, repeats, results) for rank in range(world)]
    ranks = [context.Process(target=on_rank, args=each) for each in arguments]
    try:
        for process in ranks:
            process.start()
        everyone = result_of(ranks, results)
        for process in ranks:
            process.join()
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
        shutil.rmtree(folder)

    def slowest(field: str) -> float:
        by_repeat = zip(*([getattr(rates, field) for rates in of_rank] for of_rank in everyone))
        return statistics.median(max(values) for values in by_repeat)

    disk, save = slowest("disk_s"), slowest("save_s") + slowest("check_s")
    return [
        str(world),
        f"{slowest('written'):,.0f}",
        f"{num_bytes / disk / 1e9:.2f}",
        f"{disk:.2f}",
        f"{slowest('check_s'):.2f}",
        f"{save:.2f}",
        f"{num_bytes / save / 1e9:.2f}",
        f"{slowest('read'):,.0f}",
        f"{slowest('load_s'):.2f}",
    ]


# ---------------------------------------------------------------------- simulated ranks


def records(directory: Path, ranks: int, parts: int) -> list[bytes]:
    """What each rank hands to rank 0: ``parts`` parts of tensors that 8 ranks share; makes the files, sparse."""
    found = []
    for rank in range(ranks):
        group, member = divmod(rank, 8)
        pieces, start = [], 0
        for number in range(parts):
            key = f"optimizer.state.exp_avg.decoder.layers.{group}.block.parameter_{number}.weight"
            pieces.append(Written(key, (member * 64, 0), (64, 512), (512, 512), torch.float32, start, 64 * 512 * 4))
            start += 64 * 512 * 4
        name = f"__{rank}_0.distcp"
        with open(directory / name, "wb") as file:
            file.truncate(start)
        text = checksums_text({piece.start: f"{rank:016x}" for piece in pieces})
        beside = checksums_name(name)
        sealed = {name: (start, "0" * 64), beside: write_hashed(directory / beside, text)}
        found.append(pickle.dumps(WrittenShard(name, pieces, sealed)))
    return found


def unpickled(handed: list[bytes]) -> list[WrittenShard]:
    """As `agreement.gather` has them."""
    with many_objects():
        return [pickle.loads(data) for data in handed]


def simulate(ranks: int, parts: int, directory: Path) -> Table:
    """Seconds of each step that is not the writing and reading of shards."""
    with tempfile.TemporaryDirectory(prefix="checkpoints_", dir=directory) as folder:
        store = CheckpointStore(folder)
        handed = records(store.begin(1), ranks, parts)
        steps: dict[str, float] = {}
        processor: dict[str, float] = {}
        begun = time.process_time()

        def step(name: str, action: Callable[[], Any]) -> Any:
            steps[name], result = timed(action)
            processor[name] = time.process_time() - sum(processor.values()) - begun
            return result

        shards = step("rank 0: unpickle the gathered records", lambda: unpickled(handed))
        step("rank 0: join, write .metadata and manifest, publish", lambda: publish(store, 1, shards, {}, {}))
        manifest = step("rank 0, load: compare names and sizes", lambda: store.verify(1, hashes=False))
        sizes = {name: size for name, (size, _) in manifest.files.items()}
        step("every rank, load: share out the files", lambda: share_out(sizes, ranks))
        path = store.path(1)
        data = step("every rank, load: read and hash .metadata", lambda: read_verified(path, METADATA_FILE, manifest))
        step("every rank, load: unpickle and check .metadata", lambda: read_metadata_safely(path, data, sizes))
        gathered = sum(map(len, handed))
        rows = [[name, f"{seconds:.2f}", f"{processor[name]:.2f}"] for name, seconds in steps.items()]
        return Table(
            f"{ranks} ranks, {parts} parts each, {len(manifest.files):,} files; {gathered:,} bytes gathered on rank 0, "
            f".metadata of {len(data):,} bytes",
            ("step", "s", "s of processor time"),
            [*rows, ["all", f"{sum(steps.values()):.2f}", f"{sum(processor.values()):.2f}"]],
        )


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--gib", type=float, default=8.0, help="GiB of all tensors together")
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    made.add_argument("--simulate-ranks", type=int, metavar="N", help="instead: the records of N ranks")
    made.add_argument("--parts", type=int, default=100, help="parts of tensors per simulated rank")
    return made


def main(argv: list[str]) -> int:
    """Measure and print a table."""
    arguments = parser().parse_args(argv)
    if arguments.simulate_ranks:
        print(simulate(arguments.simulate_ranks, arguments.parts, arguments.directory).text())
        return 0
    columns = (
        "ranks", "bytes of largest rank", "disk GB/s", "disk s", "check s", "save s", "save GB/s",
        "most bytes read by a rank", "load s",
    )  # fmt: skip
    total = int(arguments.gib * 2**30)
    rows = []
    for world in arguments.ranks:
        print(f"{world} ranks: {arguments.repeats} saves and loads ...", file=sys.stderr, flush=True)
        rows.append(measure(world, total, arguments.repeats, arguments.directory))
    print(Table(f"{arguments.gib:g} GiB, medians of {arguments.repeats}", columns, rows).text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

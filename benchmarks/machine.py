"""Measures the rates that the planner needs of this machine's CPU, and writes them for ``tools/plan.py --machine``.

    python benchmarks/machine.py --ranks 2 --out machine.json        about a minute
    python tools/plan.py --model-preset umv2-8m --transformer-impl local --world-size 2 --machine machine.json

All ranks measure at the same time, because they share the machine's memory; a rate is the median over rounds of the
slowest rank's. GPUs are measured by tools/gpu_check.sh.

    peak_tflops, flops_efficiency   the best square product; products of a block of umv2-227m, relative to it
    attention_efficiency            attention of 12 heads of 64 over 512 tokens, forward and backward, relative to it
    search_rate                     the search for picks among 240 keys a side, by keys and cells that it looks at
    memory_bandwidth                products of 10 MiB, element by element, into new memory, read and written
    row_bandwidth                   the lookup's forward and backward, by the bytes that the planner counts
    update_bandwidth                fused Adam over 16M weights, by the bytes that the planner counts
    launch_us                       small operations with autograd, forward and backward
    link_latency_us, ...bandwidth   all-gathers of 1 KiB and of 16 MiB over the ranks
    all_reduce_gain                 bytes per second of an all-reduce of 16 MiB over those of the all-gather
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import describe_machine, load_warning  # noqa: E402
from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.planning.device_bytes import lookup  # noqa: E402
from umv2_megatron.planning.layout import Layout  # noqa: E402
from umv2_megatron.planning.machine_file import write_machine  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK = ((768, 2304), (768, 768), (768, 4992), (2496, 768))
"""Inputs and outputs of the linear layers of a block of umv2-227m."""
TABLE_ROWS = 360**2


class Bench:
    """The rates of one rank, measured beside the others."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        self.options, self.rank = options, rank
        self.dtype = DTYPES[options.precision]
        self.small = options.quick

    def seconds(self, work: Callable[[], Any], times: int = 1) -> float:
        """Median over rounds of the slowest rank's time for one of ``times`` calls."""
        found = []
        for number in range(self.options.rounds + 1):
            torch.distributed.barrier()
            start = time.perf_counter()
            for _ in range(times):
                work()
            taken = torch.tensor((time.perf_counter() - start) / times, dtype=torch.float64)
            torch.distributed.all_reduce(taken, op=torch.distributed.ReduceOp.MAX)
            if number:
                found.append(taken.item())
        return statistics.median(found)

    def rates(self) -> dict[str, float]:
        """All of them."""
        peak = self._products()
        links = self._links() if self.options.ranks > 1 else {}
        peak |= {"attention_efficiency": self._attention() / peak["peak_tflops"] / 1e12, "search_rate": self._search()}
        memory = {"memory_bandwidth": self._elements(), "row_bandwidth": self._lookup()}
        memory["update_bandwidth"] = self._update()
        return {**peak, **memory, "launch_us": self._launch(), "starts_ahead": 0, **links}

    def _products(self) -> dict[str, float]:
        side, tokens = (128, 32) if self.small else (1536, 1024)
        square = torch.randn(side, side).to(self.dtype)
        best = 2 * side**3 / self.seconds(lambda: square @ square)
        pairs = [(torch.randn(tokens, left).to(self.dtype), torch.randn(right, left).to(self.dtype))
                 for left, right in BLOCK]  # fmt: skip
        upstream = [torch.randn(tokens, right).to(self.dtype) for _, right in BLOCK]

        def block() -> None:
            for (x, weight), grad in zip(pairs, upstream):
                torch.nn.functional.linear(x, weight)
                grad @ weight
                grad.t() @ x

        operations = 6 * tokens * sum(left * right for left, right in BLOCK)
        reached = operations / self.seconds(block)
        peak = max(best, reached)
        return {"peak_tflops": peak / 1e12, "flops_efficiency": reached / peak}

    def _attention(self) -> float:
        """Operations per second, counted as the planner counts: half of the pairs, twice in the backward."""
        from umv2_megatron.ops import cpu_attention

        heads, length, width = (2, 32, 16) if self.small else (12, 512, 64)
        query, key, value = (torch.randn(length, 2, heads, width).to(self.dtype).requires_grad_() for _ in range(3))
        ours = cpu_attention.can(query, key, value)

        def once() -> None:
            if ours:
                out = cpu_attention.causal_attention(query, key, value, width**-0.5)
            else:
                first = (each.permute(1, 2, 0, 3) for each in (query, key, value))
                out = torch.nn.functional.scaled_dot_product_attention(*first, is_causal=True)
            torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

        return 3 * 2 * heads * 2 * length**2 * width / self.seconds(once)

    def _search(self) -> float:
        """1e9 keys and cells per second."""
        from umv2_megatron.ops import get_backend

        tokens, keys, kept = (8, 40, 8) if self.small else (1024, 240, 32)
        search = get_backend("auto", torch.device("cpu")).search
        scores, vector, cores = torch.randn(2, 2, tokens, 1, keys), torch.ones(1, 2), torch.randn(2, 1, 2, 2)

        def once() -> None:
            best = search.best_keys(scores, vector, vector, kept)
            search.cell_scores(scores, *search.best_cells(scores, best, cores.sum(0), kept), cores)

        return tokens * (2 * keys + kept**2) / self.seconds(once) / 1e9

    def _elements(self) -> float:
        shape = (8, 64) if self.small else (1024, 2496)
        left, right = torch.ones(shape, dtype=self.dtype), torch.ones(shape, dtype=self.dtype)
        return 3 * left.numel() * left.itemsize / self.seconds(lambda: left * right, 4) / 1e9

    def _lookup(self) -> float:
        """Also what is not at random places: the planner counts nothing else of it on a CPU."""
        from umv2_megatron.ops import get_backend

        tokens, rows, memory = (8, 100, 32) if self.small else (1024, TABLE_ROWS, 192)
        config = MemoryConfig(num_keys=360, topk=32, pre_value_dim=memory, value_dim=memory)
        g = torch.Generator().manual_seed(self.rank)
        tables = [torch.nn.Parameter(torch.randn(rows, memory, generator=g).to(self.dtype)) for _ in range(2)]
        for table in tables:
            table.main_grad = torch.zeros(table.shape)  # type: ignore[attr-defined]
        scores = torch.randn(tokens, 32, config.num_cores, generator=g).requires_grad_()
        projected = torch.randn(tokens, memory, generator=g).to(self.dtype).requires_grad_()
        chosen = get_backend("auto", torch.device("cpu")).lookup

        def once() -> None:
            picks = torch.randint(0, rows, (tokens, 32), generator=g)
            out = chosen(picks, None, scores, projected, *tables, 1, "none")
            out.backward(torch.ones_like(out))

        layout = Layout(bf16=self.dtype == torch.bfloat16, engine=False)
        moved = lookup(config, layout, tokens)
        return (moved.forward + moved.backward) / self.seconds(once) / 1e9

    def _update(self) -> float:
        weights = torch.nn.Parameter(torch.zeros((1 if self.small else 16) << 20))
        weights.grad = torch.ones_like(weights)
        adam = torch.optim.AdamW([weights], fused=True)
        adam.step()
        # moments and weights read and written, the gradient read
        return 7 * 4 * weights.numel() / self.seconds(lambda: adam.step() and None) / 1e9

    def _launch(self) -> float:
        x = torch.ones(8).requires_grad_()
        count = 100

        def chain() -> None:
            y: Tensor = x
            for _ in range(count):
                y = y * 2.0
            y.sum().backward()

        return self.seconds(chain) / (2 * count) * 1e6

    def _links(self) -> dict[str, float]:
        world = self.options.ranks

        def gather(elements: int) -> Callable[[], Any]:
            mine, everyone = torch.ones(elements), torch.empty(world * elements)
            return lambda: torch.distributed.all_gather_into_tensor(everyone, mine)

        latency = self.seconds(gather(256), 20)
        size = (1 << 12) if self.small else (4 << 20)
        sent = 4 * size * (world - 1)
        bandwidth = sent / max(1e-9, self.seconds(gather(size)) - latency) / 1e9
        summed = torch.zeros(size)
        taken = self.seconds(lambda: torch.distributed.all_reduce(summed)) - latency
        reduced = 2 * sent / world / max(1e-9, taken) / 1e9
        return {"link_latency_us": latency * 1e6, "intra_node_bandwidth": bandwidth, "inter_node_bandwidth": bandwidth,
                "all_reduce_gain": reduced / bandwidth, "gpus_per_node": world}  # fmt: skip


def _rank(rank: int, options: argparse.Namespace, address: str) -> None:
    torch.set_num_threads(options.threads)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=options.ranks)
    rates = Bench(options, rank).rates()
    if rank == 0:
        rounded = {name: rate if isinstance(rate, int) else float(f"{rate:.4g}") for name, rate in rates.items()}
        machine = describe_machine(quick=True)
        flags = f"--ranks {options.ranks} --threads {options.threads} --precision {options.precision}"
        source = f"benchmarks/machine.py {flags}, {datetime.date.today()}"
        write_machine(options.out, f"{machine['device']}, {options.ranks} ranks of {options.threads} threads",
                      rounded, source)  # fmt: skip
        for name, rate in rounded.items():
            print(f"{name:<24} {rate:g}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(argv: list[str]) -> int:
    """Measure and write. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="machine.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the machine (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: 1)")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each rate (default: 7)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=Path("machine.json"), help="file to write (default: machine.json)")
    options = parser.parse_args(argv)
    for name in ("ranks", "threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    if not options.out.resolve().parent.is_dir():
        parser.error(f"--out is {options.out}; expected a file in a directory that exists")
    warning = load_warning(describe_machine(quick=True))
    if warning:
        print(warning.strip(), file=sys.stderr)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    meeting = options.out.resolve().parent / f".{options.out.name}.meeting-{os.getpid()}"
    try:
        torch.multiprocessing.spawn(_rank, (options, f"file://{meeting}"), nprocs=options.ranks)
    finally:
        meeting.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

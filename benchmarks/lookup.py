"""Times the table lookup: every backend that runs here, plain autograd and an embedding_bag composition, interleaved.

    python benchmarks/lookup.py                        about a minute and a half on 2 cores, needs 3 GiB
    python benchmarks/lookup.py --json lookup.json --rounds 21
    python benchmarks/lookup.py --device cuda
    python benchmarks/lookup.py --docs docs/performance.md      writes the tables between the file's markers

Default case: 1,024 tokens, K 32, rows of 192, 260,000 rows, C 2; with and without pre-values, float32 and bfloat16.

- "forward" runs without gradients. "forward + backward" adds the tables' gradients to existing float32 buffers, as in
  training under mcore; plain autograd and embedding_bag make the fresh dense gradients that autograd makes, and are
  not charged for freeing them. "autograd into main_grad" adds them to the buffers, as mcore would have to.
- Contenders are interleaved within a round, on the same picks; other rounds have other picks. A time is the median over
  the rounds (lowest to highest), a ratio the median of the rounds' ratios: the machine's speed may drift.
- The bound of the compiled lookup, at 1 thread and at all, is measured in the same rounds (``row_rates.py``): the least
  time in which as many random rows can be touched at all, each distinct row once per pass. The forward reads the rows
  of both tables; the backward reads them again, and reads and writes those of the gradients.
- Outputs and gradients of all contenders are compared with the reference before anything is timed.
- Packages that bundle retrieval and lookup (product-key-memory, PEER-pytorch, ultra-mem) are timed as whole layers
  against ours of the same sizes, where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

from benchmarks.measure import (  # noqa: E402
    Table,
    add_options,
    add_to_history,
    describe_machine,
    machine_line,
    prepare,
    put_between_marks,
    take_turns,
    timed,
    write_json,
)
from benchmarks.row_rates import RowRates  # noqa: E402
from benchmarks.spread import Spread  # noqa: E402
from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.ops import BACKENDS, get_backend, reference  # noqa: E402

AUTOGRAD = "plain autograd"
MERGED = "autograd into main_grad"
BAG = "embedding_bag, autograd"
COMPILED = "--memory-backend cpu"
PASSES = ("forward", "forward + backward")
TARGET = 1.3


@dataclass
class Case:
    """Sizes of one lookup; C cores, Dp = Dv = ``width``."""

    tokens: int
    topk: int
    width: int
    rows: int
    cores: int
    pre_values: bool
    dtype: torch.dtype
    device: str

    @property
    def tables(self) -> int:
        return 2 if self.pre_values else 1

    @property
    def name(self) -> str:
        return f"{str(self.dtype).split('.')[1]}, {'values and pre-values' if self.pre_values else 'values only'}"


def embedding_bag_lookup(
    rows: Tensor, blocks: None, scores: Tensor, projected: Optional[Tensor], pre_values: Optional[Tensor],
    values: Tensor, num_blocks: int, activation: str,
) -> Tensor:  # fmt: skip
    """What one would compose of torch's own functions: a batched product for rho, one bag per token and core."""
    tokens, picks, cores = scores.shape
    weights = scores.to(values.dtype)
    if pre_values is not None and projected is not None:
        rho = torch.bmm(functional.embedding(rows, pre_values), projected.unsqueeze(-1))
        weights = weights * rho
    bags = rows.unsqueeze(1) * cores + torch.arange(cores, device=rows.device).view(1, cores, 1)
    return functional.embedding_bag(
        bags.reshape(-1, picks),
        values.view(-1, values.shape[1] // cores),
        per_sample_weights=weights.transpose(1, 2).reshape(-1, picks),
        mode="sum",
    ).view(tokens, -1)


class Contender:
    """One implementation with tensors of its own kind of gradient; the tables are shared by all."""

    def __init__(self, name: str, lookup: Callable[..., Tensor], case: Case, shared: dict[str, Any]) -> None:
        self.name, self.lookup = name, lookup
        self.arguments = {
            key: value.detach().requires_grad_() if isinstance(value, Tensor) else value
            for key, value in shared.items() if key not in ("upstream", "sums")
        }  # fmt: skip
        self.upstream = shared["upstream"]
        self.tables = [self.arguments[key] for key in ("values", "pre_values") if self.arguments[key] is not None]
        self.direct = name not in (AUTOGRAD, BAG)
        if self.direct:
            for table, total in zip(self.tables, shared["sums"]):
                table.main_grad = total

    def forward(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return self.lookup(rows=rows, blocks=None, num_blocks=1, activation="none", **self.arguments)

    def step(self, rows: Tensor) -> Tensor:
        out = self.lookup(rows=rows, blocks=None, num_blocks=1, activation="none", **self.arguments)
        out.backward(self.upstream)
        if self.name == MERGED:
            for table in self.tables:
                table.main_grad.add_(table.grad)
        return out

    def sums(self) -> list[Tensor]:
        """What the gradients of the tables are added to; of contenders that add them up themselves."""
        return [table.main_grad for table in self.tables]

    def clear(self) -> None:
        """Drop what a step has left; not timed."""
        for value in self.arguments.values():
            if isinstance(value, Tensor):
                value.grad = None

    def results(self, rows: Tensor) -> list[Tensor]:
        """Output and every gradient, small enough to keep: of tables, the picked rows."""
        picked = rows.flatten().unique()
        for table in self.tables:
            if self.direct:
                table.main_grad[picked] = 0
        out = self.step(rows).detach()
        grads = [value.grad for value in self.arguments.values() if isinstance(value, Tensor)
                 and not any(value is table for table in self.tables)]  # fmt: skip
        grads += [(table.main_grad if self.direct else table.grad)[picked] for table in self.tables]
        self.clear()
        return [tensor.double() for tensor in (out, *grads)]


def contenders(case: Case) -> list[Contender]:
    """Plain autograd first, then the composition, then every backend that runs on the device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, dtype)

    def table() -> Tensor:
        return normal(case.rows, case.width)

    shared = {
        "scores": normal(case.tokens, case.topk, case.cores, dtype=torch.float32),
        "projected": normal(case.tokens, case.width) if case.pre_values else None,
        "pre_values": table() if case.pre_values else None,
        "values": table(),
        "upstream": normal(case.tokens, case.width),
        # Filled, because pages of fresh zeros exist only once they are written to; training's buffers are in use.
        "sums": [torch.empty(case.rows, case.width, device=case.device).fill_(0.0) for _ in range(case.tables)],
    }
    found = [(AUTOGRAD, reference.lookup), (MERGED, reference.lookup), (BAG, embedding_bag_lookup)]
    for name in BACKENDS:
        if name != "reference" and (name == "scatter" or name == {"cpu": "cpu", "cuda": "triton"}[case.device]):
            try:
                found.append((f"--memory-backend {name}", get_backend(name, case.device).lookup))
            except ValueError as problem:
                print(f"left out: {problem}", file=sys.stderr)
    return [Contender(name, lookup, case, shared) for name, lookup in found]


def run_case(case: Case, rounds: int, clock: str = "wall") -> dict[str, Any]:
    """Compare the outputs, then time forward and forward + backward of all contenders, interleaved."""
    generator = torch.Generator().manual_seed(1)
    picks = [torch.randint(0, case.rows, (case.tokens, case.topk), generator=generator).to(case.device)
             for _ in range(rounds + 1)]  # fmt: skip
    racers = contenders(case)
    expected = racers[0].results(picks[0])
    errors = {racer.name: largest_error(racer.results(picks[0]), expected) for racer in racers}
    result: dict[str, Any] = {"pre_values": case.pre_values, "dtype": str(case.dtype).split(".")[1], "passes": {}}
    for name, backward in (("forward", False), ("forward + backward", True)):
        times: dict[str, list[float]] = {racer.name: [] for racer in racers}
        for number, rows in enumerate(picks):
            for racer in racers:
                elapsed = timed(partial(racer.step if backward else racer.forward, rows), clock, case.device)
                racer.clear()
                if number:  # the first round warms up
                    times[racer.name].append(elapsed)
        result["passes"][name] = {
            racer: summary(seconds, times[AUTOGRAD], errors[racer]) for racer, seconds in times.items()
        }
    return result


def against_bound(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """The compiled lookup and its bound with ``threads`` threads, by the clock of the wall, in turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        racer = next(each for each in contenders(case) if each.name == COMPILED)
        rates = {"forward": RowRates(racer.tables, []), "backward": RowRates(racer.tables, racer.sums())}
        ours: dict[str, list[float]] = {name: [] for name in PASSES}
        ways: dict[str, list[list[float]]] = {name: [] for name in rates}
        for number in range(rounds + 1):
            generator = torch.Generator().manual_seed(number)
            rows = torch.randint(0, case.rows, (case.tokens, case.topk), generator=generator)
            for name, work in zip(PASSES, (racer.forward, racer.step)):
                elapsed = timed(partial(work, rows))
                racer.clear()
                if number:
                    ours[name].append(elapsed)
            for name, rate in rates.items():
                found = rate.seconds(rows.numel(), generator)
                if number:
                    ways[name].append(found)
    finally:
        torch.set_num_threads(before)
    # the way that is fastest in the median, by its median: as the lookup is judged
    least = {name: min(map(statistics.median, zip(*found))) for name, found in ways.items()}
    bounds = {"forward": least["forward"], "forward + backward": least["forward"] + least["backward"]}
    return {"case": case.name, "threads": threads} | {
        name: {"ms": statistics.median(ours[name]) * 1e3, "bound_ms": bounds[name] * 1e3,
               "ratio": statistics.median(ours[name]) / bounds[name]}
        for name in PASSES
    }  # fmt: skip


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative to the largest element of each tensor."""
    return max(float((each - wanted).abs().max() / wanted.abs().max()) for each, wanted in zip(found, expected))


def summary(seconds: list[float], baseline: list[float], error: float) -> dict[str, float]:
    ratios = [slow / fast for slow, fast in zip(baseline, seconds)]
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "min_ms": min(seconds) * 1e3,
        "max_ms": max(seconds) * 1e3,
        "times_faster_than_autograd": statistics.median(ratios),
        "largest_error": error,
    }


# -- packages -------------------------------------------------------------------------------------------------------


def peer_layers(tokens: int, topk: int, width: int, keys: int) -> Iterator[tuple[str, Callable, dict]]:
    """Packages that are installed: name, what makes their layer, and the fields of our layer of the same sizes."""
    makers: dict[str, tuple[str, Callable, dict]] = {
        "PEER-pytorch": ("PEER_pytorch", lambda module: module.PEER(
            width, heads=1, num_experts=keys * keys, num_experts_per_head=topk),
            {"pre_value_dim": width, "num_cores": 1, "tucker_rank": 1, "pre_value_activation": "gelu"}),
        "product-key-memory": ("product_key_memory.product_key_memory", lambda module: module.PKM(
            width, heads=1, num_keys=keys, topk=topk, dim_head=width),
            {"pre_value_dim": 0, "num_cores": 1, "tucker_rank": 1}),
        "ultra-mem": ("ultra_mem.ultra_mem", lambda module: module.UltraMem(
            width, num_memories=keys * keys, topk=topk, dim_queries_keys=width // 2, value_expansion=1,
            pre_query_causal_conv=False),
            {"pre_value_dim": 0, "num_cores": 2, "tucker_rank": 2}),
    }  # fmt: skip
    for name, (module, make, fields) in makers.items():
        with contextlib.suppress(ImportError):
            package = importlib.import_module(module)
            yield name, (lambda make=make, package=package: make(package)), fields


def run_peers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward + backward of whole layers in float32, ours against each package's, interleaved."""
    from umv2_megatron.memory.layer import MemoryLayer

    keys, width = int(options.rows**0.5), options.dim
    results = []
    for name, make, fields in peer_layers(options.tokens, options.topk, width, keys):
        torch.manual_seed(0)
        config = MemoryConfig(num_keys=keys, key_dim=width // 2, value_dim=width, topk=options.topk, **fields)
        ours, theirs = MemoryLayer(config, width, 0, 1, 4 * width, 1), make()
        for table in ours.table.tables():
            table.main_grad = torch.empty_like(table).fill_(0.0)  # type: ignore[attr-defined]
        x = torch.randn(1, options.tokens, width)
        layers = {"ours": (ours, x[0]), "theirs": (theirs, x)}

        def clear(layers: dict = layers) -> None:
            for layer, _ in layers.values():
                layer.zero_grad(set_to_none=True)

        turns = {who: lambda number, pair=pair: _step(*pair) for who, pair in layers.items()}
        times = take_turns(turns, options.rounds, options.clock, clear)
        ratios = [theirs / ours for theirs, ours in zip(times["theirs"], times["ours"])]
        results.append({"package": name, "ratio": statistics.median(ratios)}
                       | {f"{who}_ms": statistics.median(each) * 1e3 for who, each in times.items()})  # fmt: skip
    return results


def _step(layer: torch.nn.Module, x: Tensor) -> None:
    out = layer(x.requires_grad_())
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()


# -- output ---------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """One case as text."""
    lines = []
    for name, rows in result["passes"].items():
        kind = "values and pre-values" if result["pre_values"] else "values only"
        lines.append(f"\n{name}, {result['dtype']}, {kind}")
        lines.append(f"{'':<28}{'ms':>8} {'lowest-highest':>17} {'faster':>8} {'error':>8}")
        for contender, row in rows.items():
            spread = f"{row['min_ms']:.1f}-{row['max_ms']:.1f}"
            lines.append(
                f"{contender:<28}{row['median_ms']:>8.1f} {spread:>17} {row['times_faster_than_autograd']:>7.1f}x"
                f" {row['largest_error']:>8.0e}"
            )
    return "\n".join(lines)


def bound_table(bounds: list[dict[str, Any]]) -> Table:
    """The compiled lookup beside what its rows cost at least."""
    rows = [
        (each["case"], str(each["threads"]),
         *(text for name in PASSES for text in (f"{each[name]['ms']:.2f}", f"{each[name]['bound_ms']:.2f}",
                                                f"{each[name]['ratio']:.2f}")))
        for each in bounds
    ]  # fmt: skip
    columns = ("", "threads", *(text for name in PASSES for text in (f"{name}, ms", "bound, ms", "ratio")))
    title = f"{COMPILED} beside its bound, the time of touching its rows; medians. Target: a ratio of at most {TARGET}."
    return Table(title, columns, rows)


def markdown(
    machine: dict[str, Any], results: list[dict[str, Any]], bounds: list[dict[str, Any]],
    peers: list[dict[str, Any]], clock: str = "wall",
) -> str:  # fmt: skip
    """Everything as tables for a document."""
    lines = [machine_line(machine, clock)]
    for result in results:
        kind = "values and pre-values" if result["pre_values"] else "values only"
        first, both = result["passes"].values()
        heading = f"{result['dtype']}, {kind}; medians in ms (lowest to highest), and speed-up over plain autograd:"
        lines += ["", heading, ""]
        lines += ["| | forward | | forward + backward | |", "|---|---|---|---|---|"]
        for name in first:
            cells = [
                f"{row['median_ms']:.1f} ({row['min_ms']:.1f}-{row['max_ms']:.1f}) | "
                f"{row['times_faster_than_autograd']:.1f}x"
                for row in (first[name], both[name])
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", bound_table(bounds).markdown()] if bounds else []
    if peers:
        lines += ["", "Whole layers, float32, forward + backward, medians in ms:", ""]
        lines += ["| package | its layer | ours, same sizes | ratio |", "|---|---|---|---|"]
        lines += [f"| {p['package']} | {p['theirs_ms']:.0f} | {p['ours_ms']:.0f} | {p['ratio']:.1f}x |" for p in peers]
    return "\n".join(lines)


def times_of(results: list[dict[str, Any]]) -> dict[str, Spread]:
    """Seconds of every contender, for the history."""
    return {
        f"{racer}, {name}, {case['dtype']}{', pre-values' if case['pre_values'] else ''}": Spread(
            row["median_ms"] / 1e3, row["min_ms"] / 1e3, row["max_ms"] / 1e3
        )
        for case in results for name, rows in case["passes"].items() for racer, row in rows.items()
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--topk", type=int, default=32, help="picks of a token")
    parser.add_argument("--dim", type=int, default=192, help="columns of both tables")
    parser.add_argument("--rows", type=int, default=260_000, help="rows of both tables")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_options(parser, rounds=11)
    options = parser.parse_args(argv)
    if options.quick:
        options.tokens, options.topk, options.dim, options.rows, options.rounds = 6, 3, 8, 50, 2
    if min(options.tokens, options.topk, options.dim, options.rows, options.cores) < 1:
        parser.error("sizes must be at least 1")
    if options.dim % options.cores:
        parser.error(f"--dim is {options.dim}; expected a multiple of --cores ({options.cores})")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, and there is no CUDA device; use --device cpu")
    prepare(parser, options, "lookup.py")
    machine = describe_machine(options.device, options.quick)
    print(
        f"{machine_line(machine, options.clock)}\n"
        f"T {options.tokens}, K {options.topk}, {options.dim} columns, {options.rows} rows, C {options.cores}, "
        f"{options.rounds} rounds"
    )
    results, bounds = [], []
    for pre_values in (True, False):
        for dtype in options.dtype or ("float32", "bfloat16"):
            case = Case(options.tokens, options.topk, options.dim, options.rows, options.cores, pre_values,
                        getattr(torch, dtype), options.device)  # fmt: skip
            results.append(run_case(case, options.rounds, options.clock))
            print(table(results[-1]), flush=True)
            if options.device == "cpu" and any(COMPILED in rows for rows in results[-1]["passes"].values()):
                for threads in sorted({1, torch.get_num_threads()}):
                    bounds.append(against_bound(case, options.rounds, threads))
    if bounds:
        print("\n" + bound_table(bounds).text(), flush=True)
    peers = run_peers(options) if options.device == "cpu" else []
    for peer in peers:
        print(f"\nwhole layer, forward + backward, float32: {peer['package']} {peer['theirs_ms']:.0f} ms, ours "
              f"{peer['ours_ms']:.0f} ms, {peer['ratio']:.1f}x")  # fmt: skip
    if options.docs:
        put_between_marks(markdown(machine, results, bounds, peers, options.clock), options.docs, "lookup.py")
    if options.json:
        write_json(options.json, "lookup.py", options, machine, {"cases": results, "bounds": bounds, "peers": peers})
    add_to_history("lookup.py", options, machine, times_of(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

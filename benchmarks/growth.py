"""Times lookups while rows, picks and tokens grow: the cost should follow the picks, and hardly the rows.

    python benchmarks/growth.py                      about 2 minutes on 2 cores, needs 13 GiB
    python benchmarks/growth.py --max-rows 1000000 --json growth.json
    python benchmarks/growth.py --docs docs/performance.md       writes tables between its markers, and growth.png

bfloat16 tables of values and pre-values (C 2), float32 gradients added to main_grad, rows picked uniformly: the worst
case for caches. One table is allocated; smaller ones are its first rows. Each timed call follows an untimed one of the
same kind on other picks, so that a table small enough for a cache is cached.

- Rows: the lookup alone at fixed T and K. More rows mean more cache and TLB misses. Their cost is measured by a plain
  copy of equally many randomly selected rows of the same tables: for forward, reading rows of both tables; for
  forward + backward, reading them twice, and reading and writing the rows of both gradients. The growth of the lookup
  is divided by the growth of this copy.
- K and T: the lookup alone, on 262,144 rows.
- N: the whole layer (hidden 768, Dk 192), whose table has N * N rows: scoring follows N, the square root of the rows.

Hardware counters come from ``perf``, where there is one and the machine lets it count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

from benchmarks.measure import (  # noqa: E402
    Table,
    add_options,
    at_least_one,
    describe_machine,
    prepare,
    publish,
    timed,
)
from benchmarks.spread import Spread  # noqa: E402
from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.memory.layer import MemoryLayer  # noqa: E402
from umv2_megatron.memory.value_table import ValueTable  # noqa: E402
from umv2_megatron.ops import get_backend  # noqa: E402

FORWARD, BOTH = "forward", "forward + backward"
CORES, HIDDEN, KEY_DIM = 2, 768, 192
TARGET = 1.5
EVENTS = ("cache-misses", "dTLB-load-misses")


class Store:
    """Values, pre-values and their gradient sums, [rows, dim] each; every table of the benchmark is a part of it."""

    def __init__(self, rows: int, dim: int) -> None:
        pattern = torch.randn(1 << 16, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.tables, self.sums = [], []
        for _ in range(2):
            table = torch.empty(rows, dim, dtype=torch.bfloat16)
            for start in range(0, rows, len(pattern)):
                part = table[start : start + len(pattern)]
                part.copy_(pattern[: len(part)])
            self.tables.append(table)
            # Filled, because pages of fresh zeros exist only once they are written to.
            self.sums.append(torch.empty(rows, dim).fill_(0.0))

    def parameters(self, rows: int) -> list[nn.Parameter]:
        """Values and pre-values of a table of ``rows`` rows, with main_grad."""
        parts = []
        for table, total in zip(self.tables, self.sums):
            parts.append(nn.Parameter(table[:rows]))
            parts[-1].main_grad = total[:rows]  # type: ignore[attr-defined]
        return parts


class Lookup:
    """The lookup of ``tokens`` * ``topk`` picks in a table of ``rows`` rows, and a copy of as many."""

    def __init__(self, store: Store, rows: int, tokens: int, topk: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.values, self.pre_values = store.parameters(rows)
        dim = self.values.shape[1]
        self._picks = [torch.randint(rows, (tokens, topk), generator=generator) for _ in range(8)]
        self.scores = torch.randn(tokens, topk, CORES, generator=generator)
        self.projected = torch.randn(tokens, dim, generator=generator).bfloat16()
        self.upstream = torch.randn(tokens, dim, generator=generator).bfloat16()
        self.lookup = get_backend("auto", "cpu").lookup
        self.copied = torch.empty(tokens * topk, dim, dtype=torch.bfloat16)
        self.sums = torch.empty(tokens * topk, dim)

    def picks(self, number: int, user: int) -> Tensor:
        """[T, K]; each of the four users has its own two sets of picks, so that none finds another's rows cached."""
        return self._picks[2 * user + number % 2]

    def forward(self, number: int) -> Tensor:
        """Without gradients."""
        with torch.no_grad():
            return self._look_up(self.picks(number, 0), self.scores, self.projected)

    def step(self, number: int) -> None:
        """Forward and backward, of scores, projected input and both tables."""
        scores, projected = (each.detach().requires_grad_() for each in (self.scores, self.projected))
        self._look_up(self.picks(number, 1), scores, projected).backward(self.upstream)

    def _look_up(self, picks: Tensor, scores: Tensor, projected: Tensor) -> Tensor:
        return self.lookup(
            rows=picks, blocks=None, scores=scores, projected=projected,
            pre_values=self.pre_values, values=self.values, num_blocks=1, activation="none",
        )  # fmt: skip

    def copy(self, number: int) -> None:
        """Read as many rows as ``forward`` reads."""
        self._read(self.picks(number, 2).flatten())

    def copy_both(self, number: int) -> None:
        """Touch as many rows as ``step`` touches."""
        rows = self.picks(number, 3).flatten()
        self._read(rows)
        self._read(rows)
        for table in (self.values, self.pre_values):
            torch.index_select(table.main_grad, 0, rows, out=self.sums)  # type: ignore[arg-type]
            table.main_grad.index_copy_(0, rows, self.sums)  # type: ignore[operator]

    def _read(self, rows: Tensor) -> None:
        for table in (self.values.detach(), self.pre_values.detach()):
            torch.index_select(table, 0, rows, out=self.copied)

    def touched(self, caches: dict[str, int]) -> dict[str, Any]:
        """What one forward touches of the tables: distinct rows, bytes, pages, and the smallest cache that holds the
        whole tables, or "none"."""
        picked = self.picks(0, 0).unique()
        row = self.values.shape[1] * self.values.itemsize
        table = 2 * self.values.numel() * self.values.itemsize
        fits = [name for name, size in caches.items() if table <= size]
        return {
            "distinct_rows": picked.numel(),
            "bytes": 2 * picked.numel() * row,
            "pages": 2 * (picked * row // 4096).unique().numel(),
            "table_bytes": table,
            "fits": fits[0] if fits else "none",
        }


def whole_layer(store: Store, keys: int, tokens: int, topk: int) -> Callable[[int], None]:
    """Forward and backward of a memory layer with N = ``keys``, bfloat16, on rows of ``store``."""
    dim = store.tables[0].shape[1]
    config = MemoryConfig(num_keys=keys, key_dim=KEY_DIM, value_dim=dim, pre_value_dim=dim, topk=topk, num_cores=CORES)
    table = ValueTable(config, keys * keys, torch.bfloat16, "meta")
    table.values, table.pre_values = store.parameters(keys * keys)
    layer = MemoryLayer(
        config, HIDDEN, 0, 1, 4 * HIDDEN, 1, table=table, params_dtype=torch.bfloat16, perform_initialization=False
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(1.0 if parameter.dim() == 1 else torch.randn(parameter.shape, generator=generator) * 0.05)
    layer.refresh_singular_vectors()
    inputs = [torch.randn(tokens, HIDDEN, generator=generator).bfloat16() for _ in range(4)]

    def step(number: int) -> None:
        out = layer(inputs[number % len(inputs)].requires_grad_())
        out.backward(torch.ones_like(out))
        for tensor in (*layer.parameters(), *inputs):
            tensor.grad = None

    return step


# -- measuring ------------------------------------------------------------------------------------------------------


def warm_turns(contenders: dict[Any, Callable[[int], Any]], rounds: int, clock: str) -> dict[Any, list[float]]:
    """As ``take_turns``, but each timed call follows an untimed one of the same contender on other inputs."""
    times: dict[Any, list[float]] = {key: [] for key in contenders}
    for number in range(rounds):
        for key, work in contenders.items():
            work(2 * number)
            times[key].append(timed(partial(work, 2 * number + 1), clock))
    return times


def hardware_counts(work: Callable[[int], Any], calls: int = 10) -> dict[str, float]:
    """Events of ``EVENTS`` per call of ``work`` that ``perf`` can count here; empty without perf."""
    perf = shutil.which("perf")
    if perf is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "counts")
        counter = subprocess.Popen(
            [perf, "stat", "-x", ";", "-e", ",".join(EVENTS), "-o", str(output), "-p", str(os.getpid())],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(0.2)  # until it counts
        for number in range(calls):
            work(number)
        with contextlib.suppress(ProcessLookupError):
            counter.send_signal(signal.SIGINT)
        try:
            counter.wait(10)
        except subprocess.TimeoutExpired:  # a signal that came before it was ready to take one
            counter.kill()
            counter.wait()
        lines = output.read_text().splitlines() if output.exists() else []
    found = (line.split(";") for line in lines)
    return {line[2]: float(line[0]) / calls for line in found if len(line) > 2 and line[0].replace(".", "").isdigit()}


def measure(options: argparse.Namespace, caches: dict[str, int]) -> dict[str, Any]:
    """All four growths; times are seconds per token."""
    store = Store(options.max_rows, options.dim)

    def run(turns: dict[Any, Callable[[int], Any]], tokens: dict[Any, int] | None = None) -> dict[Any, Any]:
        times = warm_turns(turns, options.rounds, options.clock)
        counts = tokens or dict.fromkeys(turns, options.tokens)
        return {key: vars(Spread.of([each / counts[key] for each in taken])) for key, taken in times.items()}

    lookups = {rows: Lookup(store, rows, options.tokens, options.topk) for rows in row_steps(options.max_rows)}
    turns: dict[Any, Callable[[int], Any]] = {}
    for rows, each in lookups.items():
        turns |= {(rows, FORWARD, "lookup"): each.forward, (rows, FORWARD, "copy"): each.copy}
        turns |= {(rows, BOTH, "lookup"): each.step, (rows, BOTH, "copy"): each.copy_both}
    times = run(turns)
    by_rows = [
        {
            "rows": rows,
            **{kind: {what: times[rows, kind, what] for what in ("lookup", "copy")} for kind in (FORWARD, BOTH)},
            "touched": each.touched(caches),
            "counts": hardware_counts(each.forward),
        }
        for rows, each in lookups.items()
    ]
    middle = min(options.max_rows, 1 << 18)
    grids = {
        "K": {topk: Lookup(store, middle, options.tokens, topk) for topk in options.topks},
        "T": {tokens: Lookup(store, middle, tokens, options.topk) for tokens in options.token_counts},
    }
    result: dict[str, Any] = {"rows": by_rows}
    for name, found in grids.items():
        turns = {(size, kind): work for size, each in found.items()
                 for kind, work in ((FORWARD, each.forward), (BOTH, each.step))}  # fmt: skip
        times = run(turns, {key: key[0] for key in turns} if name == "T" else None)
        result[name] = [{name: size, **{kind: times[size, kind] for kind in (FORWARD, BOTH)}} for size in found]
    sides = [int(rows**0.5) for rows in row_steps(options.max_rows)]
    turns = {side: whole_layer(store, side, options.tokens, options.topk) for side in sides}
    times = run(turns)
    result["N"] = [{"N": side, "rows": side * side, BOTH: times[side]} for side in sides]
    return result


def row_steps(most: int) -> list[int]:
    """10^4 and further half powers of ten (rounded) up to ``most``; ``most`` alone where that is less."""
    steps = [round(10 ** (half / 2)) for half in range(8, 20)]
    return [rows for rows in steps if rows <= most] or [most]


def growth(by_rows: list[dict[str, Any]], kind: str, first: int) -> dict[str, float]:
    """How much slower a token is in the last table than in the first of at least ``first`` rows."""
    start = next(row for row in by_rows if row["rows"] >= min(first, by_rows[-1]["rows"]))
    small, large = start[kind], by_rows[-1][kind]
    lookup, copy = (large[what]["median"] / small[what]["median"] for what in ("lookup", "copy"))
    extra = {f"{what}_extra_us": 1e6 * (large[what]["median"] - small[what]["median"]) for what in ("lookup", "copy")}
    return {"from": start["rows"], "to": by_rows[-1]["rows"], "lookup": lookup, "copy": copy, "beyond": lookup / copy,
            **extra}  # fmt: skip


# -- output ---------------------------------------------------------------------------------------------------------


def describe(options: argparse.Namespace, result: dict[str, Any], caches: dict[str, int]) -> list[Table | str]:
    """The tables."""
    micro = 1e6
    rows = []
    for row in result["rows"]:
        touched = row["touched"]
        rows.append((
            f"{row['rows']:,}",
            *(Spread(**row[kind][what]).text(2, micro) for kind in (FORWARD, BOTH) for what in ("lookup", "copy")),
            f"{touched['table_bytes'] / 1e6:,.1f}", touched["fits"], f"{touched['distinct_rows']:,}",
            f"{touched['bytes'] / 1e6:.1f}", f"{touched['pages']:,}",
        ))  # fmt: skip
    counted = [event for event in EVENTS if any(event in row["counts"] for row in result["rows"])]
    sizes = ", ".join(f"{name} {size / 2**20:g} MiB" for name, size in caches.items())
    first = Table(
        f"Lookup, {options.tokens:,} tokens, K {options.topk}, {options.dim} columns per table, bfloat16; microseconds "
        f"per token, medians (lowest-highest). Caches of this machine: {sizes or 'unknown'}. \"Copy\" copies as many "
        "rows as the pass before it reads or writes. \"Fits in\" is the smallest cache that holds both tables. The "
        "last three columns count what one forward touches.",
        ("rows", "forward", "copy", "forward + backward", "copy", "tables, MB", "fits in", "distinct rows", "MB",
         "4 KiB pages"),
        rows,
    )  # fmt: skip
    beyond = []
    for kind in (FORWARD, BOTH):
        for start in (10**4, 10**5):
            found = result["growth"][f"{kind}, from {start}"]
            beyond.append((
                f"{kind}, {found['from']:,} to {found['to']:,} rows",
                f"{found['lookup']:.2f}x", f"{found['copy']:.2f}x", f"{found['beyond']:.2f}",
                f"{found['lookup_extra_us']:.2f}", f"{found['copy_extra_us']:.2f}",
            ))  # fmt: skip
    second = Table(
        f"Growth with the rows; target: growth of the lookup / growth of the copy below {TARGET}. The last two columns "
        "are the microseconds per token that the larger table adds.",
        ("", "growth of lookup", "growth of copy", "lookup / copy", "added to lookup", "added to copy"), beyond,
    )  # fmt: skip
    events = "none (perf is missing or not permitted here)"
    if counted:
        events = "; ".join(
            f"{event} " + ", ".join(f"{row['counts'].get(event, 0):,.0f}" for row in result["rows"])
            for event in counted
        )  # fmt: skip
    parts: list[Table | str] = [first, second, f"Hardware counters of one forward, in the order of the rows: {events}."]
    for name, unit, divided in (("K", "nanoseconds per pick", 1e9), ("T", "microseconds per token", micro)):
        parts.append(Table(
            f"Growth with {name}: {unit}.", (name, FORWARD, BOTH),
            [(f"{row[name]:,}", *(Spread(**row[kind]).text(1, divided / (row["K"] if name == "K" else 1))
                                  for kind in (FORWARD, BOTH))) for row in result[name]],
        ))  # fmt: skip
    parts.append(Table(
        f"Whole layer, hidden {HIDDEN}, Dk {KEY_DIM}, bfloat16, {BOTH}: microseconds per token.", ("N", "rows", BOTH),
        [(f"{row['N']:,}", f"{row['rows']:,}", Spread(**row[BOTH]).text(1, micro)) for row in result["N"]],
    ))  # fmt: skip
    return parts


def plot(result: dict[str, Any], path: Path) -> None:
    """Four log-log panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")

    def draw(panel: int, across: str, label: str, style: str, *keys: str) -> None:
        found = result[("rows", "K", "T", "N")[panel]]
        heights: list[Any] = list(found)
        for key in (*keys, "median"):
            heights = [row[key] for row in heights]
        color = "tab:blue" if keys[0] == FORWARD else "tab:red"
        lengths = [row[across] for row in found]
        panels[panel].plot(lengths, [1e6 * each for each in heights], style, color=color, marker=".", label=label)

    for kind in (FORWARD, BOTH):
        draw(0, "rows", kind, "-", kind, "lookup")
        draw(0, "rows", f"copy, {kind}", "--", kind, "copy")
        draw(1, "K", kind, "-", kind)
        draw(2, "T", kind, "-", kind)
    draw(3, "rows", BOTH, "-", BOTH)
    last = result["N"][-1]
    lengths = [row["rows"] for row in result["N"]]
    root = [1e6 * last[BOTH]["median"] * (rows / last["rows"]) ** 0.5 for rows in lengths]
    panels[3].plot(lengths, root, ":", color="gray", label="square root of the rows")
    titles = (("lookup", "rows of the table"), ("lookup", "K"), ("lookup", "tokens"), ("whole layer", "rows"))
    for axes, (title, name) in zip(panels, titles):
        axes.set(xscale="log", yscale="log", title=title, xlabel=name, ylabel="microseconds per token")
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--topk", type=int, default=32, help="picks of a token, where they do not grow")
    parser.add_argument("--dim", type=int, default=96, help="columns of both tables")
    parser.add_argument("--max-rows", type=int, default=10**7, help="rows of the largest table (default: 10^7)")
    parser.add_argument("--plot", type=Path, help="write the figure there (default with --docs: growth.png beside it)")
    add_options(parser, rounds=9)
    options = parser.parse_args(argv)
    options.topks, options.token_counts = (8, 32, 128, 768), (64, 256, 1024, 4096)
    if options.quick:
        options.tokens, options.topk, options.dim, options.max_rows, options.rounds = 8, 4, 8, 1000, 1
        options.topks, options.token_counts = (2, 8), (4, 16)
    at_least_one(parser, options, "tokens", "topk", "dim")
    if options.max_rows < 256:
        parser.error(f"--max-rows is {options.max_rows}; expected at least 256")
    if options.dim % CORES:
        parser.error(f"--dim is {options.dim}; expected a multiple of {CORES}")
    prepare(parser, options, "growth.py")
    needed = options.max_rows * options.dim * 2 * (2 + 4)
    available = psutil.virtual_memory().available
    if needed > 0.8 * available:
        parser.error(f"--max-rows is {options.max_rows}: its tables need {needed / 2**30:.1f} GiB and "
                     f"{available / 2**30:.1f} GiB are free; give fewer rows")  # fmt: skip
    machine = describe_machine(quick=options.quick)
    caches = machine["cache_bytes"]
    result = measure(options, caches)
    result["growth"] = {
        f"{kind}, from {start}": growth(result["rows"], kind, start)
        for kind in (FORWARD, BOTH) for start in (10**4, 10**5)
    }  # fmt: skip
    if options.plot is None and options.docs is not None:
        options.plot = options.docs.parent / "growth.png"
    if options.plot is not None:
        plot(result, options.plot)
    times = {f"{kind} of a token's lookup in {row['rows']} rows": Spread(**row[kind]["lookup"])
             for row in result["rows"] for kind in (FORWARD, BOTH)}  # fmt: skip
    publish("growth.py", options, machine, describe(options, result, caches), result, times)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

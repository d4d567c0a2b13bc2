"""Times decoding: UltraMemV2 against transformers' OLMoE of the same depth, width, activated and total parameters.

    python benchmarks/decode.py                               227M/1.2B in float32, batch 1, 8, 32: about 10 minutes
    python benchmarks/decode.py --prefill 2048 --prefill 8192 --batch 1 --no-mmap        prompts as well
    python benchmarks/decode.py --size 1b-7b                  1B/7B in bfloat16, batch 1; needs 16 GiB
    python benchmarks/decode.py --device cuda --size 1b-7b --batch 1 --batch 8 --batch 32
    python benchmarks/decode.py --size 227m-1.2b --size 1b-7b --docs docs/inference.md     writes tables and plot there

What is compared: ``UMv2ForCausalLM`` of this repository and ``OlmoeForCausalLM`` of transformers, as they are, with
random weights, in the same dtype and with the same number of threads. OLMoE has 64 experts, 8 active; its inner size is
solved so that the total parameters come out (the activated ones do, too). Before each batch size OLMoE tries
the expert implementations that transformers has for the device, and keeps the fastest.

How: each side lives in its own process (benchmarks/decode_side.py). In every round each side times a few steps while
the other one waits; who begins alternates. A side's time is the median over the rounds of the rounds' mean step (lowest
to highest), the ratio the median of the rounds' ratios. Where memory has no room for both models at once, a round
builds one, times it, ends it, and builds the other.

The limit of a step is the larger of two times: the bytes that it reads (weights, counted, and the keys and values of
the cached tokens) at the machine's copy bandwidth, and two operations for each activated parameter and sequence at its
GEMM rate in the model's dtype, both measured at the start. The cache counts because every step has to read all of it,
each sequence its own: it grows with the batch, and no order of computing saves it. Up to November 2026 it was left out.

Bytes touched are counted in steps of their own, see decode_side.py. Peak memory is that of the side's process, from the
moment its weights and cache are ready.

The mmap rows: the same UltraMemV2, saved by ``save_pretrained`` and loaded with ``memory_tables="mmap"`` in a process
that may take less memory than the tables from the moment it has loaded (RLIMIT_AS: what is mapped then, and so much
more). Pages of the files are the system's cache, which gives them up when memory is short; therefore the resident
memory without them is reported, and "files not cached" drops the export from that cache before every step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import (  # noqa: E402
    Table,
    add_options,
    describe_machine,
    gemm_rate,
    prepare,
    publish,
)
from benchmarks.prefill import prefill_table, run_prefill  # noqa: E402
from benchmarks.spread import Spread, ratio  # noqa: E402
from umv2_megatron.config.presets import find_preset  # noqa: E402
from umv2_megatron.planning.parameters import count_parameters  # noqa: E402

OURS, PEER = "UltraMemV2", "OLMoE"
SIZES: dict[str, dict[str, Any]] = {
    "227m-1.2b": {"preset": "umv2-227m-1.2b", "dtype": "float32", "batches": [1, 8, 32]},
    "1b-7b": {"preset": "umv2-1b-7b", "dtype": "bfloat16", "batches": [1]},
    "tiny": {"preset": "umv2-tiny", "dtype": "float32", "batches": [1, 2]},
}


class SideProcess:
    """A process of decode_side.py."""

    def __init__(self, options: dict[str, Any]) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "decode_side.py"), json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self._facts: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Sizes of the model; waits until it is built."""
        if self._facts is None:
            self._facts = self._answer()
        return self._facts

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin is not None and self.facts
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with exit code {self._process.wait()}; its message is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Contestants:
    """The sides of one size: resident together where memory allows, else built anew for every turn."""

    def __init__(self, sides: dict[str, dict[str, Any]], resident: bool) -> None:
        self.sides, self.resident = sides, resident
        self.facts: dict[str, dict[str, Any]] = {}
        self._kept = {name: SideProcess(side) for name, side in sides.items()} if resident else {}
        self._prepared: dict[str, tuple[int, int]] = {}

    def ready(self, name: str, batch: int, context: int) -> SideProcess:
        """The side's process, prepared for the batch; another one has ended if there is room for one only."""
        if not self.resident:
            for other in set(self._kept) - {name}:
                self._kept.pop(other).close()
                self._prepared.pop(other, None)
        if name not in self._kept:
            self._kept[name] = SideProcess(self.sides[name])
        process = self._kept[name]
        self.facts.setdefault(name, {}).update(process.facts)
        if self._prepared.get(name) != (batch, context):
            self.facts[name].update(process.ask("prepare", batch=batch, context=context))
            process.ask("time", steps=2)  # the first steps after a change are slower
            self._prepared[name] = (batch, context)
        return process

    def close(self) -> None:
        """End all."""
        for process in self._kept.values():
            process.close()


def run_batch(contestants: Contestants, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time all sides, interleaved, then count what a step reads."""
    names = list(contestants.sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    measured: dict[str, dict[str, Any]] = {name: {} for name in names}
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            process = contestants.ready(name, batch, options.context)
            answer = process.ask("time", steps=options.steps, clock=options.clock)
            times[name].append(statistics.mean(answer["ms"]))
            measured[name]["peak_bytes"] = max(measured[name].get("peak_bytes", 0), process.ask("peak")["bytes"])
            if number == options.rounds - 1:
                measured[name].update(process.ask("count", steps=3))
                measured[name]["experts_implementation"] = contestants.facts[name]["chosen"]
    for name in names:
        measured[name]["rounds_ms"] = times[name]
    ours, peer = measured[OURS], measured[PEER]
    return {
        "batch": batch,
        "context": options.context,
        "sides": measured,
        "times_faster": ratio(times[PEER], times[OURS]).median,
        "sparse_bytes_ratio": peer["sparse"] / ours["sparse"],
        "bytes_ratio": (peer["sparse"] + peer["dense"]) / (ours["sparse"] + ours["dense"]),
    }


def settings_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What both sides of a size are told."""
    dtype = options.dtype or SIZES[name]["dtype"]
    return {"preset": SIZES[name]["preset"], "dtype": dtype, "device": options.device, "threads": options.threads}


def run_size(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one size."""
    size = SIZES[name]
    common = settings_of(name, options)
    sides = {OURS: {"side": "umv2", **common}, PEER: {"side": "olmoe", **common}}
    free = psutil.virtual_memory().available
    resident = options.device == "cpu" and 2.3 * bytes_of_weights(common) < free
    contestants = Contestants(sides, resident)
    batches = []
    try:
        for batch in options.batch or size["batches"]:
            batches.append(run_batch(contestants, batch, options))
            print(f"{name}, batch {batch}: {batches[-1]['times_faster']:.2f} times faster", file=sys.stderr, flush=True)
        prompts = [run_prefill(contestants, tokens, options) for tokens in options.prefill or []]
    finally:
        contestants.close()
    result = {"size": name, "dtype": common["dtype"], "facts": contestants.facts, "batches": batches,
              "resident": resident, "prefill": prompts}  # fmt: skip
    if not options.no_mmap and options.device == "cpu":
        result["mmap"] = run_mmap(common, batches, options)
    return result


def bytes_of_weights(common: dict[str, Any]) -> int:
    """Bytes of the weights of either side, about."""
    preset = find_preset(common["preset"])
    count = count_parameters(preset.model, preset.memory_config())
    return (count.total + 2 * count.embedding) * {"float32": 4, "bfloat16": 2}[common["dtype"]]


# -- tables in files ----------------------------------------------------------------------------------------------


def run_mmap(common: dict[str, Any], batches: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Time UltraMemV2 with its tables in safetensors files, warm and cold, in a process of limited memory."""
    folder = Path(tempfile.mkdtemp(prefix="umv2_decode_", dir=options.export_dir))
    try:
        saver = SideProcess({"side": "umv2", **common, "save": str(folder)})
        table_bytes = saver.facts["sparse_bytes"]
        saver.close()
        limit = int((options.mmap_limit_gib or 1.0) * 2**30)
        side = SideProcess({"side": "umv2", **common, "load": str(folder), "limit_bytes": limit})
        found = []
        for each in batches:
            side.ask("prepare", batch=each["batch"], context=options.context)
            row: dict[str, Any] = {"batch": each["batch"], "in_memory_ms": each["sides"][OURS]["rounds_ms"]}
            side.ask("read_files")  # the batch before has dropped them
            for name in ("warm", "cold"):
                request = {"cold": name == "cold", "clock": options.clock}
                side.ask("time", steps=2, **request)
                row[name] = side.ask("time", steps=max(options.rounds, 3), **request)["ms"]
            row.update(side.ask("peak"))
            found.append(row)
        side.close()
        loading = side.facts["loading_peak_bytes"]
        return {"table_bytes": table_bytes, "limit_bytes": limit, "loading_peak_bytes": loading, "batches": found}
    finally:
        shutil.rmtree(folder)


# -- output -------------------------------------------------------------------------------------------------------


def limit_ms(result: dict[str, Any], activated: int, machine: dict[str, Any]) -> float:
    """What a step of UltraMemV2 takes at least, by the bytes that it reads or the operations that it needs."""
    ours = result["sides"][OURS]
    read = (ours["dense"] + ours["sparse"] + ours["cache"]) / machine["copy_bytes_per_s"]
    return max(read, 2 * activated * result["batch"] / machine["gemm_flops_per_s"]) * 1e3


def in_dtype(machine: dict[str, Any], dtype: str, device: str, quick: bool) -> dict[str, Any]:
    """``machine`` with its GEMM rate in ``dtype``."""
    if dtype == "float32":
        return machine
    return {**machine, "gemm_flops_per_s": gemm_rate(getattr(torch, dtype), device, quick)}


def tables_of(size: dict[str, Any], rounds: int, machine: dict[str, Any]) -> list[Table | str]:
    """What stands in a document about one size."""
    facts = "\n".join(
        f"- {name}: {fact['activated'] / 1e6:.0f}M activated parameters, {fact['total'] / 1e9:.2f}B in total without "
        f"embeddings; {fact['sparse_bytes'] / 2**30:.2f} of {fact['bytes'] / 2**30:.2f} GiB are value tables or experts"
        for name, fact in size["facts"].items()
    )
    turns = "both models in memory" if size["resident"] else "one model in memory at a time"
    times, touched = [], []
    for result in size["batches"]:
        ours, peer = result["sides"][OURS], result["sides"][PEER]
        batch = str(result["batch"])
        limit = limit_ms(result, size["facts"][OURS]["activated"], machine)
        times.append((
            batch,
            *(Spread.of(side["rounds_ms"]).text() for side in (ours, peer)),
            f"{result['times_faster']:.2f}",
            f"{limit:.1f}",
            f"{statistics.median(ours['rounds_ms']) / limit:.2f}",
            str(peer["experts_implementation"]),
            *(f"{side['peak_bytes'] / 2**30:.2f}" for side in (ours, peer)),
        ))  # fmt: skip
        touched.append((
            batch,
            *(f"{(side['dense'] + side['sparse']) / 1e6:,.0f}" for side in (ours, peer)),
            *(f"{side['sparse'] / 1e6:,.2f}" for side in (ours, peer)),
            f"1 : {result['sparse_bytes_ratio']:,.0f}",
            f"{ours['cache'] / 1e6:,.0f}",
        ))  # fmt: skip
    context = size["batches"][0]["context"]
    parts: list[Table | str] = [
        f"### {size['size'].upper()}, {size['dtype']}",
        facts,
        f"GEMM rate in {size['dtype']}: {machine['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s.",
        Table(
            f"Milliseconds per decode step after {context} cached tokens: medians of {rounds} rounds (lowest-highest), "
            f"{turns}; peak memory in GiB.",
            ("batch", OURS, PEER, "speed-up", "limit", f"{OURS} / limit", f"{PEER}'s expert implementation",
             f"peak, {OURS}", f"peak, {PEER}"),  # fmt: skip
            times,
        ),
        Table(
            "MB of weights that a step reads (counted, not estimated); sparse weights are value tables or experts. The "
            "last column: keys and values, on both sides.",
            ("batch", f"all, {OURS}", f"all, {PEER}", f"sparse, {OURS}", f"sparse, {PEER}", "ratio of sparse", "cache"),
            touched,
        ),
    ]
    if size["prefill"]:
        flops = 2 * size["facts"][OURS]["activated"]
        parts.append(prefill_table(size["prefill"], OURS, PEER, flops, machine["gemm_flops_per_s"]))
    if "mmap" in size:
        parts.append(mmap_table(size["mmap"]))
    return parts


def mmap_table(mmap: dict[str, Any]) -> Table:
    """The table about tables in files."""
    return Table(
        f'`memory_tables="mmap"`: tables of {mmap["table_bytes"] / 2**30:.2f} GiB in a process that may map '
        f"{mmap['limit_bytes'] / 2**30:.2f} GiB more than it has mapped after loading (RLIMIT_AS). At most "
        f"{mmap['loading_peak_bytes'] / 2**30:.2f} GiB were resident while it loaded. Milliseconds per step; "
        "resident memory without file pages in GiB.",
        ("batch", "in memory", "mmap, files cached", "mmap, files not cached", "resident"),
        [
            (
                str(row["batch"]),
                *(Spread.of(row[name]).text() for name in ("in_memory_ms", "warm", "cold")),
                f"{(row['private_bytes'] or row['bytes']) / 2**30:.2f}",
            )
            for row in mmap["batches"]
        ],
    )


def draw(sizes: list[dict[str, Any]], path: Path) -> None:
    """Bars of milliseconds and of sparse bytes touched per step, one group per size and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(size["size"], result) for size in sizes for result in size["batches"]]
    labels = [f"{size.upper()}\nbatch {result['batch']}" for size, result in groups]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    panels = (
        ("milliseconds per decode step", lambda side: statistics.median(side["rounds_ms"])),
        ("MB of sparse weights touched per step", lambda side: side["sparse"] / 1e6),
    )
    for axis, (title, value) in zip(axes, panels):
        for offset, name in ((-0.2, OURS), (0.2, PEER)):
            heights = [value(result["sides"][name]) for _, result in groups]
            bars = axis.bar([place + offset for place in range(len(groups))], heights, 0.4, label=name)
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_title(title)
        axis.set_yscale("log")
        axis.set_xticks(range(len(groups)), labels)
        axis.margins(y=0.15)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=sorted(SIZES), action="append", help="default: 227m-1.2b; may be repeated")
    made.add_argument("--batch", type=int, action="append", help="default: 1, 8, 32 (1b-7b: 1); may be repeated")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 (1b-7b: bfloat16)")
    made.add_argument("--context", type=int, default=128, help="tokens in the cache (default: 128)")
    made.add_argument("--steps", type=int, default=5, help="steps of a side in one round (default: 5)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--prefill", type=int, action="append", help="tokens of a prompt to time, too; may be repeated")
    made.add_argument("--no-mmap", action="store_true", help="leave out the part with tables in files")
    made.add_argument(
        "--mmap-limit-gib",
        type=float,
        help="what that part may take beyond what it has mapped (default: 1)",
    )
    made.add_argument("--export-dir", help="where that part writes the model, for the time it runs (default: /tmp)")
    made.add_argument("--plot", type=Path, help="PNG (default with --docs: decode.png beside that file)")
    add_options(made, rounds=9)
    return made


def command_line(options: argparse.Namespace) -> str:
    """The command that repeats the measurement: the options that define it, without those that say where results go."""
    places = {"json", "docs", "plot", "export_dir"}
    defaults = vars(parser().parse_args([]))
    words = ["python benchmarks/decode.py"]
    for name, value in vars(options).items():
        if name not in places and value != defaults[name]:
            flag = f"--{name.replace('_', '-')}"
            words += (
                [flag]
                if value is True
                else [f"{flag} {each}" for each in (value if isinstance(value, list) else [value])]
            )
    return " ".join(words)


def instructions() -> str:
    """The variables that restrict the instructions of libraries and kernels, as they stand before a command."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "UMV2_CPU_ARCH")
    return "".join(f"{name}={os.environ[name]} " for name in names if name in os.environ)


def check_counts(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error where --steps, --context or --batch is below 1."""
    for name in ("steps", "context"):
        if getattr(options, name) < 1:
            made.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    if min(options.batch or [1]) < 1:
        made.error(f"--batch is {min(options.batch)}; expected at least 1")


def main(argv: list[str]) -> int:
    """Run all sizes and write what was asked for."""
    made = parser()
    options = made.parse_args(argv)
    command = command_line(options)
    prepare(made, options, "decode.py")
    check_counts(made, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device is cuda, and there is no CUDA device; use --device cpu")
    if options.quick:
        options.rounds, options.steps, options.context = 2, 1, 8
    names = options.size or ["tiny" if options.quick else "227m-1.2b"]
    free = psutil.virtual_memory().available
    for name in names:
        needed = 1.1 * bytes_of_weights(settings_of(name, options))
        if options.device == "cpu" and needed > free:
            made.error(
                f"--size {name} needs {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free: end "
                "other programs, or take a smaller size"
            )
    machine = describe_machine(options.device, options.quick)
    sizes = [run_size(name, options) for name in names]
    parts: list[Table | str] = [f"`{instructions()}{command}`"]
    for size in sizes:
        parts += tables_of(size, options.rounds, in_dtype(machine, size["dtype"], options.device, options.quick))
    plot = options.plot or (options.docs.parent / "decode.png" if options.docs else None)
    if plot:
        draw(sizes, plot)
    if options.docs and plot:
        parts.append(f"![Milliseconds and sparse bytes of a decode step]({os.path.relpath(plot, options.docs.parent)})")
    publish("decode.py", options, machine, parts, sizes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

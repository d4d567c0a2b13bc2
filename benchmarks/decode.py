"""Times decoding: UltraMemV2 against transformers' OLMoE of the same depth, width, activated and total parameters.

    python benchmarks/decode.py                               227M/1.2B in float32, batch 1, 8, 32: about 10 minutes
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

Bytes touched are counted in steps of their own, see decode_side.py. Peak memory is that of the side's process, from the
moment its weights and cache are ready.

The mmap rows: the same UltraMemV2, saved by ``save_pretrained`` and loaded with ``memory_tables="mmap"`` in a process
whose RLIMIT_DATA (all memory it may allocate: heap, anonymous and private writable mappings) is below the size of
the tables. RLIMIT_DATA does not bound the operating system's cache of files; therefore "cold" drops the export from
that cache before every step, which is what a machine with no memory to spare would see.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

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
        self.facts = self._answer()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin is not None
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
        self._kept: dict[str, SideProcess] = {}
        self._prepared: dict[str, tuple[int, int]] = {}

    def ready(self, name: str, batch: int, context: int) -> SideProcess:
        """The side's process, prepared for the batch; another one has ended if there is room for one only."""
        if not self.resident:
            for other in set(self._kept) - {name}:
                self._kept.pop(other).close()
                self._prepared.pop(other, None)
        if name not in self._kept:
            self._kept[name] = SideProcess(self.sides[name])
            self.facts.setdefault(name, {}).update(self._kept[name].facts)
        process = self._kept[name]
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
    """Time all sides in turns, then count what a step touches."""
    names = list(contestants.sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    measured: dict[str, dict[str, Any]] = {name: {} for name in names}
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            process = contestants.ready(name, batch, options.context)
            times[name].append(statistics.mean(process.ask("time", steps=options.steps)["ms"]))
            measured[name]["peak_bytes"] = max(measured[name].get("peak_bytes", 0), process.ask("peak")["bytes"])
            if number == options.rounds - 1:
                measured[name].update(process.ask("count", steps=3))
                measured[name]["experts_implementation"] = contestants.facts[name]["chosen"]
    for name in names:
        each = times[name]
        measured[name].update(ms=statistics.median(each), lowest_ms=min(each), highest_ms=max(each), rounds_ms=each)
    result = {"batch": batch, "context": options.context, "sides": measured}
    if len(names) == 2:
        ours, peer = measured[OURS], measured[PEER]
        result["times_faster"] = statistics.median(slow / fast for slow, fast in zip(times[PEER], times[OURS]))
        result["sparse_bytes_ratio"] = peer["sparse"] / ours["sparse"]
        result["bytes_ratio"] = (peer["sparse"] + peer["dense"]) / (ours["sparse"] + ours["dense"])
    return result


def run_size(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one size."""
    size = SIZES[name]
    common = {"preset": size["preset"], "dtype": options.dtype or size["dtype"], "device": options.device,
              "threads": options.threads}  # fmt: skip
    sides = {OURS: {"side": "umv2", **common}, PEER: {"side": "olmoe", **common}}
    free = psutil.virtual_memory().available
    resident = options.device == "cpu" and 2.3 * bytes_of_weights(common) < free
    contestants = Contestants(sides, resident)
    batches = []
    try:
        for batch in options.batch or size["batches"]:
            batches.append(run_batch(contestants, batch, options))
            print(text_of(name, batches[-1]), flush=True)
    finally:
        contestants.close()
    result = {"size": name, "dtype": common["dtype"], "facts": contestants.facts, "batches": batches,
              "resident": resident}  # fmt: skip
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
        limit = int((options.mmap_limit_gib or 0.6 * table_bytes / 2**30) * 2**30)
        side = SideProcess({"side": "umv2", **common, "load": str(folder), "limit_bytes": limit})
        found = []
        for each in batches:
            side.ask("prepare", batch=each["batch"], context=options.context)
            row: dict[str, Any] = {"batch": each["batch"]}
            for name, cold in (("warm", False), ("cold", True)):
                steps = [side.ask("time", steps=1, cold=cold)["ms"][0] for _ in range(options.rounds + 2)][2:]
                row[name] = {"ms": statistics.median(steps), "lowest_ms": min(steps), "highest_ms": max(steps)}
            row["peak_bytes"] = side.ask("peak")["bytes"]
            row["in_memory_ms"] = each["sides"][OURS]["ms"]
            found.append(row)
            print(f"  mmap, batch {row['batch']}: {row['warm']['ms']:.0f} ms, cold {row['cold']['ms']:.0f} ms, peak "
                  f"{row['peak_bytes'] / 2**30:.2f} GiB", flush=True)  # fmt: skip
        side.close()
        return {"table_bytes": table_bytes, "limit_bytes": limit, "batches": found}
    finally:
        shutil.rmtree(folder)


# -- output -------------------------------------------------------------------------------------------------------


def text_of(size: str, result: dict[str, Any]) -> str:
    """One batch size as text."""
    lines = [f"\n{size}, batch {result['batch']}, {result['context']} tokens in the cache"]
    lines.append(
        f"{'':<12}{'ms/step':>9} {'lowest-highest':>17} {'MB touched':>11} {'of these sparse':>16} {'peak GiB':>9}"
    )
    for name, row in result["sides"].items():
        spread = f"{row['lowest_ms']:.1f}-{row['highest_ms']:.1f}"
        lines.append(
            f"{name:<12}{row['ms']:>9.1f} {spread:>17} {(row['dense'] + row['sparse']) / 1e6:>11.0f} "
            f"{row['sparse'] / 1e6:>16.2f} {row['peak_bytes'] / 2**30:>9.2f}"
        )
    lines.append(f"{OURS} is {result['times_faster']:.2f} times faster and touches one "
                 f"{result['sparse_bytes_ratio']:.0f}th of the sparse bytes")  # fmt: skip
    return "\n".join(lines)


def markdown(document: dict[str, Any], plot: str | None) -> str:
    """Everything as tables for docs/inference.md."""
    machine = document["machine"]
    lines = [f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
             f"{machine['transformers']}; `{machine['command']}`"]  # fmt: skip
    for size in document["sizes"]:
        lines += ["", f"### {size['size'].upper()}, {size['dtype']}", ""]
        lines += [
            f"- {name}: {fact['activated'] / 1e6:.0f}M activated, {fact['total'] / 1e9:.2f}B parameters without "
            f"embeddings, {fact['sparse_bytes'] / 2**30:.2f} of {fact['bytes'] / 2**30:.2f} GiB sparse"
            for name, fact in size["facts"].items()
        ]
        lines += ["", f"Medians of {machine['rounds']} rounds (lowest to highest), "
                  + ("both models in memory, in turns" if size["resident"] else "one model in memory at a time")
                  + f"; {machine['context']} tokens in the cache.", ""]  # fmt: skip
        lines += [f"| batch | {OURS}, ms per step | {PEER}, ms per step | times faster | MB of weights touched, ours | "
                  f"{PEER} | sparse ones, ours | {PEER} | ratio | peak memory, ours | {PEER} |",
                  "|" + "---|" * 11]  # fmt: skip
        for result in size["batches"]:
            cells = []
            ours, peer = result["sides"][OURS], result["sides"][PEER]
            for row in (ours, peer):
                cells.append(f"{row['ms']:.1f} ({row['lowest_ms']:.1f}-{row['highest_ms']:.1f})")
            cells[1] += f" ({peer['experts_implementation']})"
            cells.append(f"**{result['times_faster']:.2f}**")
            cells += [f"{(row['dense'] + row['sparse']) / 1e6:.0f}" for row in (ours, peer)]
            cells += [f"{row['sparse'] / 1e6:.2f}" for row in (ours, peer)]
            cells.append(f"1 : {result['sparse_bytes_ratio']:.0f}")
            cells += [f"{row['peak_bytes'] / 2**30:.2f} GiB" for row in (ours, peer)]
            lines.append(f"| {result['batch']} | " + " | ".join(cells) + " |")
        if "mmap" in size:
            lines += ["", *mmap_markdown(size["mmap"])]
    if plot:
        lines += ["", f"![Milliseconds and bytes per decode step]({plot})"]
    return "\n".join(lines)


def mmap_markdown(mmap: dict[str, Any]) -> list[str]:
    """The table about tables in files."""
    lines = [f"`memory_tables=\"mmap\"`, tables of {mmap['table_bytes'] / 2**30:.2f} GiB, in a process that may "
             f"allocate {mmap['limit_bytes'] / 2**30:.2f} GiB (RLIMIT_DATA):", ""]  # fmt: skip
    lines += ["| batch | in memory, ms per step | mmap | mmap, file cache dropped before each step | peak resident |",
              "|---|---|---|---|---|"]  # fmt: skip
    for row in mmap["batches"]:
        cells = [f"{row[name]['ms']:.1f} ({row[name]['lowest_ms']:.1f}-{row[name]['highest_ms']:.1f})"
                 for name in ("warm", "cold")]  # fmt: skip
        lines.append(f"| {row['batch']} | {row['in_memory_ms']:.1f} | " + " | ".join(cells)
                     + f" | {row['peak_bytes'] / 2**30:.2f} GiB |")  # fmt: skip
    return lines


def draw(document: dict[str, Any], path: Path) -> None:
    """Bars of milliseconds and of bytes touched per step, one group per size and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(size["size"], result) for size in document["sizes"] for result in size["batches"]]
    labels = [f"{size.upper()}\nbatch {result['batch']}" for size, result in groups]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    panels = (
        ("milliseconds per decode step", lambda row: row["ms"]),
        ("MB of sparse weights touched per step", lambda row: row["sparse"] / 1e6),
    )
    for axis, (title, value) in zip(axes, panels):
        for offset, name in ((-0.2, OURS), (0.2, PEER)):
            heights = [value(result["sides"][name]) for _, result in groups]
            places = [place + offset for place in range(len(groups))]
            axis.bar_label(axis.bar(places, heights, 0.4, label=name), fmt="%.3g", fontsize=8)
        axis.set_title(title)
        axis.set_yscale("log")
        axis.set_xticks(range(len(groups)), labels)
        axis.margins(y=0.15)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def put_between_marks(text: str, path: Path) -> None:
    """Replace what stands between the two marks of this program in ``path``. Raises ``ValueError`` without them."""
    begin, end = ("<!-- benchmarks/decode.py: " + word + " -->" for word in ("begin", "end"))
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ValueError(f"--docs is {path}; expected a file with the lines {begin} and {end}, once each")
    head, rest = old.split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def describe_machine(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """What the figures belong to."""
    import torch
    import transformers

    processor = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor,
        "threads": options.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": options.rounds,
        "steps": options.steps,
        "context": options.context,
        "command": " ".join(["python benchmarks/decode.py", *argv]),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=sorted(SIZES), action="append", help="default: 227m-1.2b; may be repeated")
    made.add_argument("--batch", type=int, action="append", help="default: 1, 8, 32 (1b-7b: 1); may be repeated")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 (1b-7b: bfloat16)")
    made.add_argument("--context", type=int, default=128, help="tokens in the cache (default: 128)")
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--steps", type=int, default=5, help="steps of a side in one round (default: 5)")
    made.add_argument("--threads", type=int, help="default: torch's own choice")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--no-mmap", action="store_true", help="leave out the part with tables in files")
    made.add_argument("--mmap-limit-gib", type=float, help="RLIMIT_DATA of that part (default: 0.6 x the tables)")
    made.add_argument("--export-dir", help="where that part writes the model and removes it (default: /tmp)")
    made.add_argument("--json", type=Path, help="write everything there, too")
    made.add_argument("--docs", type=Path, help="put the tables between the marks of this Markdown file")
    made.add_argument("--plot", type=Path, help="PNG (default with --docs: decode.png beside that file)")
    return made


def main(argv: list[str]) -> int:
    """Run all sizes and write what was asked for."""
    made = parser()
    options = made.parse_args(argv)
    for name in ("rounds", "steps", "context"):
        if getattr(options, name) < 1:
            made.error(f"--{name} is {getattr(options, name)}; expected 1 or more")
    if min(options.batch or [1]) < 1:
        made.error(f"--batch is {min(options.batch)}; expected 1 or more")
    machine = describe_machine(options, argv)
    sizes = [run_size(name, options) for name in options.size or ["227m-1.2b"]]
    document = {"machine": machine, "sizes": sizes}
    plot = options.plot or (options.docs.parent / "decode.png" if options.docs else None)
    if plot:
        draw(document, plot)
    if options.docs:
        put_between_marks(markdown(document, os.path.relpath(plot, options.docs.parent)), options.docs)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""What the benchmarks share: the machine's description, clocks, turns, medians, tables, and the marks in a document.

How they measure: contenders take turns within a round, so that a machine that gets slower does so for all of them. A
time is the median over the rounds (lowest-highest); a ratio is the median of the rounds' ratios. The first round warms
up and is not counted. When other programs use the processors, times mean little: a line of warning says so, and
``--clock processor`` (with one thread) is then the better of two bad clocks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.history import BUSY, keep
from benchmarks.spread import Spread
from benchmarks.text_table import Table
from umv2_megatron.parallel.huge_pages import use_huge_pages

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler is to be silent about its starts


def processor_time() -> float:
    """Seconds that all threads of this process together ran.

    ``time.process_time`` alone goes on in steps of 4 ms: Linux adds what a thread on another processor has run at each
    tick of that processor (CONFIG_HZ=250), or when that thread's own clock is read. So those are read first.
    """
    for thread in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
        with contextlib.suppress(OSError):  # it has ended
            time.clock_gettime(~int(thread) << 3 | 6)  # as pthread_getcpuclockid makes it
    return time.process_time()


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": processor_time}
"""Seconds that passed, or seconds that all threads of this process together ran."""


# -- options --------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The flags of every benchmark."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each (default: {rounds})")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice, OMP_NUM_THREADS)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="processor: time that all threads ran")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: does it run?")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    parser.add_argument("--docs", type=Path, help="put the tables between the marks of this Markdown file")
    parser.add_argument("--history", type=Path, metavar="DIR", help="add the times to the history of this kind of "
                        "machine there, and say what became slower since the last run")


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace, program: str) -> None:
    """Refuse what cannot work before anything is measured, and set the number of threads; huge pages as in training."""
    use_huge_pages()
    at_least_one(parser, options, "rounds")
    if options.threads is not None:
        at_least_one(parser, options, "threads")
        torch.set_num_threads(options.threads)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json is {options.json}; expected a file in a directory that exists")
    if options.docs is not None:
        try:
            _split_at_marks(options.docs, program)
        except (OSError, ValueError) as problem:
            parser.error(str(problem))


def at_least_one(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Refuse options of these names that are below 1."""
    for name in names:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1")


# -- times ----------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any], clock: str = "wall", device: str = "cpu") -> float:
    """Seconds of ``work()`` by the clock of that name; what it returns is dropped after the clock has stopped."""
    read = CLOCKS[clock]
    if device == "cuda":
        torch.cuda.synchronize()
    start = read()
    kept = work()
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = read() - start
    del kept
    return elapsed


def take_turns(
    contenders: Mapping[str, Callable[[int], Any]],
    rounds: int,
    clock: str = "wall",
    after: Callable[[], None] | None = None,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, by name.

    A contender gets the number of the round, from 0; that round is not counted. ``after`` tidies up after each call.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            elapsed = timed(partial(work, number), clock, device)
            if after is not None:
                after()
            if number:
                times[name].append(elapsed)
    return times


def peak_bytes(work: Callable[[], Any], device: str = "cpu") -> int:
    """Most bytes that torch's allocator had handed out during ``work()``, beyond what it had before: exact, by its own
    records. What is allocated past torch (by a BLAS, say) is not in it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# -- the machine ----------------------------------------------------------------------------------------------------


def describe_machine(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Name, threads, caches, copy bandwidth (bytes read plus written per second), float32 GEMM rate (both the best of
    several), load average, and how many processors other programs use; ``quick`` measures on less, and worse."""
    busy = psutil.cpu_percent(interval=0.2 if quick else 1.0) / 100 * (os.cpu_count() or 1)
    load = os.getloadavg()[0]
    source = torch.randn((1 if quick else 64) << 20, device=device)
    target = torch.empty_like(source)
    copies = [timed(lambda: target.copy_(source), device=device) for _ in range(8)]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "cache_bytes": cache_bytes(),
        "torch": torch.__version__,
        "copy_bytes_per_s": 2 * source.numel() * 4 / min(copies[1:]),
        "gemm_flops_per_s": gemm_rate(torch.float32, device, quick),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "load_average": load,
        "busy_processors": round(busy, 2),
    }


def gemm_rate(dtype: torch.dtype, device: str = "cpu", quick: bool = False) -> float:
    """Operations per second of a square product in ``dtype``, the best of several."""
    side = 256 if quick else 2048
    left = torch.randn(side, side, device=device).to(dtype)
    products = [timed(lambda: left.matmul(left), device=device) for _ in range(5)]
    return 2 * side**3 / min(products[1:])


def machine_line(machine: Mapping[str, Any], clock: str = "wall") -> str:
    """One sentence for tables and documents."""
    notes = " THP_MEM_ALLOC_ENABLE=1 (huge pages)." if machine.get("huge_pages") else ""
    notes += " Processor time, not elapsed time." if clock == "processor" else ""
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; copy bandwidth "
        f"{machine['copy_bytes_per_s'] / 1e9:.1f} GB/s, float32 GEMM {machine['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s."
        f"{notes}{load_warning(machine)}"
    )


def load_warning(machine: Mapping[str, Any]) -> str:
    """A sentence when other programs ran at the start, else ""; starts with a blank."""
    busy = machine.get("busy_processors", 0.0)
    if busy <= BUSY:
        return ""
    return (
        f" WARNING: other programs used {busy:.1f} of the {machine['processors']} processors at the start (load "
        f"average {machine['load_average']:.1f}): these times are worth little."
    )


def cache_bytes() -> dict[str, int]:
    """Sizes of processor 0's data caches, {"L1": bytes, ...}, from /sys; empty where it does not say."""
    sizes: dict[str, int] = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[-1]]
    return sizes


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", information.read_text()) if information.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


# -- output ---------------------------------------------------------------------------------------------------------


def publish(
    program: str, options: argparse.Namespace, machine: Mapping[str, Any], parts: Sequence[Table | str], results: Any,
    times: Mapping[str, Spread] | None = None,
) -> None:
    """Print ``parts`` (tables and paragraphs), put them into --docs, everything into --json and ``times``, in seconds,
    into --history."""
    first = machine_line(machine, options.clock)
    print("\n\n".join([first, *(part.text() if isinstance(part, Table) else part for part in parts)]), flush=True)
    if options.docs:
        text = [part.markdown() if isinstance(part, Table) else part for part in parts]
        put_between_marks("\n\n".join([first, *text]), options.docs, program)
    if options.json:
        write_json(options.json, program, options, machine, {"results": results})
    add_to_history(program, options, machine, times or {})


def add_to_history(
    program: str, options: argparse.Namespace, machine: Mapping[str, Any], times: Mapping[str, Spread]
) -> None:
    """With --history: keep ``times``, in seconds, and print what became slower."""
    if options.history and times:
        print("\n" + "\n".join(keep(options.history, program, vars(options), machine, times)), flush=True)


def write_json(
    path: Path, program: str, options: argparse.Namespace, machine: Mapping[str, Any], content: Mapping[str, Any]
) -> None:
    """A document of ``content`` with what is needed to know where it comes from."""
    given = {key: value if isinstance(value, (int, float)) else str(value) for key, value in vars(options).items()}
    document = {"program": f"benchmarks/{program}", "machine": dict(machine), "options": given, **content}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def put_between_marks(text: str, path: Path, program: str) -> None:
    """Replace what stands between the two marks of ``program`` ("layer.py") in ``path``.

    Raises ``ValueError`` where the marks are not there once each.
    """
    before, begin, end, after = _split_at_marks(path, program)
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    os.replace(temporary, path)


def _split_at_marks(path: Path, program: str) -> tuple[str, str, str, str]:
    """What is before the marks, the marks, and what is after them."""
    begin, end = (f"<!-- benchmarks/{program}: {word} -->" for word in ("begin", "end"))
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(end) < old.index(begin):
        raise ValueError(f"--docs is {path}; expected a file with the lines {begin} and {end}, once each")
    before, rest = old.split(begin)
    return before, begin, end, rest.split(end)[1]

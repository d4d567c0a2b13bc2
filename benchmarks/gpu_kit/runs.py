"""Figures of whole programs: tests, benchmarks/layer.py and runs of pretrain_umv2.py, whose output is read.

Output goes on to this process's own while it comes, so that the log of a step that is cut shows how far it got.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_kit.report import ROOT, Record, peak_tflops
from benchmarks.text_table import Table

SLICES = (  # of the tests of the kernels, of about equal length: nearly all of their time is spent in compiling
    "lookup_equals and (umv2-227m or few)",
    "lookup_equals and (umv2-1b or v1)",
    "lookup_equals and (odd or wide)",
    "not lookup_equals",
)
OTHERS = (("test_on_a_gpu", "test_waits_on_a_gpu"), ("test_streams_on_a_gpu",), ("test_hf_tables_on_a_gpu",))
"""Further files of tests/gpu, in three processes."""
PRESET = "umv2-227m-1.2b"
STEPS = {False: 14, True: 3}
"""Iterations of a run whose speed is measured, by ``dry``; the first third is not counted."""
FP8_STEPS = 50
LINE = re.compile(
    r"iteration +(?P<iteration>\d+)/.*elapsed time per iteration \(ms\): (?P<ms>[\d.]+).*?"
    r"throughput per GPU \(TFLOP/s/GPU\): (?P<tflops>[\d.]+).*?lm loss: (?P<loss>\S+).*?"
    r"tokens/s/rank: (?P<tokens>[\d.]+)"
)
WEIGHTS = re.compile(r"weights of rank 0: sha256 ([0-9a-f]{64})")


def run_program(command: Sequence[str], told: Callable[[str], None] = lambda line: None) -> str:
    """The output of a Python program, each line also given to ``told``; ``RuntimeError`` unless it ends with 0."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
        told(line)
    if process.wait() != 0:
        end = [line.strip() for line in lines if line.strip()][-1:]
        raise RuntimeError(f"{command[0]} ended with code {process.returncode}: {''.join(end)}")
    return "".join(lines)


# -- tests ----------------------------------------------------------------------------------------------------------


def kernels(record: Record, dry: bool) -> None:
    """tests/gpu/test_triton_on_a_gpu.py in several processes; on a CPU a few tests of the kernels' interpreter."""
    if dry:
        run_tests(record, [["tests/unit/ops/triton_interpreted.py", "-k", "dtype or two_stage"]])
    else:
        run_tests(record, [["tests/gpu/test_triton_on_a_gpu.py", "-k", part] for part in SLICES])


def other_tests(record: Record, dry: bool) -> None:
    """The other tests of tests/gpu, but for those that steps of their own repeat; on a CPU all are skipped."""
    if dry:
        run_tests(record, [["tests/gpu"]], all_skipped=True)
    else:
        run_tests(record, [[f"tests/gpu/{name}.py" for name in names] for names in OTHERS])


def run_tests(record: Record, groups: Sequence[Sequence[str]], all_skipped: bool = False) -> None:
    """pytest once for each list of arguments, at the same time; ``RuntimeError`` when a test fails or none passes.

    ``all_skipped``: it is no failure that none passes, because there is no device.
    A KeyboardInterrupt ends the tests; those that have run are counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{number}.xml" for number in range(len(groups))]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(report), *arguments],
                cwd=ROOT,
            )
            for report, arguments in zip(reports, groups)
        ]
        try:
            codes = [process.wait() for process in processes]
        except KeyboardInterrupt:  # over the limit; pytest got the signal, too, and reports what it has
            codes = [process.wait() for process in processes]
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        bad: list[tuple[str, str]] = []
        for report in reports:
            if report.exists():
                for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                    for name in counts:
                        counts[name] += int(suite.get(name, 0))
                    bad += [(name, why) for case in suite.iter("testcase") for name, why in _failure(case)]
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    key = f"{passed} passed, {failed} failed, {counts['skipped']} skipped"
    tables = [Table("Tests that failed.", ("test", "why"), bad)] if bad else []
    record.keep(key, {**counts, "passed": passed, "bad": bad}, tables)
    if any(codes) or not (passed or all_skipped):
        raise RuntimeError(f"{key}; pytest ended with {', '.join(map(str, codes))}")


def _failure(case: ElementTree.Element) -> list[tuple[str, str]]:
    """Name and first line of the message of a test that failed."""
    found = [child for child in case if child.tag in ("failure", "error")]
    message = (found[0].get("message") or "no message") if found else ""
    first = (message.splitlines() or ["no message"])[0][:150].replace("|", "/")
    return [(f"{case.get('classname')}::{case.get('name')}".replace("|", "/"), first)] if found else []


# -- the layer ------------------------------------------------------------------------------------------------------


def layer(record: Record, dry: bool) -> None:
    """benchmarks/layer.py: a memory layer against the FFN and against Megatron-Core's experts, in bfloat16."""
    backend = "scatter" if dry else "triton"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.json"
        sizes = ["--quick"] if dry else ["--tokens", "8192", "--rounds", "10"]
        run_program(["benchmarks/layer.py", "--dtype", "bfloat16", "--memory-backend", backend, "--json", str(path),
                     *sizes])  # fmt: skip
        found = json.loads(path.read_text())["results"]
    rows = [
        (name, *(f"{row['ms'][kind]['median']:.2f}" for kind in ("forward", "forward + backward")))
        for name, row in found["contenders"].items()
    ]
    both = "forward + backward"
    ratio = found["memory_time_per_ffn_time"][both]["median"]
    experts = found["experts_time_per_pair_time"][both]["median"]
    key = f"memory / FFN {ratio:.2f}, {found['faster_experts']} / (FFN + memory) {experts:.2f}"
    title = f"One block of {PRESET}, 8,192 tokens, bfloat16, --memory-backend {backend}; experts one after another."
    record.keep(key, found, [Table(title, ("", "forward, ms", "forward + backward, ms"), rows)])


# -- training -------------------------------------------------------------------------------------------------------


def flags_of(dry: bool, steps: int, **changes: Any) -> list[str]:
    """A command line of pretrain_umv2.py on mock data; True is a switch."""
    settings: dict[str, Any] = {
        "model_preset": PRESET, "bf16": True, "mock_data": True, "tokenizer_type": "NullTokenizer",
        "micro_batch_size": 4, "global_batch_size": 8, "train_iters": steps, "lr": 1e-4, "eval_iters": 0,
        "num_workers": 2, "log_interval": 1, "log_throughput": True, "transformer_impl": "local",
    }  # fmt: skip
    if dry:
        settings |= {"model_preset": "umv2-tiny", "num_layers": 2, "seq_length": 32, "max_position_embeddings": 32,
                     "micro_batch_size": 1, "global_batch_size": 2, "num_workers": 0}  # fmt: skip
    settings |= changes
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]


def lines_of(output: str) -> list[dict[str, float]]:
    """The numbers of every iteration that a run printed."""
    return [{name: float(text) for name, text in found.groupdict().items()} for found in LINE.finditer(output)]


def speed(lines: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over all iterations but the first third: ms, tokens per second and TFLOP/s."""
    counted = lines[len(lines) // 3 :]
    return {name: statistics.median(line[name] for line in counted) for name in ("ms", "tokens", "tflops")}


def share_of_peak(tflops: float, device: str | None) -> str:
    """MFU in per cent, or "?" for a device whose peak is not known."""
    peak = peak_tflops(device or "")
    return f"{tflops / peak:.1%}" if peak else "?"


def train(record: Record, dry: bool, engine: bool, backend: str, stream: bool, device: str | None) -> None:
    """Tokens and TFLOP per second of a whole model, and their share of the stated peak of ``device``."""
    impl = "transformer_engine" if engine else "local"
    extra = {"memory_stream": True} if stream else {}
    output: list[str] = []

    def told(line: str) -> None:
        output.append(line)
        found = lines_of("".join(output))
        if found and "iteration" in line:
            fast = speed(found)
            mfu = share_of_peak(fast["tflops"], device)
            figures = {**fast, "mfu": mfu, "losses": [each["loss"] for each in found]}
            row = (f"{impl}, {backend}{', stream' if stream else ''}", f"{fast['ms']:.1f}", f"{fast['tokens']:,.0f}",
                   f"{fast['tflops']:.1f}", mfu, str(len(found)))  # fmt: skip
            columns = ("run", "ms per step", "tokens/s", "TFLOP/s", "MFU", "steps")
            key = f"{fast['tokens']:,.0f} tokens/s, {fast['tflops']:.1f} TFLOP/s, MFU {mfu}"
            record.keep(key, figures, [Table(f"Training {PRESET} in bfloat16.", columns, [row])])

    flags = flags_of(dry, STEPS[dry], transformer_impl=impl, memory_backend=backend, **extra)
    run_program(["pretrain_umv2.py", *flags], told)
    if len(lines_of("".join(output))) != STEPS[dry]:
        raise RuntimeError(f"pretrain_umv2.py printed no speed for each of its {STEPS[dry]} iterations")


def fp8(record: Record, dry: bool) -> None:
    """Steps with the FFNs in FP8 beside the same in bfloat16: time and loss."""
    outputs = {}
    for name, extra in (("bfloat16", {}), ("FP8", {"fp8_format": "hybrid"})):
        changes = {"transformer_impl": "transformer_engine", "memory_backend": "triton", **extra}
        outputs[name] = run_program(["pretrain_umv2.py", *flags_of(dry, FP8_STEPS, **changes)])
    compare_fp8(record, *(lines_of(output) for output in outputs.values()))


def compare_fp8(record: Record, plain: Sequence[dict[str, float]], low: Sequence[dict[str, float]]) -> None:
    """Keep the figures of both runs; ``RuntimeError`` where a loss is missing or not finite.

    Args:
        plain, low: the numbers of every iteration, in bfloat16 and in FP8 (``lines_of``).
    """
    ratio = speed(low)["ms"] / speed(plain)["ms"]
    losses = [[line["loss"] for line in lines] for lines in (plain, low)]
    apart = [abs(each - wanted) / wanted for wanted, each in zip(*losses)]
    rows = [
        (f"{line['iteration']:.0f}", f"{line['loss']:.4f}", f"{other['loss']:.4f}")
        for number, (line, other) in enumerate(zip(plain, low), 1)
        if number % 10 == 0 or number == 1
    ]
    title = f"FFNs in FP8 against bfloat16, Transformer Engine: step time {ratio:.2f} of bfloat16's; losses."
    figures = {"time_ratio": ratio, "losses_bfloat16": losses[0], "losses_fp8": losses[1], "largest_gap": max(apart)}
    key = f"time {ratio:.2f} of bf16's, losses at most {max(apart):.2%} apart"
    record.keep(key, figures, [Table(title, ("step", "bfloat16", "FP8"), rows)])
    if len(plain) != len(low) or not all(map(math.isfinite, [*losses[0], *losses[1]])):
        raise RuntimeError("a loss is missing or not finite")


def checkpoint(record: Record, dry: bool) -> None:
    """A run of four steps against one that goes on from its checkpoint of step 2: the same weights, bit by bit."""
    folder = Path(tempfile.mkdtemp())
    model = {} if dry else {"model_preset": "umv2-8m", "memory_backend": "triton"}
    changes = {**model, "deterministic_mode": True, "use_distributed_optimizer": True}
    try:
        first = run_program(["pretrain_umv2.py", *flags_of(dry, 4, **changes, save=str(folder), save_interval=2)])
        again = run_program(["pretrain_umv2.py", *flags_of(dry, 4, **changes, load=str(folder), ckpt_step=2)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    hashes = [found.group(1) for output in (first, again) for found in WEIGHTS.finditer(output)]
    steps = [line["iteration"] for line in lines_of(again)]
    equal = len(hashes) == 2 and hashes[0] == hashes[1] and steps == [3, 4]
    record.keep("resumed run has the same weights" if equal else "weights differ", {"hashes": hashes, "steps": steps})
    if not equal:
        raise RuntimeError(f"weights {hashes}, resumed steps {steps}; expected two equal hashes and steps 3, 4")

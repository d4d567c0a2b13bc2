"""Every benchmark at tiny sizes: it measures, prints its table, and writes JSON and the marked part of a document."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))
from harness import _fork_server  # noqa: E402

from benchmarks import measure, variants  # noqa: E402
from benchmarks.spread import Spread, ratio  # noqa: E402

IN_MAKE_BENCH = ("lookup", "layer", "step", "growth", "preprocess")
LIMIT = 240
"""Seconds for one program."""


@dataclass
class Run:
    """What a run of a benchmark left."""

    code: int
    output: str
    folder: Path

    @property
    def page(self) -> str:
        return (self.folder / "page.md").read_text()

    @property
    def results(self) -> Any:
        return json.loads((self.folder / "out.json").read_text())["results"]


def program(name: str, argv: list[str], output: str) -> None:
    """What the process does: the program's ``main``."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    module = importlib.import_module(f"benchmarks.{name}")
    code = module.main(argv)
    sys.stdout.flush()
    sys.exit(code)


def run(name: str, folder: Path, *argv: str) -> Run:
    """Run a benchmark in a process of its own, with a document that has its marks."""
    page = folder / "page.md"
    begin, end = (f"<!-- benchmarks/{name}.py: {word} -->\n" for word in ("begin", "end"))
    page.write_text(f"# Page\n{begin}stale text\n{end}after\n")
    argv = ("--quick", "--json", str(folder / "out.json"), "--docs", str(page), *argv)
    if name in IN_MAKE_BENCH:
        argv = (*argv, "--history", str(folder / "history"))
    process = _fork_server().Process(target=program, args=(name, list(argv), str(folder / "output")))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    done = Run(process.exitcode, (folder / "output").read_text(), folder)
    assert done.code == 0, done.output[-6000:]
    assert done.page.startswith(f"# Page\n{begin}") and done.page.endswith(f"{end}after\n")
    assert "stale text" not in done.page
    document = json.loads((folder / "out.json").read_text())
    assert document["program"] == f"benchmarks/{name}.py" and document["options"]["quick"] is True
    if name in IN_MAKE_BENCH:
        (history,) = (folder / "history").iterdir()
        kept = json.loads(history.read_text())
        assert kept["program"] == f"{name}.py" and kept["times"]
        for part, (median, lowest, highest) in kept["times"].items():
            assert 0 < lowest <= median <= highest < LIMIT, part
    assert {"device", "threads", "torch", "copy_bytes_per_s", "load_average", "cache_bytes"} <= set(document["machine"])
    return done


def positive(spread: dict[str, float]) -> bool:
    return 0 < spread["lowest"] <= spread["median"] <= spread["highest"]


def test_layer(tmp_path: Path) -> None:
    done = run("layer", tmp_path)
    result = done.results
    names = ["dense FFN", "memory layer", "FFN + memory", "experts, alltoall", "experts, allgather"]
    assert list(result["contenders"]) == names
    for name, row in result["contenders"].items():
        assert all(positive(spread) for spread in row["ms"].values()) and row["peak_bytes"] > 0, name
        assert f"| {name} |" in done.page and name in done.output
    parameters = {name: row["parameters"] for name, row in result["contenders"].items()}
    assert parameters["FFN + memory"] == parameters["dense FFN"] + parameters["memory layer"]
    share = result["memory_flops_per_ffn_flops"]
    assert share == pytest.approx(
        result["contenders"]["memory layer"]["flops_per_token"] / result["contenders"]["dense FFN"]["flops_per_token"]
    )
    for kind, quotient in result["quotient"].items():
        assert quotient["median"] == pytest.approx(result["memory_time_per_ffn_time"][kind]["median"] / share)
    assert "quotient (target: at most 1.2)" in done.output


@pytest.mark.slow
def test_step(tmp_path: Path) -> None:
    done = run("step", tmp_path)
    models = done.results["models"]
    assert list(models) == ["umv2", "moe", "dense"] and done.results["tokens_per_step"] == 2 * 2 * 32
    for name, row in models.items():
        assert positive(row["tokens_per_s"]) and positive(row["update_s"]) and row["loss"] > 0, name
        assert row["update_s"]["median"] < row["step_s"]["median"] and row["peak_bytes"] > 0
        assert row["block_flops_per_umv2"] == pytest.approx(1, abs=0.02)
        assert f"| {name} |" in done.page
    assert models["moe"]["block_parameters_per_umv2"] == pytest.approx(1, abs=0.06)
    seconds = {name: row["step_s"]["median"] for name, row in models.items()}
    assert done.results["umv2_speed_per"]["moe"]["median"] == pytest.approx(seconds["moe"] / seconds["umv2"])
    assert "umv2 / moe (target: at least 1.5)" in done.output


def test_growth(tmp_path: Path) -> None:
    done = run("growth", tmp_path)
    result = done.results
    assert [row["K"] for row in result["K"]] == [2, 8] and [row["T"] for row in result["T"]] == [4, 16]
    assert [row["rows"] for row in result["rows"]] == [1000] and [row["N"] for row in result["N"]] == [31]
    touched = result["rows"][0]["touched"]
    assert 0 < touched["distinct_rows"] <= 32 and touched["bytes"] == 2 * touched["distinct_rows"] * 16
    assert touched["table_bytes"] == 2 * 1000 * 16
    for kind in ("forward", "forward + backward"):
        assert positive(result["rows"][0][kind]["lookup"]) and positive(result["rows"][0][kind]["copy"])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "| 1,000 |" in done.page and "Growth with K" in done.output


def test_growth_beyond_the_copy() -> None:
    from benchmarks.growth import growth, row_steps

    def row(rows: int, lookup: float, copy: float) -> dict[str, Any]:
        return {"rows": rows, "forward": {"lookup": {"median": lookup}, "copy": {"median": copy}}}

    found = growth([row(10**4, 1e-6, 2e-6), row(10**5, 2e-6, 3e-6), row(10**7, 6e-6, 6e-6)], "forward", 10**5)
    assert (found["from"], found["to"], found["lookup"], found["copy"]) == (10**5, 10**7, 3, 2)
    assert found["beyond"] == 1.5 and found["lookup_extra_us"] == pytest.approx(4)
    assert row_steps(10**7)[::2] == [10**4, 10**5, 10**6, 10**7]


def test_preprocess(tmp_path: Path) -> None:
    done = run("preprocess", tmp_path)
    several = "2 ranks" if (Path(sys.executable).parent / "mpirun").exists() else "2 workers"
    kinds = ("SentencePieceTokenizer", "ByteLevelTokenizer")
    assert [(row["tokenizer"], row["by"]) for row in done.results] == [
        (kind, by) for kind in kinds for by in ("1 worker", several)
    ]
    for row in done.results:
        assert positive(row["wall_s"]) and row["own_s"]["median"] <= row["wall_s"]["median"]
        assert positive(row["processor_s"])
        assert row["tokens"] > 0 and f"| {row['tokenizer']} | {row['by']} |" in done.page
    level = next(row for row in done.results if row["tokenizer"] == "ByteLevelTokenizer")
    assert level["tokens"] > level["text_bytes"]  # a token for each byte and one for each document


@pytest.mark.parametrize("preset", ["umv2-8m", "umv2-227m-1.2b", "umv2-1b-7b"])
def test_variants_are_of_equal_size(preset: str) -> None:
    fields, memory = variants.preset_fields(preset)
    ours = variants.Size.of(fields, memory)
    experts = variants.Size.of(variants.expert_fields(fields, memory), None)
    dense = variants.Size.of(variants.dense_fields(fields, memory), None)
    assert dense.flops.blocks == pytest.approx(ours.flops.blocks, rel=0.005) and dense.parameters < ours.parameters
    assert experts.flops.blocks == pytest.approx(ours.flops.blocks, rel=0.02)
    assert experts.parameters == pytest.approx(ours.parameters, rel=0.02)


def test_turns_are_interleaved_and_the_first_round_is_left_out() -> None:
    calls: list[tuple[str, int]] = []
    contenders = {name: lambda number, name=name: calls.append((name, number)) for name in ("a", "b")}
    times = measure.take_turns(contenders, 2, after=lambda: calls.append(("clear", 0)))
    assert [name for name, _ in calls] == ["a", "clear", "b", "clear"] * 3
    assert [number for name, number in calls if name == "a"] == [0, 1, 2]
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Spread(2.0, 1.0, 3.0)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one thread at a time")
def test_processor_time_counts_other_threads_at_once() -> None:
    """Not up to a tick of 4 ms later, as time.process_time does."""
    done = threading.Event()
    data = bytes(1 << 20)

    def work() -> None:
        while not done.is_set():
            hashlib.sha256(data).digest()  # without the interpreter's lock

    worker = threading.Thread(target=work)
    worker.start()
    late = []
    try:
        for _ in range(51):
            wait_until = time.perf_counter() + 1e-3
            while time.perf_counter() < wait_until:
                pass
            told = measure.processor_time()
            each = [time.clock_gettime(~int(thread) << 3 | 6) for thread in os.listdir("/proc/self/task")]
            late.append(sum(each) - told)
    finally:
        done.set()
        worker.join()
    # the median, because other programs may interrupt between the two readings
    assert statistics.median(late) < 5e-4


def test_peak_of_allocations() -> None:
    import torch

    def work() -> None:
        first = torch.empty(1 << 20)
        second = torch.empty(1 << 20)
        del first
        third = torch.empty(1 << 18)
        del second, third

    assert 8 << 20 <= measure.peak_bytes(work) < (8 << 20) + 4096


@pytest.mark.parametrize("busy", [0.0, 1.5])
def test_warning_of_other_programs(busy: float) -> None:
    machine = {"device": "d", "threads": 2, "torch": "t", "copy_bytes_per_s": 1e9, "gemm_flops_per_s": 1e9,
               "processors": 2, "load_average": 3.0, "busy_processors": busy}  # fmt: skip
    assert ("WARNING: other programs used 1.5 of the 2 processors" in measure.machine_line(machine)) == (busy > 1)


@pytest.mark.parametrize(
    "flags",
    [["--rounds", "0"], ["--threads", "0"], ["--clock", "processor"], ["--json", "/nowhere/x"], ["--docs", "page"]],
)
def test_wrong_flags_are_refused_before_anything_runs(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import preprocess

    monkeypatch.chdir(tmp_path)
    Path("page").write_text("no marks")
    with pytest.raises(SystemExit) as stop:
        preprocess.main(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_decode(tmp_path: Path) -> None:
    done = run("compiled_decode", tmp_path)
    (found,) = done.results
    assert found["batch"] == 1 and found["difference"] < 1e-5
    assert len(found["as it is"]) == len(found["compiled"]) == 2 and min(found["as it is"] + found["compiled"]) > 0
    assert "as it is / compiled" in done.page


def test_documents(tmp_path: Path) -> None:
    done = run("documents", tmp_path)
    assert done.results.keys() == {"16"}
    ways = done.results["16"]
    assert all(len(times) == 1 and times[0] > 0 for times in ways["seconds"].values())
    assert list(ways["peak_bytes"]) == ["across documents", "packed", "masks [s, s]"]
    assert all(peak > 0 for peak in ways["peak_bytes"].values())
    assert "| 16 | packed |" in done.page

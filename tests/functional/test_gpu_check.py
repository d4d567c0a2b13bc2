"""tools/gpu_check.sh: its rehearsal on a CPU, steps that fail and steps that hang, its page, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tarfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import STEPS, Check, Step
from benchmarks.gpu_kit import report, runs
from benchmarks.gpu_kit.report import CUT, DONE, FAILED, NOT_RUN, SKIPPED, Machine, Outcome, Record
from umv2_megatron.config import option_table
from umv2_megatron.training.reporting import iteration_line

pytestmark = pytest.mark.timeout(930)  # the first test that uses the rehearsal makes it
ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine("NVIDIA H200", "580.1", {"torch": "2.11.0", "transformer-engine": "-"}, "2026-11-30", "abc123")
NEEDS_CUDA = {step.name: step.engine for step in STEPS if not step.dry}


def call(*flags: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess:
    """The program as a user starts it."""
    command = [str(ROOT / "tools" / "gpu_check.sh"), *flags]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout
    )


# -- the rehearsal --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a run with --dry."""
    pytest.importorskip("triton", reason="triton is not installed")
    folder = tmp_path_factory.mktemp("check")
    flags = ["--out", str(folder), "--docs", str(folder / "page.md"), "--json", str(folder / "copy.json")]
    done = call("--dry", "--seconds", "900", *flags, timeout=920)
    logs = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{logs[-6000:]}"
    return folder, done.stdout


@pytest.fixture(scope="module")
def steps(rehearsal: tuple[Path, str]) -> dict[str, dict[str, Any]]:
    """What results.json says of every step."""
    document = json.loads((rehearsal[0] / "results.json").read_text())
    assert document["dry"] is True and document["machine"]["versions"]["torch"] != "-"
    assert (rehearsal[0] / "copy.json").read_text() == (rehearsal[0] / "results.json").read_text()
    return {step["name"]: step for step in document["steps"]}


@pytest.mark.slow
def test_every_step_runs_or_says_what_it_needs(steps: dict[str, dict[str, Any]]) -> None:
    assert list(steps) == [step.name for step in STEPS]
    for name, step in steps.items():
        if name in NEEDS_CUDA:
            engine = " and Transformer Engine" if NEEDS_CUDA[name] else ""
            assert (step["result"], step["reason"]) == (SKIPPED, f"needs CUDA{engine}"), name
        else:
            assert step["result"] == DONE and step["key"] and step["figures"], (name, step)


@pytest.mark.slow
def test_figures_of_the_rehearsal(steps: dict[str, dict[str, Any]]) -> None:
    figures = {name: step["figures"] for name, step in steps.items()}
    assert figures["roofline"]["copy_gb_per_s"] > 0 and figures["roofline"]["gemm_bfloat16_128_tflops"] > 0
    assert figures["kernels"]["passed"] >= 5 and figures["kernels"]["failures"] == figures["kernels"]["skipped"] == 0
    lookups = {f"{size}, {kind}" for size in ("umv2-227m", "umv2-1b")
               for kind in ("triton, ordered", "triton, atomic", "scatter")}  # fmt: skip
    assert set(figures["lookup"]) == {"copy_gb_per_s", *lookups}
    assert all(figures["lookup"][name]["backward_ms"] > 0 for name in lookups)
    assert all(found["ms"] > 0 for found in figures["topk"].values()) and len(figures["topk"]) == 4
    assert len(figures["train-local-scatter"]["losses"]) == runs.STEPS[True]
    assert figures["layer"]["memory_time_per_ffn_time"]["forward"]["median"] > 0
    assert [kind for kind, _ in figures["waits"]["waits"]] == ["read"] and figures["waits"]["memory_layers"] == 2
    assert figures["checkpoint"]["steps"] == [3, 4] and len(set(figures["checkpoint"]["hashes"])) == 1
    assert figures["other-tests"]["skipped"] >= 38 and figures["other-tests"]["passed"] == 0


@pytest.mark.slow
def test_table_and_page_of_the_rehearsal(rehearsal: tuple[Path, str]) -> None:
    folder, output = rehearsal
    page = (folder / "page.md").read_text()
    assert "Rehearsal on a CPU" in page and "No step failed." in page
    table = output.split("\n\n")[-1]
    for step in STEPS:
        assert f"| {step.name} | " in page and f"\n{step.name} " in table
        assert (f"## {step.name}\n" in page) == (step.name not in {*NEEDS_CUDA, "kernels", "checkpoint", "other-tests"})
    assert str(ROOT) not in page and str(folder) not in page


@pytest.mark.slow
def test_a_rehearsal_leaves_the_results_alone(rehearsal: tuple[Path, str]) -> None:
    assert gpu_check.read_options(["--dry"]).docs is None
    assert gpu_check.read_options([]).docs == ROOT / "docs" / "gpu-results.md"


# -- steps that fail ------------------------------------------------------------------------------------------------


def planted(name: str, code: str, limit: float = 60.0, **fields: Any) -> Step:
    return Step(name, limit, command=("-c", code), **fields)


def keeping(path: Path, key: str) -> str:
    """Code that leaves figures as a step does."""
    return (
        "from pathlib import Path; from benchmarks.gpu_kit.report import Record, Table\n"
        f"Record(Path({str(path)!r})).keep({key!r}, {{'x': 1}}, [Table('Of a step.', ('a', 'b'), [('c', 'd')])])\n"
    )


def running(pid: int) -> bool:
    """Whether the process is there and has not ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.slow
def test_a_failed_and_a_hanging_step_stop_no_other(tmp_path: Path) -> None:
    figures, child = tmp_path / "steps" / "hangs.json", tmp_path / "child"
    hang = keeping(figures, "half") + (
        "import subprocess, sys, time\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], stdin=subprocess.DEVNULL)\n"
        f"Path({str(child)!r}).write_text(str(inner.pid))\n"
        "time.sleep(300)\n"
    )
    check = Check(tmp_path, seconds=100, dry=False)
    begin = time.monotonic()
    for step in (
        planted("fails", f"print({str(ROOT)!r} + '/tests/x.py'); raise SystemExit(3)"),
        planted("hangs", hang, limit=8),
        planted("breaks", f"open({str(tmp_path / 'steps' / 'breaks.json')!r}, 'w').write('[')"),
        planted("works", keeping(tmp_path / "steps" / "works.json", "whole")),
    ):
        check.run(step)
    assert time.monotonic() - begin < 60
    assert [(each.name, each.result) for each in check.outcomes] == [
        ("fails", FAILED), ("hangs", CUT), ("breaks", FAILED), ("works", DONE)
    ]  # fmt: skip
    failed, hangs, broken, works = check.outcomes
    assert failed.reason == "exit code 3" and failed.log == ["tests/x.py"]
    assert hangs.reason == "after 8 s" and hangs.key == "half", "a step that is cut keeps its figures"
    assert "cannot be read" in broken.reason and works.figures == {"x": 1}
    deadline = time.monotonic() + 20
    while running(int(child.read_text())):
        assert time.monotonic() < deadline, "what the step started still runs"
        time.sleep(0.02)

    check.write(MACHINE, tmp_path / "page.md", None)
    page = (tmp_path / "page.md").read_text()
    assert "### fails: failed: exit code 3\n\n```\ntests/x.py\n```" in page and "### hangs: cut: after 8 s" in page
    assert "NVIDIA H200, driver 580.1" in page and "torch 2.11.0, transformer-engine -" in page
    assert "2026-11-30, commit abc123" in page and "Rehearsal" not in page and "No step failed" not in page
    assert "## works\n\nOf a step.\n\n| a | b |\n| --- | --- |\n| c | d |" in page
    assert "== fails\n" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_steps_beyond_the_time_are_not_run(tmp_path: Path) -> None:
    check = Check(tmp_path, seconds=4, dry=False)
    first, second = (check.run(planted(name, "import time; time.sleep(60)")) for name in ("first", "second"))
    assert first.result == CUT and first.seconds < 20, "the limit is what is left"
    assert (second.result, second.reason) == (NOT_RUN, "the time of --seconds was over")


def test_who_ends_the_program_ends_its_step(tmp_path: Path) -> None:
    command = [str(ROOT / "tools" / "gpu_check.sh"), "--dry", "--steps", "other-tests", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "steps" / "other-tests.log").exists() or not psutil.Process(process.pid).children():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(60) == 143
    deadline = time.monotonic() + 60
    while any(running(each.pid) for each in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_exit_code_tells_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, expected in ((0, 0), (1, 1)):
        monkeypatch.setattr(gpu_check, "STEPS", (planted("planted", f"raise SystemExit({code})"),))
        assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == expected


def test_figures_of_an_earlier_call_do_not_stay(tmp_path: Path) -> None:
    check = Check(tmp_path, seconds=60, dry=False)
    Record(tmp_path / "steps" / "stale.json").keep("old")
    assert check.run(planted("stale", "pass")).key == ""


def test_tests_that_fail_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    record = Record(None)
    with pytest.raises(RuntimeError, match="1 passed, 1 failed, 0 skipped"):
        runs.run_tests(record, [[str(tmp_path / "test_x.py")]])
    ((name, why),) = record.figures["bad"]
    assert name.endswith("::test_bad") and "1 == 2" in why
    (tmp_path / "test_x.py").write_text("import pytest\n@pytest.mark.skip\ndef test_skipped(): pass\n")
    with pytest.raises(RuntimeError, match="0 passed, 0 failed, 1 skipped"):
        runs.run_tests(record, [[str(tmp_path / "test_x.py")]])
    runs.run_tests(record, [[str(tmp_path / "test_x.py")]], all_skipped=True)


def test_every_file_of_tests_has_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp8 and checkpoint are repeated by the steps of these names."""
    named: list[str] = []
    monkeypatch.setattr(runs, "run_tests", lambda _, groups: named.extend(word for group in groups for word in group))
    runs.kernels(Record(None), False)
    runs.other_tests(Record(None), False)
    files = {word for word in named if word.endswith(".py")}
    steps = {f"tests/gpu/test_{name}_on_a_gpu.py" for name in ("fp8", "checkpoint")}
    source = (ROOT / "tests" / "gpu" / "test_triton_on_a_gpu.py").read_text()
    sizes = re.findall(r'^    "(.*?)":', source.split("SIZES = {")[1].split("\n}")[0], re.M)
    for size in sizes:
        assert sum(bool(re.search(rf"[( ]{size.split()[0]}[) ]", part)) for part in runs.SLICES) == 1, size
    assert files | steps == {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}


# -- a machine with a GPU -------------------------------------------------------------------------------------------


@pytest.fixture
def with_gpu(tmp_path: Path) -> str:
    """A PATH on which nvidia-smi names a device."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.126.09'\n")
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="the step would run")
def test_device_and_driver_are_named(with_gpu: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = call("--steps", "fp8", "--out", str(tmp_path / "out"), "--docs", str(page), PATH=with_gpu)
    assert done.returncode == 0, done.stderr
    assert "NVIDIA H200, driver 580.126.09" in page.read_text() and "NVIDIA H200" in done.stdout
    assert "| fp8 | skipped: needs Transformer Engine |" in page.read_text()


def test_wheels_are_for_all_steps_and_archives_for_those_of_the_engine(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "inwheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("inwheel.py", "")
        wheel.writestr("inwheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: inwheel\nVersion: 1.0\n")
        wheel.writestr("inwheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("inwheel-1.0.dist-info/RECORD", "")
    (tmp_path / "inarchive.py").touch()
    with tarfile.open(wheels / "engine.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "inarchive.py", "inarchive.py")
    site = tmp_path / "site"
    engine = gpu_check.install(wheels, site, tmp_path / "engine")
    check = Check(tmp_path / "out", 60, False, site, engine)
    assert check.has_engine
    assert check.run(planted("a", "import inwheel")).result == DONE
    assert check.run(planted("b", "import inwheel, inarchive", engine=True)).result == DONE
    assert check.run(planted("c", "import inarchive")).result == FAILED
    (wheels / "broken.whl").touch()
    with pytest.raises(ValueError, match="--wheels is .*; expected wheels"):
        gpu_check.install(wheels, site, tmp_path / "again")


# -- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seconds", "0"], "--seconds is 0; expected at least 3"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--steps", "roofline,nothing"], "--steps names 'nothing'; expected some of roofline, kernels"),
        (["--wheels", "nowhere"], "--wheels is nowhere; expected a folder"),
        (["--docs", "nowhere/page.md"], "--docs is nowhere/page.md; expected"),
    ],
)
def test_usage_errors(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(flags)
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """As on a machine whose driver does not load."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    docs = tmp_path / "page.md"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = call("--out", str(tmp_path / "out"), "--docs", str(docs), PATH=path)
    assert done.returncode == 2 and not docs.exists()
    assert done.stderr == (
        "gpu_check.py: error: nvidia-smi names no GPU; expected one. Use --dry to rehearse on a CPU\n"
    )


# -- parts ----------------------------------------------------------------------------------------------------------


def lines(losses: list[float], ms: float = 10.0) -> list[dict[str, float]]:
    """What ``lines_of`` reads from the program's own lines."""
    text = [
        iteration_line({
            "iteration": number, "train_iters": len(losses), "consumed_samples": 8, "elapsed_ms": ms * number,
            "tflops": 400.25, "learning_rate": 1e-4, "batch_size": 8, "loss": loss, "loss_scale": 1.0, "grad_norm": 1.0,
            "skipped": 0, "nan": 0, "tokens_per_second_per_rank": 123456.7, "eta_seconds": 1,
        })
        for number, loss in enumerate(losses, 1)
    ]  # fmt: skip
    return runs.lines_of("\n".join(["noise", *text]))


def test_flags_of_the_runs_on_a_gpu_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of runs that a rehearsal leaves out, too."""
    given: list[list[str]] = []
    text = "\n".join(f"iteration {n}/ elapsed time per iteration (ms): 1.0 throughput per GPU (TFLOP/s/GPU): 1.0 "
                     "lm loss: 5.0 tokens/s/rank: 1.0" for n in range(1, runs.STEPS[False] + 1))  # fmt: skip

    def run_program(command: list[str], told: Any = lambda line: None) -> str:
        given.append(command)
        told(text)
        return text

    monkeypatch.setattr(runs, "run_program", run_program)
    for engine in (False, True):
        runs.train(Record(None), False, engine, "triton", True, "NVIDIA H200")
    runs.fp8(Record(None), False)
    with pytest.raises(RuntimeError, match="resumed steps"):
        runs.checkpoint(Record(None), False)
    assert [command[0] for command in given] == ["pretrain_umv2.py"] * 6
    known = {f"--{name}" for name in option_table.names()} | {"--model-preset"}
    assert {word for command in given for word in command if word.startswith("--")} <= known
    assert ["--fp8-format" in command for command in given] == [False, False, False, True, False, False]
    assert ["transformer_engine" in command for command in given] == [False, True, True, True, False, False]


def test_lines_of_a_run() -> None:
    found = lines([5.0, 4.0, 3.0])
    assert found[1] == {"iteration": 2, "ms": 20.0, "tflops": 400.2, "loss": 4.0, "tokens": 123456.7}
    assert runs.speed(found)["ms"] == 25.0, "the first third is not counted"


def test_fp8_beside_bfloat16() -> None:
    record = Record(None)
    runs.compare_fp8(record, lines([5.0, 4.0], ms=10), lines([5.0, 4.2], ms=8))
    assert record.figures["time_ratio"] == pytest.approx(0.8)
    assert record.figures["largest_gap"] == pytest.approx(0.05) and "5.00% apart" in record.key
    for low in ([5.0, float("nan")], [5.0]):
        with pytest.raises(RuntimeError, match="missing or not finite"):
            runs.compare_fp8(record, lines([5.0, 4.0]), lines(low))


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
     ("some CPU", None)],
)  # fmt: skip
def test_stated_peaks(device: str, peak: float | None) -> None:
    assert report.peak_tflops(device) == peak
    assert runs.share_of_peak(98.9, device) == ("?" if peak is None else f"{98.9 / peak:.1%}")


def test_logs_on_the_page_name_no_place_of_the_machine() -> None:
    log = f"\x1b[31m{ROOT}/umv2_megatron/x.py:3\n\nFile \"/some/where/lib/site-packages/torch/y.py\", /tmp/a/b/c.json\n"
    assert report.last_lines(log) == ["umv2_megatron/x.py:3", 'File "site-packages/torch/y.py", .../c.json']
    assert len(report.last_lines("x\n" * 100)) == report.LOG_LINES


def test_outcomes_without_figures_have_no_part_of_the_page() -> None:
    page = report.page(MACHINE, [Outcome("a", SKIPPED, reason="needs CUDA")], dry=False)
    assert "| a | skipped: needs CUDA | 0 |  |" in page and "## a" not in page


def test_rates_for_the_planner() -> None:
    """Of the best product, the copy, and the faster lookup of umv2-227m: (1 ms * 4 TB/s + 3 ms * 2 TB/s) / 4 ms."""
    roofline = {"device": "d", "copy_gb_per_s": 4000.0, "gemm_bfloat16_4096_tflops": 500.0,
                "gemm_bfloat16_8192_tflops": 600.0, "gemm_float8_e4m3fn_8192_tflops": 1200.0}  # fmt: skip
    slow = {"forward_ms": 2.0, "forward_share": 0.5, "backward_ms": 6.0, "backward_share": 0.25}
    fast = {"forward_ms": 1.0, "forward_share": 1.0, "backward_ms": 3.0, "backward_share": 0.5}
    lookups = {"copy_gb_per_s": 4000.0, "umv2-227m, scatter": slow, "umv2-227m, triton, ordered": fast,
               "umv2-1b-7b, scatter": {**fast, "backward_share": 1.0}}  # fmt: skip
    measured = [Outcome("roofline", DONE, figures=roofline), Outcome("lookup", DONE, figures=lookups)]
    rates = {"memory_bandwidth": 4000.0, "update_bandwidth": 4000.0, "peak_tflops": 600.0, "flops_efficiency": 1.0}
    assert report.machine_rates("no device that is known", measured) == {**rates, "row_bandwidth": 2500.0}
    known = report.machine_rates("NVIDIA H200", measured[:1])
    assert known == {**rates, "peak_tflops": report.peak_tflops("NVIDIA H200"), "flops_efficiency": 0.6067}
    assert report.machine_rates("NVIDIA H200", [Outcome("roofline", CUT, figures=roofline), measured[1]]) == {}

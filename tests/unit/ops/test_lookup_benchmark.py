"""benchmarks/lookup.py at tiny sizes: it compares, times and writes what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.row_rates import RowRates

PROGRAM = Path(__file__).resolve().parents[3] / "benchmarks" / "lookup.py"
SIZES = ["--tokens", "6", "--topk", "3", "--dim", "8", "--rows", "50", "--rounds", "2"]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lookup_benchmark", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    machine = {"device": "test", "threads": 1, "torch": "", "copy_bytes_per_s": 1e9, "gemm_flops_per_s": 1e9}
    monkeypatch.setattr(module, "describe_machine", lambda device, quick: machine)
    monkeypatch.setattr(module, "run_peers", lambda options: [])
    return module


def test_tables_and_json(program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- benchmarks/lookup.py: begin -->\nold\n<!-- benchmarks/lookup.py: end -->\nafter\n")
    assert program.main([*SIZES, "--json", str(tmp_path / "out.json"), "--docs", str(page)]) == 0
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [(case["dtype"], case["pre_values"]) for case in cases] == [
        ("float32", True), ("bfloat16", True), ("float32", False), ("bfloat16", False)]  # fmt: skip
    for case in cases:
        for rows in case["passes"].values():
            backends = {"--memory-backend scatter", "--memory-backend cpu"}
            assert set(rows) == {program.AUTOGRAD, program.MERGED, program.BAG, *backends}
            for name, row in rows.items():
                limit = 1e-5 if case["dtype"] == "float32" else 3e-2
                assert row["median_ms"] > 0 and row["largest_error"] < limit, (name, row)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    bounds = json.loads((tmp_path / "out.json").read_text())["bounds"]
    expected = {f"{dtype}, values {kind}" for dtype in ("float32", "bfloat16") for kind in ("only", "and pre-values")}
    assert {each["case"] for each in bounds} == expected
    for found in (each[name] for each in bounds for name in program.PASSES):
        assert found["ratio"] == pytest.approx(found["ms"] / found["bound_ms"]) and f"{found['ratio']:.2f}" in text
    assert "--memory-backend cpu" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_bound_are_touched_once(dtype: torch.dtype) -> None:
    """By every way in every order: integers grow where rows are added to, and stay with a number of 0."""
    read, added = torch.zeros(50, 24, dtype=dtype), torch.zeros(50, 20, dtype=torch.int32)
    generator, picks = torch.Generator().manual_seed(3), 30
    ways = len(RowRates([read], [added], 1).seconds(picks, generator))
    generator.manual_seed(3)
    expected = torch.zeros_like(added)
    for _ in range(ways):
        rows = torch.randint(0, 50, (picks,), generator=generator).unique()
        torch.randperm(len(rows), generator=generator)
        expected[rows] += 1
    RowRates([read], [added]).seconds(picks, generator)
    assert torch.equal(added, expected) and read.count_nonzero() == 0


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--dim", "7"]])
def test_wrong_sizes_are_refused(program: ModuleType, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(flags)
    assert stop.value.code == 2

"""The Triton backend without a GPU: kernels equal the reference under the interpreter, compile for sm_80, sm_90
and sm_100 within limits on registers and without spills, and are launched without waiting for the device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed: pip install -r requirements-triton.txt")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from umv2_megatron.ops import triton_launch, triton_lookup, triton_ragged, triton_topk  # noqa: E402
from umv2_megatron.ops.interface import ListedPicks  # noqa: E402

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[3]
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
REGISTERS = {  # at most, for bfloat16 tables; 128 leave room for 16 warps on a multiprocessor
    "fused_forward": 120, "row_dots": 96, "row_sums": 80, "find_segments": 80, "add_to_rows": 104, "add_long_rows": 40,
    "atomic_add_to_rows": 88, "best_keys_kernel": 56, "best_cells_kernel": 128,
}  # fmt: skip
CAPABILITIES = (pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow))
Launched = tuple[Any, tuple[int, ...], dict[str, Any], dict[str, Any], int]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What would have been launched; outputs stay uninitialised."""
    calls: list[Launched] = []
    monkeypatch.setattr(triton_launch, "launch", lambda *call: calls.append(call))
    return calls


def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/ops/triton_interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and re.search(r"\d\d passed", done.stdout), done.stdout[-6000:] + done.stderr[-2000:]


def run_lookup(
    tokens: int, picks: int, rows: int, pre_columns: int, columns: int, dtype: torch.dtype, deterministic: bool = True,
    blocks: int = 1,
) -> None:  # fmt: skip
    """Forward and backward of a lookup with main_grad."""
    picked = torch.zeros(tokens, picks, dtype=torch.int64)
    tables = [torch.nn.Parameter(torch.zeros(rows, each, dtype=dtype)) for each in (pre_columns, columns)]
    for table in tables:
        table.main_grad = torch.zeros(table.shape)  # type: ignore[attr-defined]
    scores = torch.zeros(tokens, picks, 2).requires_grad_()
    projected = torch.zeros(tokens, pre_columns, dtype=dtype).requires_grad_()
    block_ids = torch.zeros_like(picked) if blocks > 1 else None
    arguments = (picked, block_ids, scores, projected, *tables, blocks, "none", deterministic)
    triton_lookup.lookup(*arguments).sum().backward()


def compiled_for(call: Launched, capability: int) -> tuple[str, Any]:
    """(kernel name, compiled kernel); every pointer is aligned to 16 bytes, as torch's allocators give them."""
    kernel, _, tensors, constants, warps = call
    signature, attributes, constexprs = {}, {}, dict(constants)
    for index, name in enumerate(kernel.arg_names):
        if name in constants or tensors[name] is None:
            signature[name] = "constexpr"
            constexprs.setdefault(name, None)
        elif isinstance(tensors[name], Tensor):
            signature[name] = POINTERS[tensors[name].dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return kernel.__name__, compiled


def check_compiled(
    calls: list[Launched], capability: int, folder: Path, limits: dict[str, int], vectors: bool = True
) -> set[str]:
    """Registers within ``limits``, no spills, with ``vectors`` rows loaded 16 bytes at a time; the kernels' names."""
    names = set()
    for call in calls:
        name, compiled = compiled_for(call, capability)
        binary = folder / f"{name}.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, timeout=60, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout)
        assert found, usage.stdout
        registers, stack, local = (int(each) for each in found.groups())
        assert stack == 0 and local == 0, f"{name} spills for sm_{capability}: {found.group()}"
        assert registers <= limits[name], f"{name} takes {registers} registers for sm_{capability}"
        if vectors and name in ("fused_forward", "row_dots", "row_sums", "add_to_rows"):
            assert "ld.global.v4.b32" in compiled.asm["ptx"], f"{name} does not load rows 16 bytes at a time"
        names.add(name)
    return names


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_lookup_compiles_ahead_of_time(
    capability: int, launched: list[Launched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of umv2-227m (Dp = Dv = 192, K = 32) in bfloat16, of the 1B/7B size (384, 768, K = 128)
    and of the 500M size (72, 216)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    run_lookup(8, 32, 9, 192, 192, torch.bfloat16)
    run_lookup(2, 32, 9, 192, 192, torch.bfloat16, deterministic=False)
    triton_lookup.weighted_sum(torch.zeros(8, 32, dtype=torch.int64), None, torch.zeros(8, 32, 2),
                               torch.zeros(9, 192, dtype=torch.bfloat16), 1)  # fmt: skip
    expected = set(REGISTERS) - {"best_keys_kernel", "best_cells_kernel"}
    assert check_compiled(distinct(launched), capability, tmp_path, REGISTERS) == expected
    launched.clear()
    run_lookup(1, 128, 9, 384, 768, torch.bfloat16)
    check_compiled(distinct(launched), capability, tmp_path, REGISTERS)
    launched.clear()
    run_lookup(8, 32, 9, 72, 216, torch.bfloat16)  # the 500M size: rows of 216 bytes a core, loaded 8 bytes at a time
    limits = {**REGISTERS, "fused_forward": 128, "row_dots": 128, "add_to_rows": 168}
    check_compiled(distinct(launched), capability, tmp_path, limits, vectors=False)
    launched.clear()
    run_lookup(1, 32, 9, 192, 192, torch.float32)  # twice the registers for rows in flight
    limits = {**REGISTERS, "fused_forward": 136, "row_dots": 104, "add_to_rows": 144}
    check_compiled(distinct(launched), capability, tmp_path, limits)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_programs_of_several_tokens_compile(
    capability: int, launched: list[Launched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = 8 on a grid, and picks in a list, with rows of 192 in bfloat16."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    run_lookup(9, 8, 9, 192, 192, torch.bfloat16)
    rows, table = torch.zeros(300, dtype=torch.int64), torch.zeros(9, 192, dtype=torch.bfloat16)
    picks = ListedPicks(rows, rows, torch.zeros(64, dtype=torch.int64))
    triton_ragged.weighted_sum(picks, torch.zeros(300, 2), table)
    calls = [call for call in distinct(launched) if call[3].get("TOKENS", 1) > 1]
    assert check_compiled(calls, capability, tmp_path, REGISTERS) == {"fused_forward", "row_dots", "row_sums"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_parts_of_a_shard_by_row_compile(
    capability: int, launched: list[Launched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes of umv2-2.5b-120b-top256 (Dp 256, Dv 768) in bfloat16: dot products beside the sums of gradients, and
    columns in turn."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    picks, values, pre_values = shard_by_row(torch.bfloat16)
    monkeypatch.setattr(triton_launch, "cache_bytes", lambda _: 9 * 128 * 2)
    weights, grad_out = torch.zeros(300, 2), torch.zeros(64, 1, 768, dtype=torch.bfloat16)
    triton_ragged.weighted_sum(picks, weights, values)
    triton_ragged.weighted_sum_backward(picks, weights, grad_out, values, torch.zeros(9, 768))
    projected = torch.zeros(64, 256, dtype=torch.bfloat16)
    triton_ragged.pre_scores(picks, projected, pre_values, torch.float32)
    triton_ragged.pre_scores_backward(picks, weights[:, 0].contiguous(), projected, pre_values, torch.zeros(9, 256))
    calls = distinct(launched)
    in_turn = {call[0].__name__: call[1] for call in calls if call[0].__name__ in ("row_sums", "row_dots")}
    assert in_turn["row_dots"][1] == 2, "128 of 256 columns"
    assert [call[3]["DOTS"] for call in calls if call[0].__name__ == "add_to_rows"] == [True, False]
    limits = {**REGISTERS, "add_to_rows": 168}
    assert check_compiled(calls, capability, tmp_path, limits) == {
        "row_sums", "row_dots", "find_segments", "add_to_rows", "add_long_rows",
    }  # fmt: skip


def shard_by_row(dtype: torch.dtype) -> tuple[ListedPicks, Tensor, Tensor]:
    """300 picks of 9 rows by 64 tokens, values and pre-values."""
    rows = torch.zeros(300, dtype=torch.int64)
    picks = ListedPicks(rows, rows, torch.zeros(64, dtype=torch.int64))
    return picks, torch.zeros(9, 768, dtype=dtype), torch.zeros(9, 256, dtype=dtype)


def test_columns_in_turn_follow_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """umv2-2.5b-120b-top256 over 64 ranks: 73,984 rows of 1,536 and of 512 bytes, half of an H100's L2 of 50 MB."""
    monkeypatch.setattr(triton_launch, "cache_bytes", lambda _: 25_000_000)
    values, pre_values = (torch.empty(73_984, width, dtype=torch.bfloat16, device="meta") for width in (768, 256))
    assert triton_launch.cached_columns(values, 2, 2**20) == 64 and 73_984 * 2 * 64 * 2 <= 25_000_000
    assert triton_launch.cached_columns(pre_values, 1, 2**20) == 128
    assert triton_launch.cached_columns(values, 2, 100_000) == 0, "few picks come back to a row"
    assert triton_launch.cached_columns(values[:8000], 2, 2**20) == 0, "all columns fit"
    assert triton_launch.cached_columns(torch.empty(600_000, 768, device="meta"), 2, 2**22) == 0, "not even 64 bytes do"
    monkeypatch.setattr(triton_launch, "cache_bytes", lambda _: 0)
    assert triton_launch.cached_columns(values, 2, 2**20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_top_k_compiles_ahead_of_time(
    capability: int, launched: list[Launched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N = 360, K = 32 of umv2-227m."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    key_scores, ones = torch.zeros(2, 2, 3, 1, 360), torch.ones(1, 2)
    keys = triton_topk.best_keys(key_scores, ones, ones, 32)
    triton_topk.best_cells(key_scores, keys, torch.zeros(1, 2, 2), 32)
    assert len(check_compiled(launched, capability, tmp_path, REGISTERS)) == 2


def distinct(calls: list[Launched]) -> list[Launched]:
    """One call of each kernel with each set of constants."""
    return list({(call[0].__name__, *sorted(call[3].items())): call for call in calls}.values())


@pytest.mark.parametrize("columns", [192, 8192])
@pytest.mark.parametrize("deterministic", [True, False])
def test_nothing_waits_for_the_device(deterministic: bool, columns: int, launched: list[Launched]) -> None:
    """With fake tensors, whatever needs a value on the host, or a shape that depends on data, raises."""
    with FakeTensorMode():
        run_lookup(64, 32, 1000, 192, columns, torch.bfloat16, deterministic, blocks=4)
        rows = torch.zeros(300, dtype=torch.int64)
        table, weights = torch.zeros(1000, 192), torch.zeros(300, 2)
        picks = ListedPicks(rows, rows, torch.zeros(64, dtype=torch.int64))
        triton_ragged.weighted_sum(picks, weights, table)
        grad_out, projected = torch.zeros(64, 1, 192), torch.zeros(64, 192)
        triton_ragged.weighted_sum_backward(picks, weights, grad_out, table, table, deterministic)
        rho = triton_ragged.pre_scores(picks, projected, table, torch.float32)
        triton_ragged.pre_scores_backward(picks, rho, projected, table, table, deterministic)
        key_scores, ones = torch.zeros(2, 2, 3, 1, 360), torch.ones(1, 2)
        triton_topk.best_cells(key_scores, triton_topk.best_keys(key_scores, ones, ones, 32), torch.ones(1, 2, 2), 32)
    assert len(launched) >= 12 and all(isinstance(size, int) for call in launched for size in call[1])


def test_tiles_follow_the_arithmetic() -> None:
    """4,096 elements, a warp for every 1,024, no more picks than there are, rows whole up to 2,048 columns."""
    tile = triton_launch.tile_for(2, 96, 32, 192, element_size=2)
    assert tile == triton_launch.Tile(tokens=1, picks=16, cores=2, columns=64, rest=32, warps=4)
    tile = triton_launch.tile_for(2, 12, 32)  # a shard of few columns
    assert (tile.picks, tile.cores, tile.columns, tile.rest, tile.warps) == (32, 2, 16, 0, 1)
    tile = triton_launch.tile_for(3, 5000, 8)
    assert (tile.picks, tile.cores, tile.columns, tile.rest, tile.warps) == (2, 4, 512, 0, 4)
    assert triton_launch.can_fuse(2048, 2, 1024) and not triton_launch.can_fuse(192, 2, 1025)
    for cores in (1, 2, 3, 7):
        for columns in (1, 3, 96, 1000):
            for size in (0, 2, 4):
                tile = triton_launch.tile_for(cores, columns, 47, element_size=size)
                elements = tile.tokens * tile.picks * tile.cores * (tile.columns + tile.rest)
                assert elements <= triton_launch.TILE_ELEMENTS and tile.cores >= cores
                assert tile.tokens == 1 or elements * size <= 2 * triton_launch.TILE_ELEMENTS


@pytest.mark.parametrize(
    ("picks", "slice_columns", "element_size", "tokens"),
    [
        (32, 96, 2, 1),  # umv2-227m: two tiles for a token
        (16, 96, 2, 1),
        (8, 96, 2, 2),
        (8, 96, 4, 1),
        (4, 96, 2, 4),
        (1, 96, 2, 16),
        (32, 12, 2, 4),  # a shard of 24 columns
        (32, 12, 4, 2),
        (1, 1, 2, 256),  # no more picks than that
    ],
)
def test_tokens_of_a_program_fill_its_tile(picks: int, slice_columns: int, element_size: int, tokens: int) -> None:
    """With 8 KB of rows: what 4,096 elements are in bfloat16."""
    assert triton_launch.tile_for(2, slice_columns, picks, element_size=element_size).tokens == tokens


def test_slices_are_cut_where_lanes_would_be_idle() -> None:
    assert [triton_launch.cut(columns) for columns in (96, 192, 384, 768)] == [
        (64, 32),
        (128, 64),
        (256, 128),
        (512, 256),
    ]
    assert [triton_launch.cut(columns) for columns in (1, 3, 8, 12, 64, 100, 120)] == [
        (1, 0), (4, 0), (8, 0), (16, 0), (64, 0), (128, 0), (128, 0)
    ]  # fmt: skip
    for columns in range(1, 3000):
        first, rest = triton_launch.cut(columns)
        assert first + rest >= columns > first * (rest > 0)


def test_a_machine_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="there is no CUDA device"):
        triton_lookup.require_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    triton_lookup.require_device()

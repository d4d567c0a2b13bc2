"""The compiled backend: its parts against plain PyTorch, threads, huge tables, and how it is built."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from umv2_megatron.ops import cpu, cpu_blocks, cpu_build, cpu_ragged, ragged, scatter
from umv2_megatron.ops.from_export import module_of_exports
from umv2_megatron.ops.interface import ListedPicks

ROOT = Path(__file__).resolve().parents[3]
TOKENS, PICKS, ROWS = 300, 8, 50  # enough picks for two threads, every row many times


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(cores: int, width: int, blocks: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "rows": torch.randint(0, ROWS, (TOKENS, PICKS), generator=g),
        "blocks": torch.randint(0, blocks, (TOKENS, PICKS), generator=g),
        "weights": normal(TOKENS, PICKS, cores).to(wide),
        "rho_grad": normal(TOKENS, PICKS).to(wide),
        "projected": normal(TOKENS, width).to(dtype),
        "table": normal(ROWS, width).to(dtype),
        "grad_out": normal(TOKENS, blocks, width).to(dtype),
    }


def on_grid(parts, x: dict, blocks: int, sum_dtype: torch.dtype) -> dict[str, Tensor]:
    sums = [torch.full(x["table"].shape, 0.5, dtype=sum_dtype) for _ in range(2)]
    return {
        "rho": parts.pre_scores(x["rows"], x["projected"], x["table"], x["weights"].dtype),
        "out": parts.weighted_sum(x["rows"], x["blocks"], x["weights"], x["table"], blocks),
        "weight_grad": parts.weighted_sum_backward(
            x["rows"], x["blocks"], x["weights"], x["grad_out"], x["table"], sums[0]),
        "projected_grad": parts.pre_scores_backward(x["rows"], x["rho_grad"], x["projected"], x["table"], sums[1]),
        "value_sum": sums[0],
        "pre_value_sum": sums[1],
    }  # fmt: skip


def in_list(parts, x: dict, blocks: int, sum_dtype: torch.dtype) -> dict[str, Tensor]:
    """A third of the picks is left out, and all those of some tokens."""
    keep = torch.rand(TOKENS, PICKS, generator=torch.Generator().manual_seed(9)) < 0.67
    keep[[0, 7, 8, TOKENS - 1]] = False
    tokens = torch.arange(TOKENS).unsqueeze(1).expand(TOKENS, PICKS)[keep]
    rows, places, weights, rho_grad = (x[name][keep] for name in ("rows", "blocks", "weights", "rho_grad"))
    picks = ListedPicks(rows, tokens, keep.sum(1), places if blocks > 1 else None, blocks)
    sums = [torch.full(x["table"].shape, 0.5, dtype=sum_dtype) for _ in range(2)]
    return {
        "rho": parts.pre_scores(picks, x["projected"], x["table"], weights.dtype),
        "out": parts.weighted_sum(picks, weights, x["table"]),
        "weight_grad": parts.weighted_sum_backward(picks, weights, x["grad_out"], x["table"], sums[0]),
        "projected_grad": parts.pre_scores_backward(picks, rho_grad, x["projected"], x["table"], sums[1]),
        "value_sum": sums[0],
        "pre_value_sum": sums[1],
    }  # fmt: skip


# 149 columns of a slice: every step that a loop over columns has, with vectors of 32 and of 64 bytes.
@pytest.mark.parametrize(
    "cores, width, blocks", [(1, 1, 1), (2, 24, 1), (3, 57, 4), (5, 5, 2), (2, 298, 1), (1, 75, 2)]
)
@pytest.mark.parametrize("kind", ["grid", "list"])
def test_parts_equal_plain_pytorch(kind: str, cores: int, width: int, blocks: int, threads: int) -> None:
    run, compiled, plain = (on_grid, cpu, scatter) if kind == "grid" else (in_list, cpu_ragged, ragged)
    for dtype, sum_dtype, tolerance in (
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 5e-2),
    ):
        x = inputs(cores, width, blocks, dtype)
        exact = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
        expected = run(plain, exact, blocks, torch.float64)
        for name, found in run(compiled, x, blocks, sum_dtype).items():
            error = (found.double() - expected[name]).abs().max() / expected[name].abs().max()
            assert error <= tolerance, (name, dtype, float(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cores, pre_width, width, blocks", [(1, 3, 1, 1), (2, 24, 72, 1), (3, 40, 57, 4)])
def test_one_pass_has_the_bits_of_two(
    cores: int, pre_width: int, width: int, blocks: int, dtype: torch.dtype, threads: int
) -> None:
    x = inputs(cores, width, blocks, dtype)
    generator = torch.Generator().manual_seed(5)
    pre_values = torch.randn(len(x["table"]), pre_width, generator=generator).to(dtype)
    projected = torch.randn(TOKENS, pre_width, generator=generator).to(dtype)
    rho = cpu.pre_scores(x["rows"], projected, pre_values, x["weights"].dtype)
    out = cpu.weighted_sum(x["rows"], x["blocks"], x["weights"] * rho.unsqueeze(-1), x["table"], blocks)
    arguments = (x["rows"], x["blocks"], x["weights"], projected, pre_values, x["table"], blocks)
    found = cpu.one_pass(*arguments, "none")
    assert found is not None and torch.equal(found[0], out) and torch.equal(found[1], rho)
    assert out.abs().sum() > 0
    assert cpu.one_pass(*arguments, "gelu") is None
    half = (*arguments[:5], x["table"].half(), blocks)
    assert cpu.one_pass(*half, "none") is None


def both_backwards(x: dict, pre_width: int, blocks: int, sum_dtype: torch.dtype, frozen: tuple[str, ...] = ()) -> tuple:
    """Gradients of scores and projected input and the two sums, by one pass and by parts."""
    generator = torch.Generator().manual_seed(6)
    dtype = x["table"].dtype
    pre_values = torch.randn(ROWS, pre_width, generator=generator).to(dtype)
    projected = torch.randn(TOKENS, pre_width, generator=generator).to(dtype)
    rho = cpu.pre_scores(x["rows"], projected, pre_values, x["weights"].dtype)
    results = []
    for one in (True, False):
        sums = [None if name in frozen else torch.full(table.shape, 0.5, dtype=sum_dtype)
                for name, table in (("values", x["table"]), ("pre_values", pre_values))]  # fmt: skip
        places = x["blocks"] if blocks > 1 else None
        if one:
            tensors = (projected, pre_values, x["grad_out"], x["table"])
            found = cpu.one_pass_backward(x["rows"], places, x["weights"], rho, *tensors, *sums)
            assert found is not None
        else:
            weights = x["weights"] * rho.unsqueeze(-1)
            weight_grad = cpu.weighted_sum_backward(x["rows"], places, weights, x["grad_out"], x["table"], sums[0])
            rho_grad = (weight_grad * x["weights"]).sum(-1)
            projected_grad = cpu.pre_scores_backward(x["rows"], rho_grad, projected, pre_values, sums[1])
            found = weight_grad * rho.unsqueeze(-1), projected_grad
        results.append([*found, *(each for each in sums if each is not None)])
    return tuple(results)


@pytest.mark.parametrize("frozen", [(), ("values",), ("pre_values",), ("values", "pre_values")])
@pytest.mark.parametrize("cores, pre_width, width, blocks", [(1, 3, 1, 1), (2, 75, 298, 1), (3, 40, 57, 4)])
def test_backward_in_one_pass_equals_the_parts(
    cores: int, pre_width: int, width: int, blocks: int, frozen: tuple[str, ...], threads: int
) -> None:
    for dtype, sum_dtype, tolerance in (
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),  # the gradient of the projected input is rounded to bfloat16
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ):
        one, parts = both_backwards(inputs(cores, width, blocks, dtype), pre_width, blocks, sum_dtype, frozen)
        assert len(one) == 4 - len(frozen)
        for found, expected in zip(one, parts):
            assert found.dtype == expected.dtype and expected.abs().max() > 0.5
            assert (found - expected).abs().max() <= tolerance * expected.abs().max(), (dtype, sum_dtype)


def test_backward_in_one_pass_refuses_what_it_has_no_kernel_for() -> None:
    x = inputs(1, 8, 1, torch.bfloat16)
    rho, sums = x["rho_grad"], [torch.zeros(ROWS, 8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    arguments = (x["rows"], None, x["weights"], rho, x["projected"], x["table"], x["grad_out"], x["table"])
    assert cpu.one_pass_backward(*arguments, *sums) is None and not any(each.any() for each in sums)
    assert cpu.one_pass_backward(*arguments, sums[0].double(), None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_columns_keep_their_places(dtype: torch.dtype) -> None:
    """One pick of a token with a weight of 1 is its row, of any width, also NaN and infinities."""
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max]
    for width in range(1, 150):
        table = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        table[3] = torch.tensor(special, dtype=dtype).repeat(width)[:width]
        rows, wide = torch.tensor([[4], [0], [3]]), torch.float64 if dtype == torch.float64 else torch.float32
        out = cpu.weighted_sum(rows, None, torch.ones(3, 1, 1, dtype=wide), table, 1)
        torch.testing.assert_close(out, table[rows[:, 0]], rtol=0, atol=0, equal_nan=True)
        total = torch.zeros_like(table)
        picked = cpu.weighted_sum_backward(
            rows[:2], None, torch.ones(2, 1, 1, dtype=wide), table[:2].unsqueeze(1), table, total
        )
        assert torch.equal(total[4], table[0]) and torch.equal(total[0], table[1]) and not total[1:4].any()
        expected = (table[[4, 0]].double() * table[:2].double()).sum(-1)
        torch.testing.assert_close(picked.flatten().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [1.00390625, 1.0078125, 3.0, 1e-3])
def test_sums_in_bfloat16_are_rounded_to_nearest(weight: float) -> None:
    """Ties to even, as PyTorch rounds."""
    table = torch.randn(300, 77, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.arange(300).unsqueeze(1)
    out = cpu.weighted_sum(rows, None, torch.full((300, 1, 1), weight), table, 1)
    assert torch.equal(out, (table.float() * weight).bfloat16())


@pytest.mark.parametrize("rows", [[0] * 4000, [0] * 700 + [1] * 2600 + [2] * 700])
def test_rows_that_all_tokens_pick(rows: list[int], threads: int) -> None:
    """Threads whose rows are not picked for long."""
    picked = torch.tensor(rows).unsqueeze(1)
    table, total = torch.ones(3, 40), torch.zeros(3, 40)
    grad = cpu.weighted_sum_backward(picked, None, torch.ones(4000, 1, 1), torch.ones(4000, 1, 40), table, total)
    assert torch.equal(total, torch.bincount(picked[:, 0], minlength=3).float().unsqueeze(1).expand(3, 40))
    assert torch.equal(grad, torch.full_like(grad, 40.0))


@pytest.mark.parametrize("tokens, picks", [(0, 8), (5, 0)])
def test_nothing_picked(tokens: int, picks: int) -> None:
    rows, weights = torch.zeros(tokens, picks, dtype=torch.long), torch.zeros(tokens, picks, 1)
    table, total = torch.ones(3, 40), torch.zeros(3, 40)
    assert torch.equal(cpu.weighted_sum(rows, None, weights, table, 1), torch.zeros(tokens, 40))
    done = cpu.one_pass(rows, None, weights, torch.ones(tokens, 40), table, table, 1, "none")
    assert done is not None and torch.equal(done[0], torch.zeros(tokens, 40)) and done[1].shape == (tokens, picks)
    upstream = torch.ones(tokens, 1, 40)
    back = cpu.one_pass_backward(rows, None, weights, done[1], upstream[:, 0], table, upstream, table, total, total)
    assert back is not None and torch.equal(back[1], torch.zeros(tokens, 40)) and not total.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(on_grid(cpu, inputs(2, 40, 4, dtype), 4, torch.float32))
            one, _ = both_backwards(inputs(2, 40, 4, dtype), 40, 4, torch.float32)
            results[-1].update({f"one pass {i}": each for i, each in enumerate(one)})
    finally:
        torch.set_num_threads(before)
    for name, found in results[0].items():
        assert all(torch.equal(found, other[name]) for other in results[1:]), name


def test_float32_gradients_of_bfloat16_tables_are_not_rounded() -> None:
    """Many picks of one row: a sum in bfloat16 would stop growing at 256."""
    rows, weights = torch.zeros(4000, 1, dtype=torch.long), torch.ones(4000, 1, 1)
    table, total = torch.ones(1, 8, dtype=torch.bfloat16), torch.zeros(1, 8)
    cpu.weighted_sum_backward(rows, None, weights, torch.ones(4000, 1, 8, dtype=torch.bfloat16), table, total)
    assert torch.equal(total, torch.full((1, 8), 4000.0))


def test_other_dtypes_take_plain_pytorch() -> None:
    x = inputs(2, 24, 1, torch.float64)
    half = {name: value.half() if value.is_floating_point() else value for name, value in x.items()}
    found, expected = on_grid(cpu, half, 1, torch.float16), on_grid(scatter, half, 1, torch.float16)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    mixed = on_grid(cpu, x, 1, torch.float32)  # float64 tables with a float32 main_grad
    assert torch.equal(mixed["value_sum"], on_grid(scatter, x, 1, torch.float32)["value_sum"])


def test_elements_beyond_2_to_the_31() -> None:
    """Rows at the end of tables of 2.2e9 elements; only the touched pages of these are ever allocated."""
    width, rows = 192, 11_500_000
    table = torch.empty(rows, width, dtype=torch.bfloat16)
    total = torch.empty(rows, width)
    picked = torch.tensor([[rows - 1, 0], [rows - 2, rows - 1]])
    assert (rows - 2) * width > 2**31
    g = torch.Generator().manual_seed(0)
    for row in picked.unique():
        table[row], total[row] = torch.randn(width, generator=g).bfloat16(), 1.0
    small, where = picked.unique(return_inverse=True)
    x = {
        "projected": torch.randn(2, width, generator=g).bfloat16(),
        "weights": torch.randn(2, 2, 2, generator=g),
        "grad_out": torch.randn(2, 1, width, generator=g).bfloat16(),
        "rho_grad": torch.randn(2, 2, generator=g),
    }
    results = []
    for parts_rows, parts_table, parts_total in ((picked, table, total), (where, table[small], torch.ones(3, width))):
        results.append([
            cpu.pre_scores(parts_rows, x["projected"], parts_table, torch.float32),
            cpu.weighted_sum(parts_rows, None, x["weights"], parts_table, 1),
            cpu.weighted_sum_backward(parts_rows, None, x["weights"], x["grad_out"], parts_table, parts_total),
            cpu.pre_scores_backward(parts_rows, x["rho_grad"], x["projected"], parts_table, parts_total),
            parts_total[small] if parts_total is total else parts_total,
        ])  # fmt: skip
    assert all(torch.equal(found, expected) for found, expected in zip(*results))


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_rows_out_of_range_are_refused(wrong: int) -> None:
    x = inputs(2, 8, 1, torch.float32)
    x["rows"][5, 3] = wrong
    total = torch.zeros_like(x["table"])
    with pytest.raises(IndexError, match=f"not in 0..{ROWS - 1}"):
        cpu.weighted_sum_backward(x["rows"], None, x["weights"], x["grad_out"], x["table"], total)
    assert not total.any()


# -- building -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_start_together_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper around the compiler counts its calls; every process gets the finished library."""
    calls, wrapper = tmp_path / "calls", tmp_path / "g++"
    wrapper.write_text(f'#!/bin/sh\necho call >> {calls}\nexec {cpu_build.find_compiler()} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("UMV2_CACHE_DIR", str(tmp_path / "kept"))
    # Not forked: a child of a process with threads, which earlier tests have started, can wait for ever.
    program = [sys.executable, "-c", "from umv2_megatron.ops import cpu_build; print(cpu_build.load()._name)"]
    processes = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    names = {process.communicate(timeout=200)[0].strip() for process in processes}
    assert len(names) == 1 and Path(names.pop()).parent == tmp_path / "kept"
    assert calls.read_text().count("call") == 1


def test_threads_are_those_of_torch() -> None:
    """The backend brings no OpenMP runtime of its own: a second pool of threads would spin on torch's cores."""
    program = (
        "import pathlib, torch; from umv2_megatron.ops import get_backend; get_backend('cpu', 'cpu'); "
        "print(*{l.split()[-1] for l in pathlib.Path('/proc/self/maps').read_text().splitlines() if 'libgomp' in l})"
    )
    # A process of its own: sentencepiece, which other tests load, has a runtime, too.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert len(done.stdout.split()) == 1, done.stdout + done.stderr


def test_what_cannot_be_built_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMV2_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ImportError, match="no C\\+\\+ compiler: \\$CXX is no-such-compiler"):
        cpu_build.load()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'a warning' >&2\necho 'error: out of registers' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ImportError, match="out of registers"):
        cpu_build.load()
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho 'a warning' >&2\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(module_of_exports("build_umv2"), "BUILD_SECONDS", 0.2)
    with pytest.raises(ImportError, match="timed out after 0.2 seconds"):
        cpu_build.load()
    assert not list((tmp_path / "kept").glob("*.so")) and not list((tmp_path / "kept").glob("build-*"))


def test_what_cannot_be_built_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and attention ask in every forward whether there are kernels."""
    calls, broken = tmp_path / "calls", tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\necho call >> {calls}\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("UMV2_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("CXX", str(broken))
    cpu_build._loaded.cache_clear()
    try:
        assert not cpu_blocks.available()
        tried = calls.read_text().count("call")
        assert not cpu_blocks.available() and calls.read_text().count("call") == tried
        with pytest.raises(ImportError, match="did not build the kernels"):
            cpu_build.library()
    finally:
        cpu_build._loaded.cache_clear()


def test_a_damaged_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not one of the flags that are tried next, without OpenMP."""
    monkeypatch.setenv("UMV2_CACHE_DIR", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    # In another process: who has loaded a library is given it again without a look at the file.
    child = multiprocessing.get_context("fork").Process(target=cpu_build.load, args=("one", [source]))
    child.start()
    child.join(timeout=100)
    (made,) = tmp_path.glob("one-*.so")
    made.write_bytes(b"")
    again = cpu_build.load("one", [source])
    assert Path(again._name) == made and again.one() == 1


def test_users_without_a_home_have_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under a number that no user has."""
    build = module_of_exports("build_umv2")
    for name in ("HOME", "UMV2_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert build.cache_directory().parent == tmp_path
    assert not (tmp_path / "~").exists()

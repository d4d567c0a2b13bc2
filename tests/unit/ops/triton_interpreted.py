"""The Triton kernels against the reference, run by Triton's interpreter on a CPU.

Not collected by itself: TRITON_INTERPRET=1 must be set before triton is imported, so test_triton_lookup.py runs this
file in a process of its own. Tiles are made small where a test wants several of them: the interpreter takes
milliseconds for every program.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder as builder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden_support import golden_pairs, read_pair  # noqa: E402
from test_golden import test_golden_pair as check_golden_pair  # noqa: E402

from umv2_megatron.ops import (  # noqa: E402
    ragged,
    reference,
    scatter,
    triton_launch,
    triton_lookup,
    triton_ragged,
    triton_search,
    triton_topk,
)
from umv2_megatron.ops.interface import ListedPicks, PickOrder  # noqa: E402

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def make(
    tokens: int = 5, picks: int = 6, rows: int = 7, cores: int = 2, pre_columns: Optional[int] = 5, columns: int = 8,
    blocks: int = 1, dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a lookup; every row is picked several times."""
    g = torch.Generator().manual_seed(tokens + 10 * picks + 100 * blocks)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    exact = dtype if dtype == torch.float64 else torch.float32
    return {
        "rows": torch.randint(0, rows, (tokens, picks), generator=g),
        "blocks": torch.randint(0, blocks, (tokens, picks), generator=g) if blocks > 1 else None,
        "scores": rand(tokens, picks, cores).to(exact).requires_grad_(),
        "projected": rand(tokens, pre_columns).requires_grad_() if pre_columns else None,
        "pre_values": torch.nn.Parameter(rand(rows, pre_columns)) if pre_columns else None,
        "values": torch.nn.Parameter(rand(rows, columns)),
        "num_blocks": blocks,
    }


def gradients(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: each.grad for name, each in arguments.items() if isinstance(each, Tensor) and each.requires_grad}


def check_equal_to_reference(activation: str = "none", deterministic: bool = True, **sizes: Any) -> None:
    """Output and all gradients, in float64."""
    found, expected = make(**sizes), make(**sizes)
    out = triton_lookup.lookup(**found, activation=activation, deterministic=deterministic)
    expected_out = reference.lookup(**expected, activation=activation)
    torch.testing.assert_close(out, expected_out, **TIGHT)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    expected_out.backward(upstream)
    expected_grads = gradients(expected)
    for name, grad in gradients(found).items():
        torch.testing.assert_close(grad, expected_grads[name], msg=name, **TIGHT)


@pytest.mark.parametrize("stem", [stem for stem in golden_pairs() if "hyperparameters" in read_pair(stem)[0]])
def test_golden_numbers(stem: str) -> None:
    check_golden_pair(stem, "triton", "float64")


@pytest.mark.parametrize(
    ("blocks", "activation", "deterministic"),
    [(1, "none", True), (1, "gelu", False), (3, "gelu", True), (3, "none", False)],
)
def test_lookup_equals_reference(blocks: int, activation: str, deterministic: bool) -> None:
    check_equal_to_reference(activation, deterministic, blocks=blocks)


@pytest.mark.parametrize("blocks", [1, 4])
def test_lookup_without_pre_values(blocks: int) -> None:
    check_equal_to_reference(blocks=blocks, pre_columns=None)


@pytest.mark.parametrize(
    "sizes",
    [
        {"picks": 1, "cores": 1, "pre_columns": 1, "columns": 1},
        {"picks": 3, "cores": 3, "pre_columns": 24, "columns": 6},
        {"tokens": 1, "picks": 9, "cores": 5, "pre_columns": 3, "columns": 15, "rows": 1},  # one row, picked 9 times
        {"tokens": 3, "picks": 16, "cores": 2, "pre_columns": 16, "columns": 32},
    ],
)
def test_sizes_that_are_no_powers_of_two(sizes: dict[str, int]) -> None:
    check_equal_to_reference(**sizes)


@pytest.mark.parametrize(("blocks", "widest"), [(1, 16), (1, 4), (2, 4)])
def test_many_small_tiles(blocks: int, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of picks; with WIDEST_ROW 4 rows are cut into stretches of columns and nothing is fused; rows
    with more picks than a piece."""
    monkeypatch.setattr(triton_launch, "TILE_ELEMENTS", 32)
    monkeypatch.setattr(triton_launch, "WIDEST_ROW", widest)
    monkeypatch.setattr(triton_launch, "SEGMENTS", 2)
    monkeypatch.setattr(triton_launch, "SEARCH_SPAN", 8)
    monkeypatch.setattr(triton_launch, "PIECE", 4)
    check_equal_to_reference("gelu", tokens=2, picks=7, rows=3, columns=12, blocks=blocks)


@pytest.mark.parametrize(
    ("tokens", "in_program", "tile_elements", "sizes"),
    [
        (1, 4, 512, {"picks": 3}),  # fewer tokens than a program takes
        (7, 4, 512, {"picks": 3}),
        (9, 2, 512, {"picks": 8, "blocks": 3}),
        (5, 2, 1024, {"picks": 5, "cores": 3, "pre_columns": 3, "columns": 9}),
        (5, 4, 1024, {"picks": 3, "pre_columns": 16, "columns": 4}),  # pre-values set the limit
        (5, 8, 512, {"picks": 2, "pre_columns": None}),
        (3, 1, 256, {"picks": 40}),  # two tiles of one token
    ],
)
def test_several_tokens_in_a_program(
    tokens: int, in_program: int, tile_elements: int, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    launch = triton_launch.launch

    def noted(kernel: Any, grid: tuple[int, ...], tensors: Any, constants: Any, warps: int) -> None:
        if "TOKENS" in constants:
            seen.append((constants["TOKENS"], grid[0]))
        launch(kernel, grid, tensors, constants, warps)

    monkeypatch.setattr(triton_launch, "launch", noted)
    monkeypatch.setattr(triton_launch, "TILE_ELEMENTS", tile_elements)
    check_equal_to_reference("gelu" if sizes.get("pre_columns", 1) else "none", tokens=tokens, **sizes)
    assert seen == [(in_program, -(-tokens // in_program))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_has_the_same_bits_in_any_program(dtype: torch.dtype) -> None:
    """Alone, and among others that share its program."""
    arguments = make(tokens=5, picks=6, dtype=dtype)
    together = triton_lookup.lookup(**arguments, activation="none")
    for token in range(5):
        alone = {
            name: each[token : token + 1] if name in ("rows", "scores", "projected") else each
            for name, each in arguments.items()
        }
        assert torch.equal(triton_lookup.lookup(**alone, activation="none")[0], together[token])


def test_picks_are_sorted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead, or in the backward; once for both tables also where their backwards are separate; the same bits."""
    sorts: list[int] = []
    sort = triton_launch.sort_picks
    monkeypatch.setattr(triton_launch, "sort_picks", lambda *args: sorts.append(1) or sort(*args))
    found, ahead = make(dtype=torch.float32), make(dtype=torch.float32)
    triton_lookup.lookup(**found, activation="none").sum().backward()
    order = PickOrder()
    out = triton_lookup.lookup(**ahead, activation="none", order=order)
    triton_lookup.sort_ahead(ahead["rows"], 7, order)
    assert len(sorts) == 2 and order.made is not None
    kept = weakref.ref(order)
    del order
    loss = out.sum()
    loss.backward()
    assert len(sorts) == 2 and kept() is None, "the graph keeps the sorted picks of all layers into the next forward"
    for name, grad in gradients(found).items():
        assert torch.equal(grad, gradients(ahead)[name]), name
    sorts.clear()
    table, other, picked = found["values"].detach(), found["pre_values"].detach(), found["rows"]
    grad_out, rho, projected = torch.ones(5, 1, 8), torch.ones(5, 6), found["projected"].detach()
    order = PickOrder()
    triton_lookup.weighted_sum_backward(picked, None, torch.ones(5, 6, 2), grad_out, table, table.clone(), order)
    triton_lookup.pre_scores_backward(picked, rho, projected, other, other.clone(), order)
    assert len(sorts) == 1
    listed = ListedPicks(picked.flatten(), torch.arange(5).repeat_interleave(6), torch.full((5,), 6))
    triton_ragged.weighted_sum_backward(listed, torch.ones(30, 2), grad_out, table, table.clone())
    triton_ragged.pre_scores_backward(listed, rho.flatten(), projected, other, other.clone())
    assert len(sorts) == 2


def test_rows_picked_far_more_often_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 picks in pieces of 2: one row takes them all, or all but a few at either end."""
    monkeypatch.setattr(triton_launch, "PIECE", 2)
    for edge in (0, 1, 2):
        rows = torch.ones(3, 5, dtype=torch.int64)
        rows.view(-1)[:edge] = 0
        rows.view(-1)[15 - edge :] = 2
        found, expected = make(tokens=3, picks=5), make(tokens=3, picks=5)
        triton_lookup.lookup(**{**found, "rows": rows}, activation="none").sum().backward()
        reference.lookup(**{**expected, "rows": rows}, activation="none").sum().backward()
        for name, grad in gradients(expected).items():
            torch.testing.assert_close(gradients(found)[name], grad, msg=f"{name}, {edge}", **TIGHT)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_with_main_grad(dtype: torch.dtype, deterministic: bool) -> None:
    """Sums in float32: only the output is rounded. main_grad keeps what it had, and two uses of a table add up."""
    found, exact = make(tokens=3, picks=4, rows=4, dtype=dtype), {}
    unit = max(torch.finfo(dtype).eps, 1e-6)
    for name, each in found.items():
        leaf = isinstance(each, Tensor) and each.requires_grad
        exact[name] = each.detach().double().requires_grad_() if leaf else each
    tables = [found["pre_values"], found["values"]]
    for table in tables:
        table.main_grad = torch.full(table.shape, 0.25)
    for arguments, lookup in ((found, triton_lookup.lookup), (exact, reference.lookup)):
        extra = {"deterministic": deterministic} if arguments is found else {}
        first = lookup(**arguments, activation="none", **extra)
        second = lookup(**{**arguments, "rows": arguments["rows"].flip(0)}, activation="gelu", **extra)
        if arguments is found:
            assert first.dtype == dtype
            out = first.detach()
        else:
            torch.testing.assert_close(out.double(), first.detach(), rtol=2 * unit, atol=2 * unit)
        (first + second).backward(torch.ones_like(first))  # ones are exact in every dtype
    for name in ("values", "pre_values"):
        assert found[name].grad_added_to_main_grad and found[name].grad.untyped_storage().nbytes() <= 8
        torch.testing.assert_close(found[name].main_grad.double() - 0.25, exact[name].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["scores"].grad.double(), exact["scores"].grad, rtol=1e-5, atol=1e-5)
    scale = exact["projected"].grad.abs().max().item()  # two uses, each rounded, and their sum
    torch.testing.assert_close(
        found["projected"].grad.double(), exact["projected"].grad, rtol=2 * unit, atol=2 * unit * scale
    )


@pytest.mark.parametrize("deterministic", [True, False])
def test_half_tables_without_main_grad(deterministic: bool) -> None:
    """Gradients go to autograd in the dtype of the tables."""
    found, exact = make(dtype=torch.bfloat16), make(dtype=torch.bfloat16)
    triton_lookup.lookup(**found, activation="none", deterministic=deterministic).sum().backward()
    doubles = {}
    for name, each in exact.items():
        leaf = isinstance(each, Tensor) and each.requires_grad
        doubles[name] = each.detach().double().requires_grad_() if leaf else each
    reference.lookup(**doubles, activation="none").sum().backward()
    for name in ("values", "pre_values"):
        assert found[name].grad.dtype == torch.bfloat16
        torch.testing.assert_close(found[name].grad.double(), doubles[name].grad, rtol=0.01, atol=0.01)


def test_no_tokens_and_frozen_tables() -> None:
    empty = make(tokens=0)
    out = triton_lookup.lookup(**empty, activation="none")
    out.sum().backward()
    assert out.shape == (0, 8) and not empty["values"].grad.any() and empty["scores"].grad.shape == (0, 6, 2)
    frozen = make()
    frozen["values"].requires_grad_(False)
    frozen["projected"].requires_grad_(False)
    triton_lookup.lookup(**frozen, activation="none").sum().backward()
    assert frozen["values"].grad is None and frozen["projected"].grad is None
    assert frozen["pre_values"].grad is not None and frozen["scores"].grad is not None


def test_offsets_beyond_32_bits() -> None:
    """A table of 2^32 elements, of which a few pages are touched: rows beyond element 2^31 are read and added to."""
    rows, columns = 1 << 22, 1024
    table = torch.empty(rows, columns, dtype=torch.bfloat16)
    total = torch.empty(rows, columns, dtype=torch.bfloat16)
    picked = torch.tensor([[rows - 1, (1 << 21) + 3], [5, rows - 1]])
    for row in picked.flatten():
        table[row], total[row] = float(row % 7), 0.0
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).unsqueeze(-1)
    out = triton_lookup.weighted_sum(picked, None, weights, table, 1)
    expected = (weights.squeeze(-1) * (picked % 7)).sum(1)
    torch.testing.assert_close(out.float(), expected.unsqueeze(-1).expand(-1, columns))
    upstream = torch.tensor([[[1.0]], [[10.0]]]).expand(-1, 1, columns).bfloat16()
    dots = triton_lookup.weighted_sum_backward(picked, None, weights, upstream, table, total)
    torch.testing.assert_close(dots.squeeze(-1), (picked % 7) * columns * torch.tensor([[1.0], [10.0]]))
    assert (total[rows - 1] == 41).all() and (total[(1 << 21) + 3] == 2).all() and (total[5] == 30).all()


@pytest.mark.parametrize(("blocks", "deterministic"), [(1, True), (3, True), (3, False)])
def test_parts_on_a_grid_equal_scatter(blocks: int, deterministic: bool) -> None:
    arguments = make(blocks=blocks)
    rows, block, values, pre_values = (arguments[name] for name in ("rows", "blocks", "values", "pre_values"))
    projected, weights = arguments["projected"].detach(), arguments["scores"].detach()
    grad_out = torch.randn(5, blocks, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for parts, extra in ((scatter, {}), (triton_lookup, {"deterministic": deterministic})):
        value_sum, pre_value_sum = torch.ones_like(values), torch.ones_like(pre_values)
        rho = parts.pre_scores(rows, projected, pre_values, torch.float64)
        results.append([
            rho,
            parts.weighted_sum(rows, block, weights, values, blocks),
            parts.weighted_sum_backward(rows, block, weights, grad_out, values, value_sum, **extra),
            parts.pre_scores_backward(rows, rho, projected, pre_values, pre_value_sum, **extra),
            value_sum.detach(), pre_value_sum.detach(),
        ])  # fmt: skip
    for found, expected in zip(results[1], results[0]):
        torch.testing.assert_close(found, expected.detach(), **TIGHT)


@pytest.mark.parametrize(("blocks", "deterministic"), [(1, True), (3, True), (3, False)])
def test_parts_on_a_list_equal_ragged(blocks: int, deterministic: bool) -> None:
    """Tokens with no pick, with one and with many."""
    counts = torch.tensor([0, 3, 0, 1, 19, 0])
    tokens = torch.arange(6).repeat_interleave(counts)
    arguments = make(tokens=6, picks=23, blocks=blocks)
    rows = arguments["rows"][0]
    block = arguments["blocks"][0] if blocks > 1 else None
    picks = ListedPicks(rows, tokens, counts, block, blocks)
    weights, projected = arguments["scores"][0].detach(), arguments["projected"].detach()
    values, pre_values = arguments["values"], arguments["pre_values"]
    grad_out = torch.randn(6, blocks, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for parts, extra in ((ragged, {}), (triton_ragged, {"deterministic": deterministic})):
        value_sum, pre_value_sum = torch.ones_like(values), torch.ones_like(pre_values)
        rho = parts.pre_scores(picks, projected, pre_values, torch.float64)
        results.append([
            rho,
            parts.weighted_sum(picks, weights, values),
            parts.weighted_sum_backward(picks, weights, grad_out, values, value_sum, **extra),
            parts.pre_scores_backward(picks, rho, projected, pre_values, pre_value_sum, **extra),
            value_sum.detach(), pre_value_sum.detach(),
        ])  # fmt: skip
    for found, expected in zip(results[1], results[0]):
        torch.testing.assert_close(found, expected.detach(), **TIGHT)
    none = ListedPicks(rows[:0], rows[:0], torch.zeros_like(counts), block[:0] if block is not None else None, blocks)
    out = triton_ragged.weighted_sum(none, weights[:0], values)
    assert out.shape == (6, blocks * 8) and not out.any()
    assert not triton_ragged.pre_scores_backward(none, rows[:0].double(), projected, pre_values, None).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_search_among_scores_of_16_bits(dtype: torch.dtype) -> None:
    """The same picks, scores and gradients to the bit as with float32 copies of them."""
    g = torch.Generator().manual_seed(11)
    half = torch.randn(2, 2, 3, 2, 20, generator=g).to(dtype)
    u, t = torch.randn(2, 2, 2, generator=g)
    cores = torch.randn(2, 2, 2, 2, generator=g)
    results = []
    for scores in (half.clone().requires_grad_(), half.float().requires_grad_()):
        keys = triton_search.best_keys(scores, u, t, 6)
        rows, columns = triton_search.best_cells(scores, keys, cores.sum(0), 8)
        picked = triton_search.cell_scores(scores, rows, columns, cores)
        (grad,) = torch.autograd.grad(picked.square().sum(), scores)
        results.append((keys, rows, columns, picked.detach(), grad.to(dtype)))
    assert results[0][3].dtype == torch.float32
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


@pytest.mark.parametrize("cores", [1, 2])
def test_columns_that_fit_the_cache_are_read_in_turn(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of 1,100 bytes: results are the same; programs of a stretch load no more of the table than that,
    the same columns of every row, and start before those of the next stretch, whose number is the slowest index."""
    monkeypatch.setattr(triton_launch, "LEAST_BYTES", 16)
    g = torch.Generator().manual_seed(7)
    tokens, rows, columns = 12, 8, 96
    counts = torch.randint(0, 6, (tokens,), generator=g)
    owners = torch.arange(tokens).repeat_interleave(counts)
    total = int(counts.sum())
    assert total >= triton_launch.REUSED * rows
    picks = ListedPicks(torch.randint(0, rows, (total,), generator=g), owners, counts)
    table = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    upstream = torch.randn(tokens, columns, generator=g, dtype=torch.float64)
    weights = torch.randn(total, cores, generator=g, dtype=torch.float64)

    def both() -> tuple[Tensor, Tensor]:
        dots = triton_launch.row_dots(triton_ragged._rows(picks), upstream, table, cores, torch.float64)
        return triton_ragged.weighted_sum(picks, weights, table), dots

    expected = both()
    grids: dict[str, tuple] = {}
    seen: dict[tuple[str, int], set[int]] = {}
    load, launch, now = builder.create_masked_load, triton_launch.launch, [""]
    first, last = table.data_ptr(), table.data_ptr() + table.nbytes

    def counted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        active = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
        stretch = builder.grid_idx[{"row_sums": 2, "row_dots": 1}[now[0]]]
        seen.setdefault((now[0], stretch), set()).update(int(x) for x in active.flat if first <= x < last)
        return load(ptrs, mask, *rest)

    def noted(kernel: Any, grid: tuple, *rest: Any) -> None:
        now[0] = kernel.fn.__name__
        grids[now[0]] = grid
        launch(kernel, grid, *rest)

    monkeypatch.setattr(triton_launch, "cache_bytes", lambda _: 1100)
    monkeypatch.setattr(triton_launch, "launch", noted)
    monkeypatch.setattr(builder, "create_masked_load", counted_load, raising=False)
    found = both()
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    stretches = {"row_sums": grids["row_sums"][2], "row_dots": grids["row_dots"][1]}
    picked = picks.rows.unique().numel()
    for name, count in stretches.items():
        assert count == 96 // 16
        parts = [seen[name, stretch] for stretch in range(count)]
        assert all(8 * len(part) <= 1100 for part in parts)
        assert sum(map(len, parts)) == len(set().union(*parts)) == picked * columns, "each element in one stretch"


def test_which_sums_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by default; atomic where asked for, unless torch is told to be deterministic (--deterministic-mode)."""
    names: list[str] = []
    monkeypatch.setattr(triton_launch, "launch", lambda kernel, *unused: names.append(kernel.fn.__name__))

    def kernels_of(lookup: Any) -> set[str]:
        names.clear()
        lookup(**make(), activation="none").sum().backward()
        return set(names)

    in_order = {"fused_forward", "row_dots", "find_segments", "add_to_rows"}
    assert kernels_of(triton_lookup.lookup) == in_order
    assert kernels_of(triton_lookup.atomic_lookup) == {"fused_forward", "row_dots", "atomic_add_to_rows"}
    torch.use_deterministic_algorithms(True)
    try:
        assert kernels_of(triton_lookup.atomic_lookup) == in_order
    finally:
        torch.use_deterministic_algorithms(False)


def sorted_cells(
    key_scores: Tensor, u: Tensor, t: Tensor, kept: int, cores: Tensor, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The two stages by stable sorts, which keep the smaller index first."""
    summed = [torch.einsum("hr,rthn->thn", vector, key_scores[side]) for side, vector in enumerate((u, t))]
    order = [torch.sort(each, dim=-1, descending=True, stable=True).indices[..., :kept] for each in summed]
    picked = [key_scores[side].gather(-1, order[side].expand(key_scores.shape[1], -1, -1, -1)) for side in (0, 1)]
    grid = torch.einsum("rthi,hrs,sthj->thij", picked[0], cores, picked[1]).flatten(2)
    best = torch.sort(grid, dim=-1, descending=True, stable=True).indices[..., :topk]
    return torch.stack(order), order[0].gather(-1, best // kept), order[1].gather(-1, best % kept)


@pytest.mark.parametrize(
    ("rank", "heads", "keys", "kept", "topk", "span"),
    [(2, 1, 11, 5, 7, 8), (3, 2, 6, 3, 9, 4), (1, 1, 5, 5, 1, 1024)],
)
def test_best_cells_with_many_ties(
    rank: int, heads: int, keys: int, kept: int, topk: int, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small integers: sums are exact and ties are everywhere, so the rule for ties decides most places."""
    monkeypatch.setattr(triton_topk, "SPAN", span)
    g = torch.Generator().manual_seed(keys)
    key_scores = torch.randint(-3, 4, (2, rank, 2, heads, keys), generator=g).float()
    key_scores[key_scores == 0] = -0.0
    u, t = (torch.randint(-2, 3, (heads, rank), generator=g).float() for _ in range(2))
    cores = torch.randint(-2, 3, (heads, rank, rank), generator=g).float()
    expected_keys, expected_rows, expected_columns = sorted_cells(key_scores, u, t, kept, cores, topk)
    found = triton_topk.best_keys(key_scores, u, t, kept)
    assert torch.equal(found, expected_keys)
    rows, columns = triton_topk.best_cells(key_scores, found, cores, topk)
    assert torch.equal(rows, expected_rows) and torch.equal(columns, expected_columns)


def test_best_cells_of_no_tokens_and_of_nan() -> None:
    key_scores = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]).expand(2, 1, 1, 1, 4)
    ones = torch.ones(1, 1)
    assert triton_topk.best_keys(key_scores, ones, ones, 4).flatten().tolist() == [1, 2, 0, 3] * 2
    empty = key_scores[:, :, :0]
    keys = triton_topk.best_keys(empty, ones, ones, 2)
    assert triton_topk.best_cells(empty, keys, ones.unsqueeze(0), 3)[0].shape == (0, 1, 3)

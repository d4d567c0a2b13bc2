"""The two-stage search of every backend that runs on a CPU, against sorting all keys and all cells."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umv2_megatron.ops import get_backend
from umv2_megatron.ops.interface import Search

BACKENDS = ("reference", "cpu")
CASES = [
    # R, h, N, K', K: one rank, several heads, everything kept, more cells than candidates are counted, the cap
    (1, 1, 5, 5, 25),
    (2, 1, 360, 32, 32),
    (2, 3, 40, 7, 11),
    (3, 2, 130, 130, 200),
    (2, 1, 300, 128, 768),
]


def search_of(name: str) -> Search:
    return get_backend(name, "cpu").search


def inputs(rank: int, heads: int, keys: int, dtype: torch.dtype, whole: bool = False) -> tuple[Tensor, ...]:
    """Key scores, u, t and two cores; ``whole`` numbers make ties."""
    g = torch.Generator().manual_seed(rank * 1000 + heads * 100 + keys)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randint(-3, 4, shape, generator=g) if whole else torch.randn(shape, generator=g)
        return drawn.to(dtype)

    return draw(2, rank, 37, heads, keys), draw(heads, rank), draw(heads, rank), draw(2, heads, rank, rank)


def sorted_search(key_scores: Tensor, u: Tensor, t: Tensor, cores: Tensor, kept: int, topk: int) -> tuple[Tensor, ...]:
    """Keys, rows and columns by stable sorts: of equals the first place wins."""
    summed = torch.stack([torch.einsum("hr,rthn->thn", v, s) for v, s in zip((u, t), key_scores)])
    keys = summed.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    left, right = (s.gather(-1, k.expand(s.shape[0], -1, -1, -1)) for s, k in zip(key_scores, keys))
    grid = torch.einsum("rthi,hrs,sthj->thij", left, cores.sum(0), right).flatten(2)
    cells = grid.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return keys, keys[0].gather(-1, cells // kept), keys[1].gather(-1, cells % kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "heads", "keys", "kept", "topk"), CASES)
def test_picks_are_those_of_a_full_sort(
    backend: str, dtype: torch.dtype, rank: int, heads: int, keys: int, kept: int, topk: int
) -> None:
    key_scores, u, t, cores = inputs(rank, heads, keys, dtype)
    search = search_of(backend)
    # Float32 sums in another order may change places with a neighbour: rank by float64, where no two are that near.
    exact = [tensor.double() for tensor in (key_scores, u, t, cores)]
    expected = sorted_search(*exact, kept, topk)
    found = search.best_keys(key_scores, u, t, kept)
    rows, columns = search.best_cells(key_scores, expected[0], cores.sum(0), topk)
    for one, other in zip((found, rows, columns), expected):
        different = (one != other).float().mean()
        assert different <= (0.002 if dtype == torch.float32 else 0.0), different


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "heads", "keys", "kept", "topk"), CASES)
def test_the_compiled_search_breaks_ties_by_place(
    dtype: torch.dtype, rank: int, heads: int, keys: int, kept: int, topk: int
) -> None:
    key_scores, u, t, cores = inputs(rank, heads, keys, dtype, whole=True)
    key_scores[key_scores == 0] = -0.0
    search = search_of("cpu")
    expected = sorted_search(key_scores, u, t, cores, kept, topk)
    found = search.best_keys(key_scores, u, t, kept)
    rows, columns = search.best_cells(key_scores, found, cores.sum(0), topk)
    assert torch.equal(found, expected[0]) and torch.equal(rows, expected[1]) and torch.equal(columns, expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiled_search_with_scores_that_are_no_numbers(dtype: torch.dtype) -> None:
    infinity, nan = float("inf"), float("nan")
    ones = torch.ones(1, 1, dtype=dtype)
    scores = torch.tensor([1.0, nan, infinity, -infinity, nan, 1.0] + [-1.0] * 20, dtype=dtype)
    found = search_of("cpu").best_keys(scores.expand(2, 1, 1, 1, 26).contiguous(), ones, ones, 6)
    assert found.flatten().tolist() == [1, 4, 2, 0, 5, 6] * 2
    flat = torch.full((2, 1, 3, 1, 26), -infinity, dtype=dtype)
    assert search_of("cpu").best_keys(flat, ones, ones, 2).flatten().tolist() == [0, 1] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", ["alike", "heavy", "rising", "falling", "few", "blocks", "no numbers", "infinite"])
def test_the_compiled_selection_of_scores_of_any_distribution(shape: str, dtype: torch.dtype) -> None:
    # Lengths around whole vectors; kept so that groups of scores are compared first, or not. "blocks": all of the best
    # are in a few groups, so that many reach what the groups suggest.
    g = torch.Generator().manual_seed(1)
    for length in (1, 15, 16, 17, 31, 64, 65, 255, 360, 1024, 1031):
        scores = torch.randn(2, 1, 9, 1, length, generator=g, dtype=torch.float64).to(dtype)
        if shape == "heavy":
            scores = scores.exp().pow(8)
        elif shape in ("rising", "falling"):
            scores = scores.sort(dim=-1, descending=shape == "falling").values.contiguous()
        elif shape == "few":
            scores = scores.round()
        elif shape == "blocks":
            scores += 100.0 * (torch.arange(length) % 16 < 2)
        elif shape in ("no numbers", "infinite"):
            wild = torch.tensor([float("nan")] if shape == "no numbers" else [float("inf"), -float("inf")], dtype=dtype)
            places = torch.randint(0, length, (max(1, length // 9),), generator=g)
            scores[..., places] = wild[places % len(wild)]
        # NaN is the largest, also for torch
        expected = scores.sort(dim=-1, descending=True, stable=True).indices
        for kept in sorted({1, min(7, length), min(32, length), min(130, length), length}):
            found = search_of("cpu").best_keys(scores, *torch.ones(2, 1, 1, dtype=dtype), kept)
            assert torch.equal(found, expected[:, 0, ..., :kept]), (length, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rank", "heads", "keys", "kept", "topk"), CASES)
def test_scores_and_gradients_of_the_picked_cells(
    backend: str, rank: int, heads: int, keys: int, kept: int, topk: int
) -> None:
    key_scores, u, t, cores = inputs(rank, heads, keys, torch.float64)
    rows, columns = sorted_search(key_scores, u, t, cores, kept, topk)[1:]
    upstream = torch.randn(*rows.shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def plain(scores: Tensor, matrices: Tensor) -> Tensor:
        left, right = (s.gather(-1, i.expand(rank, -1, -1, -1)) for s, i in zip(scores, (rows, columns)))
        return torch.einsum("rthk,chrs,sthk->thkc", left, matrices, right)

    results = []
    for function in (plain, lambda s, m: search_of(backend).cell_scores(s, rows, columns, m)):
        leaves = [key_scores.clone().requires_grad_(), cores.clone().requires_grad_()]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_compiled_search_is_the_same_on_any_number_of_threads() -> None:
    key_scores, u, t, cores = inputs(2, 2, 200, torch.float32)
    search, threads, results = search_of("cpu"), torch.get_num_threads(), []
    upstream = torch.randn(37, 2, 16, 2, generator=torch.Generator().manual_seed(0))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [key_scores.clone().requires_grad_(), cores.clone().requires_grad_()]
            keys = search.best_keys(key_scores, u, t, 20)
            rows, columns = search.best_cells(key_scores, keys, cores.sum(0), 16)
            scores = search.cell_scores(leaves[0], rows, columns, leaves[1])
            results.append([keys, rows, columns, scores, *torch.autograd.grad(scores, leaves, upstream)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    search, ones = search_of(backend), torch.ones(1, 2)
    empty = torch.empty(2, 2, 0, 1, 9, requires_grad=True)
    keys = search.best_keys(empty, ones, ones, 4)
    rows, columns = search.best_cells(empty, keys, torch.ones(1, 2, 2), 3)
    scores = search.cell_scores(empty, rows, columns, torch.ones(2, 1, 2, 2))
    scores.sum().backward()
    assert keys.shape == (2, 0, 1, 4) and rows.shape == (0, 1, 3) and scores.shape == (0, 1, 3, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scores_of_all_keys_are_not_kept_for_the_backward(backend: str) -> None:
    key_scores, u, t, cores = inputs(2, 1, 360, torch.float32)
    search, kept = search_of(backend), []
    leaf = key_scores.clone().requires_grad_()
    keys = search.best_keys(leaf, u, t, 8)
    rows, columns = search.best_cells(leaf, keys, cores.sum(0), 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        search.cell_scores(leaf, rows, columns, cores.requires_grad_())
    assert max(kept) < key_scores.numel() / 4

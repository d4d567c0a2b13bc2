"""Retrieval in one piece on CPUs against its steps in float64: key scores, search, scores of the picks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.key_scores import key_scores
from umv2_megatron.memory.retrieval import Retrieval
from umv2_megatron.ops import cpu_retrieval, get_backend, search

EPSILON = 1e-3
CASES = [
    # T, h, N, Dk, R, R', K', K: sizes of umv2-227m; odd ones; one query for all ranks; many candidates; one of each
    (150, 1, 360, 192, 2, 2, 32, 32),
    (53, 3, 41, 19, 3, 3, 7, 11),
    (70, 2, 50, 100, 2, 1, 16, 20),
    (130, 1, 200, 32, 1, 1, 60, 300),
    (3, 1, 1, 5, 1, 1, 1, 1),
]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(tokens: int, heads: int, keys: int, dim: int, rank: int, queries: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(tokens + keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "query": normal(tokens, 2, queries, dim),
        "keys": normal(heads, 2, keys, dim, rank),
        "query_gain": 1 + 0.1 * normal(dim),
        "key_gain": 1 + 0.1 * normal(dim),
        "u": normal(heads, rank),
        "t": normal(heads, rank),
        "cores": normal(2, heads, rank, rank),
    }


def in_one_piece(x: dict[str, Tensor], kept: int, topk: int) -> tuple[Tensor, Tensor]:
    return cpu_retrieval.retrieve(
        x["query"], x["keys"], x["query_gain"], x["key_gain"], EPSILON, x["u"], x["t"], x["cores"], kept, topk
    )


LEAVES = ("query", "keys", "query_gain", "key_gain", "cores")


def with_grads(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.clone().requires_grad_(name in LEAVES) for name, each in x.items()}


@pytest.mark.parametrize(("tokens", "heads", "keys", "dim", "rank", "queries", "kept", "topk"), CASES)
def test_picks_scores_and_gradients(
    threads: int, tokens: int, heads: int, keys: int, dim: int, rank: int, queries: int, kept: int, topk: int
) -> None:
    x = draw(tokens, heads, keys, dim, rank, queries)
    ours, exact = with_grads(x), with_grads({name: each.double() for name, each in x.items()})
    grid, scores = in_one_piece(ours, kept, topk)
    every = key_scores(exact["query"], exact["keys"], exact["query_gain"], exact["key_gain"], EPSILON)
    every = every.view(2, rank, tokens, heads, keys)
    chosen = search.best_keys(every, exact["u"], exact["t"], kept)
    rows, columns = search.best_cells(every, chosen, exact["cores"].detach().sum(0), topk)
    # Float32 may change places with a neighbour.
    assert (grid != rows * keys + columns).float().mean() <= 0.002
    expected = search.cell_scores(every, grid // keys, grid % keys, exact["cores"])
    assert (scores - expected).abs().max() <= 5e-6 * expected.abs().max()
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(scores, [ours[name] for name in LEAVES], upstream)
    wanted = torch.autograd.grad(expected, [exact[name] for name in LEAVES], upstream.double())
    for name, one, other in zip(LEAVES, found, wanted):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max() + 1e-12, name


def test_the_same_bits_on_any_number_of_threads() -> None:
    x, before, results = draw(300, 2, 90, 48, 2, 2), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = with_grads(x)
            grid, scores = in_one_piece(leaves, 12, 20)
            grads = torch.autograd.grad(scores.square().sum(), [leaves[name] for name in LEAVES])
            results.append([grid, scores, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_of_equal_scores_the_smaller_key_wins_and_of_equal_cells_the_smaller_place() -> None:
    x = draw(5, 1, 9, 4, 1, 1)
    x["keys"][:] = x["keys"][:, :, :1]
    x["u"][:], x["t"][:], x["cores"][:] = 1, 1, 1
    grid, _ = in_one_piece(x, 3, 5)
    assert grid.tolist() == [[[0, 1, 2, 9, 10]]] * 5


def test_no_tokens() -> None:
    leaves = with_grads(draw(0, 2, 9, 4, 2, 2))
    grid, scores = in_one_piece(leaves, 3, 4)
    scores.sum().backward()
    assert grid.shape == (0, 2, 4) and scores.shape == (0, 2, 4, 2) and leaves["keys"].grad.abs().sum() == 0


def test_what_is_kept_for_the_backward_is_small() -> None:
    leaves, kept = with_grads(draw(256, 1, 360, 192, 2, 2)), []
    own = {leaves[name].data_ptr() for name in LEAVES}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(0 if x.data_ptr() in own else x.numel() * x.element_size()) or x, lambda x: x
    ):
        in_one_piece(leaves, 32, 32)
    assert sum(kept) <= 256 * 32 * (2 * 4 + 4 * 4) + 192 * 4 * 3


@pytest.mark.parametrize("reason", ["dtype", "autocast", "balance loss", "backend", "nothing"])
def test_when_a_layer_takes_it(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"balance_loss_coeff": 0.1} if reason == "balance loss" else {}
    backend = "scatter" if reason == "backend" else "cpu"
    config = MemoryConfig(num_keys=8, key_dim=8, value_dim=8, pre_value_dim=4, topk=4, backend=backend, **options)
    layer = Retrieval(config, 16, 8)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.refresh_singular_vectors()
    if reason == "dtype":
        layer.double()
    calls = []
    assert get_backend("cpu", "cpu").retrieve is cpu_retrieval.retrieve
    plain = layer.key_scores
    monkeypatch.setattr(layer, "key_scores", lambda x, **how: calls.append(1) or plain(x, **how))
    with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        picks = layer(torch.randn(6, 16, dtype=torch.float64 if reason == "dtype" else torch.float32))
    assert picks.grid.shape == (6, 4) and bool(calls) == (reason != "nothing")

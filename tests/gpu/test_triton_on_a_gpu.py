"""The Triton backend on a real GPU, at the sizes of models: against the reference in float64, bit by bit, in a graph.

Run by `make test-gpu`; skipped where there is no CUDA device. The same kernels run everywhere under the interpreter
(tests/unit/ops/triton_interpreted.py), on small shapes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
pytest.importorskip("triton", reason="triton is not installed")

from umv2_megatron.ops import (  # noqa: E402
    ragged,
    reference,
    scatter,
    triton_launch,
    triton_lookup,
    triton_ragged,
    triton_topk,
)
from umv2_megatron.ops.interface import ListedPicks  # noqa: E402

DEVICE = "cuda"
SIZES = {  # tokens, picks, rows, Dp, Dv, cores, blocks
    "umv2-227m": (512, 32, 20000, 192, 192, 2, 1),
    "umv2-1b": (96, 128, 20000, 384, 768, 2, 1),
    "few columns": (256, 32, 20000, 24, 24, 2, 1),
    "v1": (96, 80, 20000, 8, 384, 2, 4),
    "odd": (77, 47, 1000, 37, 105, 3, 1),
    "wide": (40, 9, 1000, 3000, 4100, 2, 1),
}


def make(size: str, dtype: torch.dtype, rows_to_pick: int = 0) -> dict[str, Any]:
    """Arguments of a lookup; picks among the first ``rows_to_pick`` rows, 0 for all."""
    tokens, picks, rows, pre_columns, columns, cores, blocks = SIZES[size]
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    def whole(below: int) -> Tensor:
        return torch.randint(0, below, (tokens, picks), generator=g).to(DEVICE)

    exact = dtype if dtype == torch.float64 else torch.float32
    return {
        "rows": whole(rows_to_pick or rows),
        "blocks": whole(blocks) if blocks > 1 else None,
        "scores": rand(tokens, picks, cores).to(exact).requires_grad_(),
        "projected": (rand(tokens, pre_columns) / pre_columns**0.5).requires_grad_(),
        "pre_values": torch.nn.Parameter(rand(rows, pre_columns)),
        "values": torch.nn.Parameter(rand(rows, columns)),
        "num_blocks": blocks,
    }


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: each.detach().double().requires_grad_() if isinstance(each, Tensor) and each.is_floating_point() else each
        for name, each in arguments.items()
    }


def with_main_grad(arguments: dict[str, Any]) -> list[Tensor]:
    tables = [arguments["pre_values"], arguments["values"]]
    for table in tables:
        table.main_grad = torch.zeros(table.shape, device=DEVICE)
    return [table.main_grad for table in tables]


def close(found: Tensor, expected: Tensor, unit: float) -> None:
    scale = expected.abs().max().item()
    assert (found.double() - expected).abs().max().item() <= unit * scale


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_lookup_equals_reference(size: str, dtype: torch.dtype, deterministic: bool) -> None:
    found = make(size, dtype, rows_to_pick=300)
    exact = in_double(found)
    sums = with_main_grad(found)
    out = triton_lookup.lookup(**found, activation="gelu", deterministic=deterministic)
    expected = reference.lookup(**exact, activation="gelu")
    close(out, expected, 1e-5 + torch.finfo(dtype).eps)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    close(sums[0], exact["pre_values"].grad, 2e-5)
    close(sums[1], exact["values"].grad, 2e-5)
    close(found["scores"].grad, exact["scores"].grad, 2e-5)
    close(found["projected"].grad, exact["projected"].grad, 2e-5 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("rows_to_pick", [1, 2, 300, 20000])
def test_gradients_are_repeatable_bit_by_bit(rows_to_pick: int) -> None:
    """Also where one row is picked by everybody."""
    results = []
    for _ in range(5):
        arguments = make("umv2-227m", torch.bfloat16, rows_to_pick)
        sums = with_main_grad(arguments)
        out = triton_lookup.lookup(**arguments, activation="none")
        out.backward(torch.ones_like(out))
        results.append([out.detach(), *sums, arguments["scores"].grad, arguments["projected"].grad])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other))


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_cuda_graph_replays_forward_and_backward(deterministic: bool) -> None:
    """Captured once, replayed on other picks: the same as without a graph. Capturing a host synchronisation raises."""
    arguments = make("umv2-227m", torch.bfloat16)
    sums = with_main_grad(arguments)
    inputs = [arguments["scores"], arguments["projected"]]

    def step() -> list[Tensor]:
        for each in inputs:
            each.grad = None
        out = triton_lookup.lookup(**arguments, activation="none", deterministic=deterministic)
        out.float().square().sum().backward()
        return [out.detach(), *[each.grad for each in inputs]]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    arguments["rows"].copy_(arguments["rows"].flip(0))
    for each in sums:
        each.zero_()
    graph.replay()
    replayed = [each.clone() for each in (*captured, *sums)]
    for each in sums:
        each.zero_()
    expected = [*step(), *sums]
    for found, wanted in zip(replayed, expected):
        close(found, wanted.double(), 1e-5 if not deterministic else 0.0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_parts_equal_the_plain_ones(deterministic: bool) -> None:
    arguments = make("umv2-227m", torch.float32, rows_to_pick=300)
    rows, values, pre_values = arguments["rows"], arguments["values"], arguments["pre_values"]
    projected, weights = arguments["projected"].detach(), arguments["scores"].detach()
    tokens, picks = rows.shape
    owners = torch.arange(tokens, device=DEVICE).repeat_interleave(picks)
    listed = ListedPicks(rows.flatten(), owners, torch.full((tokens,), picks, device=DEVICE))
    grad_out = torch.randn(tokens, 1, values.shape[1], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    results = []
    for grid, parts, extra in (
        (scatter, ragged, {}), (triton_lookup, triton_ragged, {"deterministic": deterministic})
    ):  # fmt: skip
        value_sums = [torch.zeros_like(values) for _ in range(2)]
        pre_value_sums = [torch.zeros_like(pre_values) for _ in range(2)]
        flat_weights = weights.flatten(0, 1)
        rho = grid.pre_scores(rows, projected, pre_values, torch.float32)
        results.append([
            rho,
            grid.weighted_sum(rows, None, weights, values, 1),
            grid.weighted_sum_backward(rows, None, weights, grad_out, values, value_sums[0], **extra),
            grid.pre_scores_backward(rows, rho, projected, pre_values, pre_value_sums[0], **extra),
            parts.pre_scores(listed, projected, pre_values, torch.float32),
            parts.weighted_sum(listed, flat_weights, values),
            parts.weighted_sum_backward(listed, flat_weights, grad_out, values, value_sums[1], **extra),
            parts.pre_scores_backward(listed, rho.flatten(), projected, pre_values, pre_value_sums[1], **extra),
            *value_sums, *pre_value_sums,
        ])  # fmt: skip
    for found, expected in zip(results[1], results[0]):
        close(found, expected.double(), 1e-4)


@pytest.mark.parametrize(("keys", "kept", "topk"), [(360, 32, 32), (528, 128, 128), (3162, 128, 768)])
def test_two_stage_top_k(keys: int, kept: int, topk: int) -> None:
    """Small integers, whose sums are exact: places follow the rule for ties, as stable sorts do."""
    g = torch.Generator().manual_seed(keys)
    key_scores = torch.randint(-50, 51, (2, 2, 64, 1, keys), generator=g).float().to(DEVICE)
    u, t = (torch.randint(-3, 4, (1, 2), generator=g).float().to(DEVICE) for _ in range(2))
    cores = torch.randint(-3, 4, (1, 2, 2), generator=g).float().to(DEVICE)
    order = [
        torch.sort(torch.einsum("hr,rthn->thn", vector, scores), dim=-1, descending=True, stable=True).indices
        for vector, scores in zip((u, t), key_scores)
    ]
    chosen = [each[..., :kept] for each in order]
    picked = [scores.gather(-1, index.expand(2, -1, -1, -1)) for scores, index in zip(key_scores, chosen)]
    grid = torch.einsum("rthi,hrs,sthj->thij", picked[0], cores, picked[1]).flatten(2)
    best = torch.sort(grid, dim=-1, descending=True, stable=True).indices[..., :topk]
    found = triton_topk.best_keys(key_scores, u, t, kept)
    assert torch.equal(found, torch.stack(chosen))
    rows, columns = triton_topk.best_cells(key_scores, found, cores, topk)
    assert torch.equal(rows, chosen[0].gather(-1, best // kept))
    assert torch.equal(columns, chosen[1].gather(-1, best % kept))


def test_offsets_beyond_32_bits() -> None:
    """The last rows of a table of 2^32 elements (8 GiB in bfloat16)."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    rows, columns = 1 << 22, 1024
    table = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    table[-1], table[(1 << 21) + 3] = 2.0, 3.0
    picked = torch.tensor([[rows - 1, (1 << 21) + 3]], device=DEVICE)
    weights = torch.tensor([[[1.0], [10.0]]], device=DEVICE)
    assert (triton_lookup.weighted_sum(picked, None, weights, table, 1) == 32).all()
    upstream = torch.ones(1, 1, columns, dtype=torch.bfloat16, device=DEVICE)
    triton_lookup.weighted_sum_backward(picked, None, weights, upstream, table, table)
    assert (table[-1] == 3).all() and (table[(1 << 21) + 3] == 13).all() and not table[: 1 << 21].any()


def test_tile_sizes_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates of time_triton_tiles.py all compute the same, up to the order of sums."""
    exact = in_double(make("umv2-227m", torch.bfloat16))
    expected = reference.lookup(**exact, activation="none")
    for elements, per_warp in [(2048, 512), (4096, 512), (4096, 2048), (8192, 1024)]:
        monkeypatch.setattr(triton_launch, "TILE_ELEMENTS", elements)
        monkeypatch.setattr(triton_launch, "ELEMENTS_PER_WARP", per_warp)
        close(triton_lookup.lookup(**make("umv2-227m", torch.bfloat16), activation="none"), expected, 1e-2)

"""What surrounds the layer's maths: ownership, dtypes, auxiliary losses' scale, statistics, marks, singular vectors."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core import num_microbatches_calculator

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.memory.losses import attach_loss, microbatch_scale, tucker_penalty
from umv2_megatron.memory.sharing import table_windows
from umv2_megatron.ops.search import GRID_CHUNK_CELLS

OPTIONS = {"num_keys": 8, "key_dim": 8, "value_dim": 8, "pre_value_dim": 4, "topk": 4}


def build(
    count: int = 1, dtype: torch.dtype = torch.float32, sequence_parallel: bool = False, **options
) -> torch.nn.ModuleList:
    config = MemoryConfig(**{**OPTIONS, **options})
    layers = torch.nn.ModuleList()
    for index, window in enumerate(table_windows(config, count)):
        table = None if window.owner == index else layers[window.owner].table
        layers.append(
            MemoryLayer(config, 16, index, count, 32, count, window, table, dtype, sequence_parallel=sequence_parallel)
        )
    return layers


def test_a_shared_table_appears_once() -> None:
    layers = build(4, sharing="block", sharing_size=2)
    names = [name for name, _ in layers.named_parameters() if "table" in name]
    assert names == ["0.table.values", "0.table.pre_values", "2.table.values", "2.table.pre_values"]
    assert [name for name in layers.state_dict() if "table" in name] == names
    assert layers[1].table is layers[0].table and layers[0].owns_table and not layers[1].owns_table
    converted = layers.double()
    assert converted[1].table.values is converted[0].table.values
    assert converted[1](torch.randn(3, 16, dtype=torch.float64)).dtype == torch.float64


def test_input_of_any_leading_shape() -> None:
    layer = build()[0]
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(layer(x).view(15, 16), layer(x.view(15, 16)))
    assert layer(torch.randn(0, 16)).shape == (0, 16)


def test_bfloat16_keeps_singular_vectors_and_is_near_float32() -> None:
    layer = build()[0]
    x = torch.randn(64, 16).bfloat16()
    exact = layer(x.float())
    u = layer.retrieval.u.clone()
    layer.bfloat16()
    assert layer.retrieval.u.dtype == torch.float32 and torch.equal(layer.retrieval.u, u)
    assert layer.perm.dtype == torch.int32 and layer.retrieval.keys.dtype == torch.bfloat16
    out = layer(x)
    assert out.dtype == torch.bfloat16
    # Some picks at the margin may differ; most of the output must not.
    error = (out.float() - exact).norm() / exact.norm()
    assert error < 0.25, error
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for name, p in layer.named_parameters())


@pytest.mark.parametrize("backend", ["scatter", "auto"])
def test_autocast_gives_nearly_the_same_gradients(backend: str) -> None:
    layer = build(backend=backend, topk=16, key_topk_cap=8)[0]
    x = torch.randn(32, 16)
    grads = []
    for enabled in (False, True):
        seen = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(seen)
        leaves = (seen, layer.retrieval.query.weight, layer.retrieval.keys, layer.retrieval.query_norm)
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for exact, rounded in zip(*grads):
        assert rounded.dtype == torch.float32
        assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.9


def test_marks_for_mcore() -> None:
    for flag in (False, True):
        for name, parameter in build(sequence_parallel=flag)[0].named_parameters():
            if name.startswith("table"):
                assert parameter.is_memory_table and parameter.allreduce is False
                assert parameter.tensor_model_parallel and not getattr(parameter, "sequence_parallel", False)
            else:
                assert parameter.sequence_parallel is flag and not hasattr(parameter, "allreduce")


def test_grids_in_chunks_give_the_same_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(num_heads=2, backend="scatter")[0]
    x = torch.randn(50, 16)
    whole = layer.retrieval(x)
    assert GRID_CHUNK_CELLS > 50 * 2 * 16
    monkeypatch.setattr("umv2_megatron.ops.search.GRID_CHUNK_CELLS", 7 * 2 * 16)
    parts = layer.retrieval(x)
    assert torch.equal(whole.grid, parts.grid) and torch.equal(whole.scores, parts.scores)


def test_capped_first_stage_finds_the_best_cells_of_its_grid() -> None:
    layer = build(topk=8, key_topk_cap=3, num_keys=16)[0]
    picks = layer.retrieval(torch.randn(20, 16))
    for cells, scores in zip(picks.grid.tolist(), picks.scores.sum(-1).tolist()):
        assert len(set(cells)) == 8 and len({c // 16 for c in cells}) <= 3 and len({c % 16 for c in cells}) <= 3
        assert scores == sorted(scores, reverse=True)


def test_auxiliary_losses_only_in_training() -> None:
    layer = build(balance_loss_coeff=0.1, tucker_penalty_coeff=0.5)[0]
    x = torch.randn(9, 16)
    out = layer(x)
    assert set(layer.last_losses) == {"balance_loss", "tucker_penalty"}
    (out * 0).sum().backward()
    assert layer.retrieval.keys.grad.abs().sum() > 0 and layer.retrieval.cores.grad.abs().sum() > 0
    layer.zero_grad()
    layer.eval()
    (layer(x) * 0).sum().backward()
    assert layer.retrieval.keys.grad.abs().sum() == 0
    with torch.no_grad():
        torch.testing.assert_close(layer(x), out)


def test_auxiliary_loss_is_a_mean_over_micro_batches() -> None:
    loss = torch.ones((), requires_grad=True)
    output = torch.zeros(3, requires_grad=True)
    for scale, expected in ((lambda: 0.25, 0.25), (lambda: microbatch_scale(False), 1.0)):
        loss.grad = None
        attach_loss(output * 2, loss, scale).sum().backward()
        assert loss.grad.item() == expected
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 8, 2, 1)
    try:
        assert microbatch_scale(False) == 0.25 and microbatch_scale(True) == 0.25
    finally:
        num_microbatches_calculator.unset_num_microbatches_calculator()


def test_tucker_penalty_by_hand() -> None:
    # One core per head: singular values 3, 1 and 2, 0.1.
    cores = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.1, 0.0]]]])
    assert tucker_penalty(cores, 0.15).item() == pytest.approx(0.85**2, rel=1e-5)
    assert tucker_penalty(cores[..., :1, :1], 0.15).item() == 0


def test_singular_vectors_follow_the_cores_without_flipping() -> None:
    layer = build(num_heads=2, tucker_rank=3)[0]
    retrieval = layer.retrieval
    torch.manual_seed(4)
    for _ in range(20):
        old_u, old_t = retrieval.u.clone(), retrieval.t.clone()
        with torch.no_grad():
            retrieval.cores.add_(torch.randn_like(retrieval.cores) * 0.02)
        layer.refresh_singular_vectors()
        total = retrieval.cores.sum(0)
        sigma = torch.linalg.svdvals(total)
        torch.testing.assert_close(
            torch.einsum("hr,hrs,hs->h", retrieval.u, total, retrieval.t), sigma[:, 0], rtol=1e-4, atol=1e-4
        )
        assert ((retrieval.u * old_u).sum(-1) > 0.9).all() and ((retrieval.t * old_t).sum(-1) > 0.9).all()


def test_statistics_count_rows_of_the_window() -> None:
    layer = build(3, sharing="ring", sharing_size=2)[1]
    x = torch.randn(30, 16)
    layer(x)
    assert layer.statistics is None
    layer.collect_statistics(True)
    outputs = torch.cat([layer(x), layer(x)])
    layer.eval()
    layer(x)
    layer.train()
    with torch.no_grad():
        layer(x)
        picks = layer.retrieval(x)
    picked = layer.perm[picks.grid].long() % layer.window.window
    numbers = layer.statistics.summary(layer.retrieval.singular_values())
    usage = torch.bincount(picked.flatten(), minlength=layer.window.window) * 2
    assert torch.equal(layer.statistics.counts, usage)
    share = usage / usage.sum()
    assert numbers["value_coverage"] == pytest.approx((usage > 0).float().mean().item())
    assert numbers["dead_rows"] == (usage == 0).sum().item()
    entropy = -torch.special.xlogy(share, share).sum().item()
    assert numbers["value_kl_uniform"] == pytest.approx(math.log(layer.window.window) - entropy, rel=1e-5)
    assert numbers["output_std"] == pytest.approx(outputs.std(correction=0).item(), rel=1e-4)
    assert numbers["score_top1_mean"] == pytest.approx(picks.scores.sum(-1)[:, 0].mean().item(), rel=1e-5)
    assert numbers["score_topk_mean"] == pytest.approx(picks.scores.sum(-1).mean().item(), rel=1e-5)
    sigma = torch.linalg.svdvals(layer.retrieval.cores.sum(0))[0]
    assert numbers["tucker_sigma1"] == pytest.approx(sigma[0].item(), rel=1e-4)
    assert numbers["tucker_sigma2"] == pytest.approx(sigma[1].item(), rel=1e-4)


def test_statistics_without_a_forward_are_nan() -> None:
    layer = build()[0]
    layer.collect_statistics(True)
    numbers = layer.statistics.summary(layer.retrieval.singular_values())
    assert math.isnan(numbers["value_coverage"]) and not math.isnan(numbers["tucker_sigma1"])
    layer.collect_statistics(False)
    assert layer.statistics is None

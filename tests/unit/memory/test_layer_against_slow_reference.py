"""MemoryLayer against an independent layer written out in loops, for hyperparameters that no golden file has.

The slow layer below shares no code with the package: it goes token by token, head by head, pick by pick, in float64,
and autograd differentiates those loops.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.memory.sharing import TableWindow, from_share_ratio, table_windows

HIDDEN = 12
TOKENS = 3
BASE = {"num_keys": 6, "key_dim": 5, "value_dim": 12, "pre_value_dim": 7, "topk": 4}

ADDITIVE = {"scoring": "additive", "query_mode": "per_head", "tucker_rank": 1, "num_cores": 1, "num_heads": 2}
SOFTMAX = {**ADDITIVE, "score_normalization": "softmax"}

CASES = {
    "memory_plus": {**SOFTMAX, "gate": "silu", "pre_value_dim": 0, "sharing": "block", "sharing_size": 3},
    "pkm_raw_queries": {**SOFTMAX, "pre_value_dim": 0, "qk_norm": "none", "balance_loss_coeff": 0.3},
    "peer": {**SOFTMAX, "num_heads": 3, "pre_value_dim": HIDDEN, "pre_projection": "none", "value_dim": HIDDEN,
             "value_expansion": "none", "pre_value_activation": "gelu"},
    "plain_sums_one_query_capped": {**ADDITIVE, "query_mode": "shared", "qk_norm": "query", "num_keys": 9, "topk": 8,
                                    "key_topk_cap": 3},
    "softmax_expanded_gate": {**SOFTMAX, "key_expansion": 2, "value_expansion": "per-block", "gate": "silu"},
    "tucker_gate_without_projection": {"gate": "silu", "value_expansion": "none"},
    "two_heads_rank3_cores4": {"num_heads": 2, "tucker_rank": 3, "num_cores": 4},
    "rank1_core1": {"tucker_rank": 1, "num_cores": 1},
    "v1_gelu_without_pre_values": {"query_mode": "shared", "key_expansion": 2, "value_expansion": "per-block",
                                   "pre_value_dim": 0, "pre_value_activation": "gelu"},
    "per_block_pre_values_gelu_two_heads": {"key_expansion": 2, "value_expansion": "per-block", "num_heads": 2,
                                            "pre_value_activation": "gelu"},
    "expansion3_single_projection": {"key_expansion": 3, "num_keys": 4},
    "expansion2_shared_query_two_heads": {"key_expansion": 2, "query_mode": "shared", "num_heads": 2},
    "many_picks_odd_keys": {"num_keys": 17, "topk": 16},
    "keys_per_side_capped": {"num_keys": 9, "topk": 8, "key_topk_cap": 3},
    "no_value_projection": {"value_expansion": "none"},
    "both_losses": {"balance_loss_coeff": 0.3, "tucker_penalty_coeff": 0.2, "num_heads": 2, "tucker_rank": 3},
    "ring": {"sharing": "ring", "sharing_size": 2},
    "block": {"sharing": "block", "sharing_size": 3},
    "noring": {"sharing": "noring", "sharing_size": 2, "num_heads": 2},
    "share_ratio_third": {"num_keys": 7, "share_ratio": 1 / 3},
    "share_ratio_0.7_expanded": {"num_keys": 5, "share_ratio": 0.7, "key_expansion": 2, "num_heads": 2},
}


def build(case: str, backend: str) -> list[MemoryLayer]:
    options = {**BASE, **CASES[case]}
    share_ratio = options.pop("share_ratio", None)
    config = MemoryConfig(**options, backend=backend, init="fixed")
    count = 3 if share_ratio or config.sharing != "none" else 1
    config.validate(HIDDEN, count)
    windows = from_share_ratio(config.num_keys, count, share_ratio) if share_ratio else table_windows(config, count)
    layers: list[MemoryLayer] = []
    for index, window in enumerate(windows):
        table = None if window.owner == index else layers[window.owner].table
        layers.append(MemoryLayer(config, HIDDEN, index, count, 4 * HIDDEN, count, window, table).double())
    torch.manual_seed(7)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            # Gains of either sign, keys of any size: nothing may hide behind tidy initial values.
            scale = 1.0 if "norm" in name or "cores" in name else 0.4
            parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64) * scale)
        layer.refresh_singular_vectors()
    return layers


@pytest.mark.parametrize("backend", ["reference", "scatter", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_layer_equals_loops(case: str, backend: str) -> None:
    layers = build(case, backend)
    torch.manual_seed(11)
    inputs = [torch.randn(TOKENS, HIDDEN, dtype=torch.float64) for _ in layers]
    upstream = [torch.randn(TOKENS, HIDDEN, dtype=torch.float64) for _ in layers]

    fast_inputs = [x.clone().requires_grad_() for x in inputs]
    fast = [layer(x) for layer, x in zip(layers, fast_inputs)]
    torch.autograd.backward(fast, upstream)
    parameters = {f"{i}.{name}": p for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
    fast_grads = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None

    slow_inputs = [x.clone().requires_grad_() for x in inputs]
    total = torch.zeros((), dtype=torch.float64)
    for layer, x, g, expected in zip(layers, slow_inputs, upstream, fast):
        y, auxiliary = slow_layer(layer, x, layer.window)
        assert_close(expected, y, "output")
        total = total + (y * g).sum() + auxiliary
    total.backward()
    for x, slow_x in zip(fast_inputs, slow_inputs):
        assert_close(x.grad, slow_x.grad, "gradient of x")
    assert len(parameters) == len(fast_grads) >= (4 if layers[0].config.scoring == "additive" else 7)
    for name, parameter in parameters.items():
        if fast_grads[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert_close(fast_grads[name], parameter.grad, name)


def assert_close(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert actual is not None and expected is not None, name
    error = (actual - expected).abs().max().item()
    assert error <= 1e-11 * max(1.0, expected.abs().max().item()), f"{name}: {error}"


def slow_layer(layer: MemoryLayer, x: Tensor, window: TableWindow) -> tuple[Tensor, Tensor]:
    """Output [T, H] and the sum of the auxiliary losses, with their coefficients."""
    c, r = layer.config, layer.retrieval
    n, rank = r.num_keys, c.tucker_rank
    additive, normalises = c.scoring == "additive", (c.qk_norm != "none", c.qk_norm == "both")
    query_gain, key_gain = r.query_norm, r.key_norm
    values, pre_values, perm = layer.table.values, layer.table.pre_values, layer.perm.tolist()
    keys = [[[[slow_norm(r.keys[h, side, i, :, k], key_gain, c.norm_epsilon) if normalises[1] else
               r.keys[h, side, i, :, k] for k in range(rank)] for i in range(n)]
             for side in range(2)] for h in range(c.num_heads)]
    first_stage: list[list[Tensor]] = [[], []]
    kept_keys: list[list[int]] = [[], []]
    outputs = []
    for token in range(x.shape[0]):
        projected_query = r.query.weight @ x[token]
        sums = [torch.zeros(c.value_dim, dtype=torch.float64) for _ in range(c.num_blocks)]
        for h in range(c.num_heads):
            sides = []
            for side in range(2):
                scores = []
                for i in range(n):
                    parts = []
                    for k in range(rank):
                        place = {"per_rank": side * rank + k, "shared": side, "per_head": 2 * h + side}[c.query_mode]
                        q = projected_query[place * c.key_dim : (place + 1) * c.key_dim]
                        q = slow_norm(q, query_gain, c.norm_epsilon) if normalises[0] else q
                        parts.append((q * keys[h][side][i][k]).sum())
                    scores.append(torch.stack(parts))
                sides.append(scores)
            kept = []
            one = torch.ones(1, dtype=torch.float64)
            for side, vector in enumerate((one, one) if additive else (r.u[h], r.t[h])):
                plain = torch.stack([(vector * s).sum() for s in sides[side]])
                first_stage[side].append(plain)
                order = sorted(range(n), key=lambda i: -plain[i].item())
                kept.append(order[: min(c.topk, c.key_topk_cap)])
                kept_keys[side] += kept[-1]
            cells = []
            for i in kept[0]:
                for j in kept[1]:
                    if additive:
                        by_core = [sides[0][i][0] + sides[1][j][0]]
                    else:
                        by_core = [sides[0][i] @ r.cores[core, h] @ sides[1][j] for core in range(c.num_cores)]
                    cells.append((sum(s.item() for s in by_core), i, j, by_core))
            cells.sort(key=lambda cell: -cell[0])
            total = sum(torch.exp(by_core[0]) for _, _, _, by_core in cells[: c.topk])
            for _, i, j, by_core in cells[: c.topk]:
                if c.score_normalization == "softmax":
                    by_core = [torch.exp(by_core[0]) / total]
                virtual = perm[i * n + j]
                block = virtual // window.window if c.num_blocks > 1 else 0
                row = (virtual % window.window + window.offset) % window.rows
                rho = torch.ones((), dtype=torch.float64)
                if pre_values is not None:
                    rho = pre_values[row] @ (x[token] if layer.pre_proj is None else layer.pre_proj.weight @ x[token])
                    if c.pre_value_activation == "gelu":
                        rho = rho * 0.5 * (1 + torch.erf(rho / math.sqrt(2)))
                width = c.value_dim // c.num_cores
                scale = torch.stack([by_core[d // width] for d in range(c.value_dim)])
                sums[block] = sums[block] + scale * rho * values[row]
        summed = torch.cat(sums)
        if layer.gate_proj is not None:
            opening = layer.gate_proj.weight @ x[token]
            summed = summed * opening / (1 + torch.exp(-opening))
        outputs.append(layer.value_proj.weight @ summed if layer.value_proj is not None else summed)
    return torch.stack(outputs), slow_losses(layer, first_stage, kept_keys)


def slow_losses(layer: MemoryLayer, first_stage: list[list[Tensor]], kept_keys: list[list[int]]) -> Tensor:
    c, n = layer.config, layer.retrieval.num_keys
    loss = torch.zeros((), dtype=torch.float64)
    for scores, kept in zip(first_stage, kept_keys):
        for i in range(n):
            mean = sum(torch.softmax(s, 0)[i] for s in scores) / len(scores)
            loss = loss + c.balance_loss_coeff * n * mean * kept.count(i) / len(kept)
    if c.tucker_penalty_coeff:
        for h in range(c.num_heads):
            total = sum(layer.retrieval.cores[core, h] for core in range(c.num_cores))
            # Singular values as roots of the eigenvalues of M^T M, another route than the layer's SVD.
            sigma = torch.linalg.eigvalsh(total.T @ total).clamp(min=0).sqrt().flip(0)
            excess = (sigma[1:] - c.tucker_penalty_margin).clamp(min=0)
            loss = loss + c.tucker_penalty_coeff / (c.tucker_rank - 1) * (excess**2).sum()
    return loss


def slow_norm(vector: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return vector / torch.sqrt((vector * vector).sum() / vector.numel() + epsilon) * gain

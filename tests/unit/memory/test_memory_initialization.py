"""The criterion of the paper's initialisation, measured: a memory layer starts with its FFN's output variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.initialization import ffn_output_variance, init_table_, linear_std
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.memory.sharing import table_windows

SMALL = {"num_keys": 48, "key_dim": 32, "value_dim": 48, "pre_value_dim": 32, "topk": 16}
PRODUCT_KEYS = {"scoring": "additive", "score_normalization": "softmax", "query_mode": "per_head", "tucker_rank": 1,
                "num_cores": 1, "num_heads": 2}
# name: (hidden, inner size of the FFN, blocks, memory layers, memory options)
SIZES = {
    "h64": (64, 192, 4, 4, {**SMALL, "num_keys": 32, "topk": 8}),
    "h128_gelu": (128, 512, 6, 3, {**SMALL, "pre_value_activation": "gelu"}),
    "h256_no_pre_values": (256, 1024, 6, 3, {**SMALL, "pre_value_dim": 0}),
    "h256_two_heads": (256, 1024, 12, 3, {**SMALL, "num_heads": 2}),
    "h256_v1": (256, 1024, 6, 2, {**SMALL, "pre_value_dim": 0, "key_expansion": 2, "value_expansion": "per-block",
                                  "query_mode": "shared"}),
    "h256_expansion_single": (256, 1024, 6, 2, {**SMALL, "key_expansion": 2, "num_heads": 2}),
    "h256_ring": (256, 640, 6, 4, {**SMALL, "sharing": "ring", "sharing_size": 2}),
    "h256_block_rank3_cores4": (256, 640, 6, 4, {**SMALL, "sharing": "block", "sharing_size": 4, "tucker_rank": 3,
                                                 "num_cores": 4}),
    "h192_no_projection": (192, 512, 6, 2, {**SMALL, "value_dim": 192, "value_expansion": "none"}),
    "h256_memory_plus": (256, 1024, 6, 3, {**SMALL, **PRODUCT_KEYS, "pre_value_dim": 0, "gate": "silu",
                                           "sharing": "block", "sharing_size": 3}),
    "h128_peer": (128, 512, 6, 2, {**SMALL, **PRODUCT_KEYS, "pre_value_dim": 128, "value_dim": 128,
                                   "pre_projection": "none", "value_expansion": "none", "num_heads": 4,
                                   "pre_value_activation": "gelu"}),
    "h128_sums_raw_keys": (128, 512, 6, 2, {**SMALL, **PRODUCT_KEYS, "score_normalization": "none",
                                            "qk_norm": "none"}),
    # umv2-227m-1.2b with fewer rows.
    "h768_227m": (768, 2496, 20, 3, {"num_keys": 128, "key_dim": 192, "value_dim": 192, "pre_value_dim": 192,
                                     "topk": 32}),
}


class GatedFFN(nn.Module):
    """A SwiGLU FFN with the initialisation of the paper."""

    def __init__(self, hidden: int, inner: int, num_layers: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)
        for linear, std in ((self.gate, 1.0), (self.up, 1.0), (self.down, (2 * num_layers) ** -0.5)):
            nn.init.normal_(linear.weight, std=std * linear_std(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


def build(config: MemoryConfig, hidden: int, inner: int, blocks: int, count: int, **options) -> list[MemoryLayer]:
    layers: list[MemoryLayer] = []
    for index, window in enumerate(table_windows(config, count)):
        table = None if window.owner == index else layers[window.owner].table
        layers.append(MemoryLayer(config, hidden, index, count, inner, blocks, window, table, **options))
    return layers


def normalised(tokens: int, hidden: int) -> torch.Tensor:
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(3))
    return x * x.square().mean(-1, keepdim=True).rsqrt()


@pytest.mark.parametrize("size", SIZES)
def test_memory_and_ffn_start_with_equal_output_variance(size: str) -> None:
    hidden, inner, blocks, count, options = SIZES[size]
    torch.manual_seed(0)
    x = normalised(1024, hidden)
    with torch.no_grad():
        ffn = GatedFFN(hidden, inner, blocks)(x).var().item()
        for layer in build(MemoryConfig(**options), hidden, inner, blocks, count):
            ratio = layer(x).var().item() / ffn
            assert 0.8 < ratio < 1.2, f"layer {layer.layer_index}: {ratio:.3f}"
            mean_score = layer.retrieval(x).scores.sum(-1).mean().item()
            if layer.config.score_normalization == "softmax":
                assert mean_score == pytest.approx(1 / layer.config.topk)
                spread = layer.retrieval.key_scores(x).std().item() * math.sqrt(2)  # of the sum of two scores
                assert spread == pytest.approx(1, rel=0.1)
                continue
            assert abs(mean_score - 1) < (0.1 if layer.owns_table else 0.3), mean_score


# Several heads that pick many of few rows: rows that are picked twice add up before they are squared, which is 42% of
# the variance here. And every cell picked: about half of the scores are negative.
MANY_PICKS = {
    "rows picked twice": {**SMALL, "num_heads": 4, "num_keys": 8, "topk": 16, "key_topk_cap": 8},
    "every cell": {**SMALL, "num_keys": 4, "topk": 16, "key_topk_cap": 4},
}


@pytest.mark.parametrize("kind", MANY_PICKS)
def test_criterion_with_many_picks(kind: str) -> None:
    x, ratios = normalised(1024, 128), []
    for seed in range(12):  # few rows: the variance differs from draw to draw
        layer = build(MemoryConfig(seed=seed, **MANY_PICKS[kind]), 128, 512, 6, 1)[0]
        with torch.no_grad():
            ratios.append(layer(x).var().item() / ffn_output_variance(128, 512, 6))
            size = layer.retrieval(x).scores.sum(-1).abs().mean().item()
        assert 0.6 < ratios[-1] < 1.4 and abs(size - 1) < 0.1, (seed, ratios[-1], size)
    assert 0.9 < sum(ratios) / len(ratios) < 1.1, ratios


def test_bfloat16_layer_meets_the_criterion() -> None:
    config = MemoryConfig(**SMALL)
    x = normalised(512, 256)
    layer = build(config, 256, 1024, 6, 1, params_dtype=torch.bfloat16)[0]
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        ratio = layer(x.bfloat16()).float().var().item() / ffn_output_variance(256, 1024, 6)
    assert 0.8 < ratio < 1.2


def test_ffn_variance_against_simulation() -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        gated = GatedFFN(256, 4096, 5)(normalised(512, 256)).var().item()
        x = normalised(512, 256) @ (torch.randn(256, 4096) * linear_std(256))
        plain = (functional.gelu(x) @ (torch.randn(4096, 256) * linear_std(256) / math.sqrt(10))).var().item()
    assert ffn_output_variance(256, 4096, 5) == pytest.approx(gated, rel=0.05)
    assert ffn_output_variance(256, 4096, 5, gated=False, activation="gelu") == pytest.approx(plain, rel=0.05)


def test_fixed_initialisation_is_the_released_codes() -> None:
    config = MemoryConfig(**{**SMALL, "num_keys": 64}, init="fixed")
    layer = build(config, 256, 512, 4, 1)[0]
    expected = {
        "retrieval.query.weight": 32**-0.5, "retrieval.keys": 32**-0.5, "value_proj.weight": 48**-0.5,
        "pre_proj.weight": 256**-0.5, "table.values": 0.02, "table.pre_values": 0.02,
    }
    for name, std in expected.items():
        assert layer.get_parameter(name).std().item() == pytest.approx(std, rel=0.05), name
    assert layer.retrieval.query_norm.eq(torch.tensor(32**-0.4)).all()
    assert layer.retrieval.cores.min() >= 0 and layer.retrieval.cores.max() <= 1
    assert MemoryConfig(norm_gain_exponent=0.33).norm_gain_exponent == 0.33


def test_same_seed_same_numbers_and_layers_differ() -> None:
    config = MemoryConfig(**SMALL)
    torch.manual_seed(1)
    first = [layer.state_dict() for layer in build(config, 64, 128, 4, 2)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = [layer.state_dict() for layer in build(config, 64, 128, 4, 2)]
    assert torch.equal(state, torch.get_rng_state()), "building must leave the global generator alone"
    for one, two in zip(first, second):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for name in ("perm", "retrieval.keys", "table.values", "retrieval.cores"):
        assert not torch.equal(first[0][name], first[1][name]), name
    other = build(MemoryConfig(**SMALL, seed=99), 64, 128, 4, 1)[0].state_dict()
    assert not torch.equal(other["table.values"], first[0]["table.values"])


def test_table_numbers_do_not_depend_on_how_the_table_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umv2_megatron.memory.initialization.BLOCK_ROWS", 16)
    monkeypatch.setattr("umv2_megatron.memory.initialization.BLOCK_COLUMNS", 8)
    whole = torch.full((75, 30), math.nan)
    init_table_(whole, 0, 0, 30, 0.5, seed=5)
    assert whole.std().item() == pytest.approx(0.5, rel=0.05) and whole.isfinite().all()
    assert whole.flatten().unique().numel() == whole.numel(), "blocks must not repeat each other"
    for rows in ((0, 75), (0, 10), (15, 17), (40, 75)):
        for columns in ((0, 30), (0, 15), (7, 9), (15, 30)):
            part = torch.full((rows[1] - rows[0], columns[1] - columns[0]), math.nan)
            init_table_(part, rows[0], columns[0], 30, 0.5, seed=5)
            assert torch.equal(part, whole[rows[0] : rows[1], columns[0] : columns[1]]), (rows, columns)


def test_initialisation_can_be_skipped() -> None:
    config = MemoryConfig(num_keys=2000, key_dim=64, value_dim=64, pre_value_dim=64)
    layer = build(config, 256, 512, 4, 1, device="meta")[0]
    assert all(p.is_meta for p in layer.parameters()) and layer.table.values.shape == (4_000_000, 64)
    unset = build(MemoryConfig(**SMALL), 64, 128, 4, 1, perform_initialization=False)[0]
    assert sorted(unset.perm.tolist()) == list(range(48 * 48))

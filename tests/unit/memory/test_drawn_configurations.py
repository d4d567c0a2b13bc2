"""Drawn small memory configurations: each trains two steps with finite losses, or is refused in one sentence.

The draws go to the borders, where sizes meet: one key, every cell picked, one rank, more blocks than rows, tables that
layers share. Hypothesis draws the same in every run (``derandomize``).
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.usage import UsageError
from umv2_megatron.memory import initialization
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.memory.sharing import table_windows
from umv2_megatron.memory.value_table import ValueTable

pytestmark = pytest.mark.thorough

HIDDEN, LAYERS, TOKENS = 8, 3, 6
TINY = [
    "--model-preset", "umv2-tiny", "--train-iters", "10", "--mock-data", "--tokenizer-type", "NullTokenizer",
    "--vocab-size", "64", "--lr", "1e-3", "--hidden-size", str(HIDDEN), "--num-attention-heads", "4",
    "--num-layers", str(LAYERS), "--ffn-hidden-size", "16", "--kv-channels", "2",
]  # fmt: skip


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of the memory whose parts mostly fit together, so that more than a few are trained."""
    additive = draw(st.booleans())
    keys = draw(st.integers(1, 4))
    expansion = draw(st.sampled_from([1, 1, 2]))
    cap = draw(st.integers(1, keys * expansion))
    cores = 1 if additive else draw(st.integers(1, 3))
    chosen = {
        "num_keys": keys,
        "key_expansion": expansion,
        "key_topk_cap": cap,
        "topk": draw(st.one_of(st.just(cap * cap), st.integers(1, max(1, cap * cap)))),
        "num_heads": draw(st.integers(1, 2)),
        "key_dim": draw(st.integers(1, 4)),
        "num_cores": cores,
        "tucker_rank": 1 if additive else draw(st.integers(1, 3)),
        "value_dim": cores * draw(st.integers(1, 4)),
        "pre_value_dim": draw(st.sampled_from([0, 1, 3, HIDDEN])),
        "value_expansion": draw(st.sampled_from(["single", "per-block", "none"])),
        "gate": draw(st.sampled_from(["none", "silu"])),
        "scoring": "additive" if additive else "tucker",
        "query_mode": draw(st.sampled_from(["per_head", "shared"] if additive else ["per_rank", "shared"])),
        "score_normalization": draw(st.sampled_from(["none", "softmax"])) if additive else "none",
        "qk_norm": draw(st.sampled_from(["both", "query", "none"])) if additive else "both",
        "init": draw(st.sampled_from(["paper", "paper", "fixed"])),
        "balance_loss_coeff": draw(st.sampled_from([0.0, 0.1])),
        "tucker_penalty_coeff": 0.0 if additive else draw(st.sampled_from([0.0, 0.1])),
        "layer_freq": draw(st.sampled_from(["1", "2", "[1,0,1]"])),
        "backend": draw(st.sampled_from(["auto", "scatter", "reference"])),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }
    if chosen["pre_value_dim"]:
        chosen["pre_value_activation"] = draw(st.sampled_from(["none", "gelu"]))
        if chosen["pre_value_dim"] == HIDDEN:
            chosen["pre_projection"] = draw(st.sampled_from(["linear", "none"]))
    if chosen["value_expansion"] == "none":
        chosen["value_dim"] = HIDDEN
    if draw(st.booleans()):
        chosen["sharing"] = draw(st.sampled_from(["block", "ring", "noring"]))
        chosen["sharing_size"] = draw(st.integers(1, LAYERS))
    return chosen


def flags(chosen: dict[str, Any]) -> list[str]:
    return [f"--memory-{name.replace('_', '-')}={value}" for name, value in chosen.items()]


def train(config: MemoryConfig) -> list[float]:
    """Losses of two steps of AdamW, and of the model after them."""
    present = config.memory_layers(LAYERS)
    tables: dict[int, ValueTable] = {}
    layers: list[MemoryLayer] = []
    for index, window in enumerate(table_windows(config, sum(present))):
        layer = MemoryLayer(
            config, HIDDEN, index, sum(present), 2 * HIDDEN, LAYERS, window=window, table=tables.get(window.owner)
        )
        tables[index] = layer.table
        layers.append(layer.train())
    parameters = {id(one): one for layer in layers for one in layer.parameters()}
    for layer in layers:
        for name, value in layer.named_parameters():
            assert value.isfinite().all(), name
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    x, target = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(3):
        state = x
        for layer in layers:
            if step:
                layer.retrieval.refresh_due = True
            state = state + layer(functional.rms_norm(state, (HIDDEN,)))
        loss = (state - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@settings(derandomize=True, database=None, deadline=None, max_examples=80)
@given(configurations())
@example({"num_keys": 4, "topk": 16, "key_topk_cap": 4, "pre_value_dim": 3, "value_dim": 4})
def test_a_drawn_configuration_trains_or_is_refused(chosen: dict[str, Any]) -> None:
    try:
        config = resolve([*TINY, *flags(chosen)]).memory
    except UsageError as error:
        assert "--memory-" in str(error) and "\n" not in str(error)
        return
    with mock.patch.object(initialization, "SIMULATED_TOKENS", 64):  # 512 take most of the time
        losses = train(config)
    assert all(math.isfinite(loss) for loss in losses), (losses, chosen)

"""The released code's fixed initialisation of layers that score by sums of two keys (Memory+, product keys)."""

from __future__ import annotations

import pytest
import torch

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.memory.sharing import table_windows

ADDITIVE = {
    "num_keys": 48, "key_dim": 32, "value_dim": 48, "pre_value_dim": 0, "topk": 16, "scoring": "additive",
    "score_normalization": "softmax", "query_mode": "per_head", "tucker_rank": 1, "num_cores": 1, "num_heads": 2,
    "init": "fixed",
}  # fmt: skip


@pytest.mark.parametrize("norm", ["none", "query", "both"])
def test_keys_start_at_their_size_and_where_they_are_normalised_their_gain_does(norm):
    torch.manual_seed(1)
    config = MemoryConfig(**{**ADDITIVE, "qk_norm": norm})
    layer = MemoryLayer(config, 128, 0, 4, 256, 3, table_windows(config, 4)[0])
    size, retrieval = (6 * 32) ** -0.5, layer.retrieval
    assert retrieval.keys.std().item() == pytest.approx(32**-0.5 if norm == "both" else size, rel=0.05)
    if norm == "both":
        assert torch.allclose(retrieval.key_norm, torch.tensor(size))
    if norm != "none":
        assert torch.equal(retrieval.query_norm, torch.ones(32))
    assert retrieval.query.weight.std().item() == pytest.approx((2 / (128 + config.query_rows)) ** 0.5, rel=0.05)
    (values,) = layer.table.tables()
    assert values.std().item() == pytest.approx(48**-0.5, rel=0.05)

"""A Hugging Face model of four small blocks with random weights, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from umv2_megatron.hf import UMv2Config, UMv2ForCausalLM

VOCABULARY = 96

# Every kind of memory layer: sharing, several chunks, virtual blocks, product keys, a gate, a delay.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"memory_table_chunk_rows": 100},
    "ring": {"memory_sharing": "ring", "memory_sharing_size": 2, "memory_table_chunk_rows": 300},
    "v1": {"memory_key_expansion": 2, "memory_value_expansion": "per-block", "memory_layer_freq": "[1,0]*2",
           "memory_query_mode": "shared", "memory_pre_value_activation": "gelu", "memory_num_heads": 2},
    "memory-plus": {"memory_scoring": "additive", "memory_tucker_rank": 1, "memory_num_cores": 1, "memory_num_heads": 2,
                    "memory_query_mode": "per_head", "memory_score_normalization": "softmax", "memory_gate": "silu",
                    "memory_pre_value_dim": 0, "memory_qk_norm": "query", "memory_value_dim": 64},
    "delayed": {"memory_read_delay": 1, "memory_layer_freq": "[1,1,0,0]"},
    "block": {"memory_sharing": "block", "memory_sharing_size": 2},
    "ultramem": {"memory_key_expansion": 2, "memory_value_expansion": "per-block", "memory_query_mode": "shared",
                 "memory_layer_freq": "[1,0]*2", "memory_read_delay": 1, "memory_pre_value_dim": 0,
                 "memory_num_heads": 2},
    "dense": {"ffn_variant": "dense"},
    "moe": {"ffn_variant": "moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True},
}  # fmt: skip

# What each promise of transformers is checked on. "plain" has grouped queries and tied embeddings, "untied" neither.
CONTRACT: dict[str, dict[str, Any]] = {
    **{name: changes for name, changes in VARIANTS.items() if name not in ("chunks", "v1")},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
}
# The others' memory layers and FFNs differ from one of these by less; ``make test-slow`` has them all.
QUICK = ("plain", "chunks", "ring", "v1", "memory-plus", "ultramem", "moe")


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """``names`` for ``pytest.mark.parametrize``; those that are not ``quick`` are for ``make test-slow``."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def tiny_config(**changes: Any) -> UMv2Config:
    """The configuration, with ``changes``."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "memory_num_keys": 16,
        "memory_key_dim": 32,
        "memory_topk": 4,
        "memory_pre_value_dim": 8,
        "memory_value_dim": 24,
    }
    return UMv2Config(**{**values, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> UMv2ForCausalLM:
    """The model, in eval mode."""
    torch.manual_seed(seed)
    return UMv2ForCausalLM(tiny_config(**changes)).eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Random tokens."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

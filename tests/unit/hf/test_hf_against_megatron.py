"""The Hugging Face model gives the logits of megatron-core's model with the same weights, in every variant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2] / "distributed")]
import megatron_pair  # noqa: E402
from harness import run_ranks  # noqa: E402

TOLERANCE = 1e-5
"""Of the largest logit, float32."""

ADDITIVE = {"memory_scoring": "additive", "memory_tucker_rank": 1, "memory_num_cores": 1, "memory_num_heads": 2}
MOE = {"ffn_variant": "moe", "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 40, "num_layers": 2}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"memory_table_chunk_rows": 100}),
    ({"untie_embeddings_and_output_weights": True, "group_query_attention": True, "num_query_groups": 2,
      "kv_channels": 24, "rotary_base": 500}, {}),
    ({"normalization": "LayerNorm", "disable_bias_linear": False, "swiglu": False}, {}),
    ({"position_embedding_type": "none", "memory_pre_value_dim": 0, "qk_layernorm": False}, {}),
    ({"position_embedding_type": "learned_absolute"}, {}),
    ({"rotary_percent": 0.5, "rotary_interleaved": True, "add_qkv_bias": True}, {}),
    ({"use_rope_scaling": True, "rope_scaling_factor": 4, "rotary_base": 500000, "ffn_variant": "dense"}, {}),
    ({"window_size": [5, 0], "ffn_variant": "dense"}, {}),
    ({"norm_placement": "post", "qk_norm_span": "projection", "memory_layer_freq": "2", "memory_read_delay": 1,
      "group_query_attention": True, "num_query_groups": 2}, {}),
    ({"norm_placement": "post", "normalization": "LayerNorm", "disable_bias_linear": False}, {}),
    ({"window_size": [5, 0], "window_attn_skip_freq": [1, 0, 1, 0]},
     {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    ({"rotary_seq_len_interpolation_factor": 3, "ffn_variant": "dense"}, {}),
    ({"memory_num_heads": 2, "memory_tucker_rank": 3, "memory_num_cores": 4, "memory_query_mode": "shared",
      "memory_pre_value_activation": "gelu"}, {}),
    ({"memory_key_expansion": 2, "memory_value_expansion": "per-block", "memory_layer_freq": "[1,0]*2"}, {}),
    ({"memory_value_expansion": "none", "memory_value_dim": 64, "memory_sharing": "ring", "memory_sharing_size": 2},
     {"memory_table_chunk_rows": 300}),
    ({"memory_sharing": "block", "memory_sharing_size": 2, "memory_key_expansion": 2}, {}),
    ({"memory_sharing": "noring", "memory_sharing_size": 3}, {}),
    ({**ADDITIVE, "memory_query_mode": "per_head", "memory_score_normalization": "softmax", "memory_gate": "silu",
      "memory_pre_value_dim": 0, "memory_qk_norm": "query"}, {}),
    ({**ADDITIVE, "memory_query_mode": "shared", "memory_qk_norm": "none", "memory_pre_projection": "none",
      "memory_pre_value_dim": 64, "memory_pre_value_activation": "gelu"}, {}),
    ({"memory_read_delay": 2, "memory_layer_freq": "[1,1,0,0]"}, {}),
    ({"ffn_variant": "engram", "memory_num_heads": 4, "memory_num_keys": 24}, {"memory_table_chunk_rows": 100}),
    ({"ffn_variant": "engram", "memory_ngram_size": 4, "memory_num_heads": 3, "memory_conv_kernel": 2,
      "norm_placement": "post"}, {}),
    ({"engram_layer_freq": "[1,0,1,0]", "memory_layer_freq": "[1,1,0,0]", "engram_num_heads": 4,
      "engram_num_keys": 24}, {"memory_table_chunk_rows": 100}),
    ({"engram_layer_freq": "1", "engram_num_heads": 3, "engram_ngram_size": 4, "engram_value_dim": 5,
      "ffn_variant": "ultramem", "memory_layer_freq": "[1,0,0,0]", "memory_num_keys": 40,
      "norm_placement": "post"}, {}),
    ({"ffn_variant": "dense"}, {}),
    ({"ffn_variant": "moe", "moe_ffn_hidden_size": 16, "num_layers": 1}, {}),  # as OLMoE
    ({**MOE, "moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5, "moe_router_dtype": "fp64"}, {}),
    ({**MOE, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_dtype": "fp32",
      "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_shared_expert_intermediate_size": 24,
      "moe_shared_expert_gate": True}, {}),
    ({**MOE, "swiglu": False, "moe_shared_expert_intermediate_size": 24, "normalization": "LayerNorm"}, {}),
    ({**MOE, "disable_bias_linear": False, "moe_router_topk": 1, "moe_router_score_function": "sigmoid"}, {}),
    ({**MOE, "swiglu": False, "disable_bias_linear": False, "moe_router_topk": 1, "moe_router_pre_softmax": True}, {}),
]  # fmt: skip


def differences() -> list[float]:
    megatron_pair.start()
    return [megatron_pair.logits_differ_by(*case) for case in CASES]


def test_logits_are_those_of_megatron() -> None:
    found = run_ranks(1, differences, timeout=240)[0]
    far = {str(case): difference for case, difference in zip(CASES, found) if not difference < TOLERANCE}
    assert len(found) == len(CASES) and not far, far

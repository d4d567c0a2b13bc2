"""Planned parameter counts are exactly those of the models that megatron-core builds, kind by kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from umv2_megatron.config.presets import PRESETS

HERE = Path(__file__).resolve().parent
CASES = [(name, {}) for name in PRESETS] + [
    ("umv2-8m", {"ffn_variant": "dense"}),
    ("umv2-8m", {"ffn_variant": "moe", "num_experts": 6, "moe_ffn_hidden_size": 40,
                 "moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True}),
    ("umv2-8m", {"ffn_variant": "moe", "num_experts": 4, "disable_bias_linear": False, "swiglu": False}),
    ("umv2-8m", {"memory_layer_freq": "2"}),
    ("umv2-8m", {"memory_sharing": "block", "memory_sharing_size": 2}),
    ("umv2-8m", {"memory_sharing": "ring", "memory_sharing_size": 3}),
    ("umv2-8m", {"memory_sharing": "noring", "memory_sharing_size": 3}),
    ("umv2-8m", {"memory_query_mode": "shared", "memory_key_expansion": 2, "memory_value_expansion": "per-block",
                 "memory_pre_value_dim": 0, "memory_num_heads": 2}),
    ("umv2-8m", {"memory_value_expansion": "none", "memory_value_dim": 256}),
    ("umv2-8m", {"memory_layer_freq": "2", "engram_layer_freq": "3", "engram_num_keys": 40, "engram_num_heads": 8}),
    ("umv2-8m", {"ffn_variant": "memory-plus", "engram_layer_freq": "2", "engram_conv_kernel": 0}),
    ("umv2-8m", {"disable_bias_linear": False, "normalization": "LayerNorm", "swiglu": False, "qk_layernorm": False,
                 "position_embedding_type": "learned_absolute", "untie_embeddings_and_output_weights": True}),
    ("umv2-8m", {"group_query_attention": True, "num_query_groups": 2, "add_qkv_bias": True, "kv_channels": 32}),
]


@pytest.fixture(scope="module")
def counts():
    """One process builds all cases: importing megatron-core takes longer than building."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run([sys.executable, str(HERE / "build_and_count.py"), json.dumps(CASES)], env=environment,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{name}-{'-'.join(changes)}" for name, changes in CASES])
def test_built_model_has_the_planned_parameters(counts, index):
    assert counts[index]["built"] == counts[index]["planned"]
    assert counts[index]["built"]["all"] > 0

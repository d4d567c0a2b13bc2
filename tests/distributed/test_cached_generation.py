"""Generation with mcore's key-value cache: the logits of a forward pass over all tokens, in every kind of model."""

from __future__ import annotations

from typing import Any

import torch
from harness import run_ranks

CONTEXT = 24
VARIANTS: dict[str, dict[str, Any]] = {
    "umv2-tiny": {},
    "grouped-queries": {"group_query_attention": True, "num_query_groups": 2, "qk_layernorm": False},
    "learned-positions": {"position_embedding_type": "learned_absolute", "normalization": "LayerNorm"},
    "bf16": {"bf16": True},
    "engram": {"ffn_variant": "engram", "memory_num_heads": 4, "memory_num_keys": 24},
    "experts": {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "ffn_variant": "moe"},
}


def differences() -> dict[str, float]:
    """Per variant, the largest difference of cached logits from those of a whole pass, relative to the largest."""
    from umv2_megatron.config.flags import read_mapping
    from umv2_megatron.config.presets import PRESETS
    from umv2_megatron.config.resolve import from_layers
    from umv2_megatron.evaluation.generation import CachedMegatronModel
    from umv2_megatron.model.builder import build_model_chunks, unwrap
    from umv2_megatron.training.initialize import make_groups, seed_everything
    from umv2_megatron.training.restore import next_token_logits

    found = {}
    for name, changes in VARIANTS.items():
        preset = PRESETS["umv2-tiny"].flags()
        layers = [("preset", read_mapping(preset, "preset")), ("flag", read_mapping(changes, "flag"))]
        run = from_layers(layers, 1, for_training=False)
        if not found:
            make_groups(run)
        seed_everything(1)
        chunk = build_model_chunks(run, 500, wrap_with_ddp=False)[0].eval()
        if not run.bf16:
            chunk.double()
        model = unwrap(chunk)
        cached = CachedMegatronModel(model, CONTEXT)
        tokens = torch.randint(0, 500, (1, CONTEXT + 3))
        worst = 0.0
        # a prompt, further tokens one by one and two at once, a full context that slides, and another prompt
        windows = [(0, 7), (0, 8), (0, 9), (0, 11), (0, CONTEXT), (1, CONTEXT + 1), (2, CONTEXT + 2), (5, 9), (5, 10)]
        for first, end in windows:
            expected = next_token_logits(model, tokens[:, first:end])[:, :500].float()  # padded ids have -1e30
            logits = cached(tokens[:, first:end])[:, :500].float()
            assert logits.isfinite().all()
            worst = max(worst, float((logits - expected).abs().max() / expected.abs().max()))
        found[name] = worst
    return found


def test_cached_logits_are_those_of_a_whole_pass():
    (found,) = run_ranks(1, differences)
    for name, difference in found.items():
        assert difference < (2e-2 if name == "bf16" else 1e-5), found

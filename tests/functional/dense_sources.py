"""Tiny dense models of transformers' own classes, saved as their users find them, for the tests of upcycling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
# family, what differs from ``SIZES``
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
                               "num_key_value_heads": 4, "head_dim": 24}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 1}),
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
# Memory layers for those sizes.
MEMORY = {"memory_num_keys": 16, "memory_key_dim": 32, "memory_value_dim": 24, "memory_pre_value_dim": 8,
          "memory_topk": 4}  # fmt: skip


def dense_model(folder: Path, name: str, tokenizer: bool = False, dtype: str = "float32", **changes: Any) -> Path:
    """Save the model ``name`` of ``MODELS`` with ``changes``; its norms and biases are no ones and zeros."""
    import torch
    import transformers

    kind, own = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **own, **changes})
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB")
    if tokenizer:
        from umv2_megatron.conversion.tokenizer_files import _byte_level

        (folder / "tokenizer.json").write_text(_byte_level().to_str())
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def upcycled(source: Path, save: Path, say: Any = lambda line: None, **changes: Any) -> Path:
    """Upcycle ``source`` into ``save``; ``changes``: memory settings by key, and fields of ``UpcycleOptions``."""
    from umv2_megatron.conversion.upcycle import UpcycleOptions, upcycle

    own = {key: changes.pop(key) for key in ("start", "dtype", "max_shard_bytes", "with_tokenizer") if key in changes}
    preset = changes.pop("preset", None)
    alone = preset is not None or changes.get("ffn_variant") == "dense"
    settings = changes if alone else {**MEMORY, **changes}
    upcycle(source, save, UpcycleOptions(preset, settings, **own), say)
    return save

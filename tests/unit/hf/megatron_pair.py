"""The same model twice: megatron-core's, made by our builder, and the Hugging Face one with the same weights.

The mapping of names is written out here a second time on purpose, so that these tests do not rest on the name table of
the conversion. Run in a process of its own (``run_ranks``), because megatron-core's groups are global.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from umv2_megatron.parallel import cpu_platform

cpu_platform.install()

from umv2_megatron.config.engram_config import EngramConfig  # noqa: E402
from umv2_megatron.config.flags import read_mapping  # noqa: E402
from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.config.presets import PRESETS  # noqa: E402
from umv2_megatron.config.resolve import from_layers  # noqa: E402
from umv2_megatron.config.run_config import RunConfig  # noqa: E402
from umv2_megatron.hf import UMv2Config, UMv2ForCausalLM  # noqa: E402
from umv2_megatron.model.builder import build_model  # noqa: E402
from umv2_megatron.model.ffn_with_memory import memory_layers  # noqa: E402

NOT_EXPORTED = {"backend", "backward", "stream", "parallel_size", "parallel_mode", "exchange_parts",
                "value_second_moment", "value_optimizer_offload"}


def start() -> None:
    """Groups and random states of a rank that is alone."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)


def configured(**changes: Any) -> RunConfig:
    """umv2-tiny with ``changes``."""
    small = {"num_layers": 4, "transformer_impl": "local", "make_vocab_size_divisible_by": 16}
    layers = [
        ("preset", read_mapping(PRESETS["umv2-tiny"].flags(), "preset")),
        ("flag", read_mapping({**small, **changes}, "flag")),
    ]
    return from_layers(layers, 1, for_training=False)


def hf_config(run: RunConfig, **changes: Any) -> UMv2Config:
    """The configuration of the same model."""
    config = run.transformer_config()
    memory = {f"memory_{f.name}": getattr(run.memory, f.name) for f in dataclasses.fields(MemoryConfig)
              if f.name not in NOT_EXPORTED}  # fmt: skip
    beside = {f.name: run.values[f.name] for f in dataclasses.fields(EngramConfig)}
    values = {
        "vocab_size": run.padded_vocab_size(run.values["vocab_size"]),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "hidden_act": "silu" if run.model.swiglu else "gelu",
        "gated_mlp": run.model.swiglu,
        "max_position_embeddings": run.max_position_embeddings,
        "normalization": config.normalization,
        "norm_eps": config.layernorm_epsilon,
        "qk_norm": run.qk_layernorm,
        "tie_word_embeddings": not run.model.untie_embeddings_and_output_weights,
        "position_embedding_type": run.model.position_embedding_type,
        "rope_interleaved": config.rotary_interleaved,
        "rope_parameters": {
            "rope_theta": float(run.model.rotary_base),
            "partial_rotary_factor": run.model.rotary_percent,
            **rope_scaling(run),
        },
        "norm_placement": run.model.norm_placement,
        "qk_norm_span": run.model.qk_norm_span,
        "sliding_window": None if config.window_size is None else config.window_size[0] + 1,
        "attention_bias": config.add_bias_linear or config.add_qkv_bias,
        "attention_out_bias": config.add_bias_linear,
        "mlp_bias": config.add_bias_linear,
        "ffn_variant": "umv2" if run.has_memory else run.model.ffn_variant,
        **memory,
        **beside,
        **(experts_config(config) if run.has_experts else {}),
        **changes,
    }
    return UMv2Config(**values)


def rope_scaling(run: RunConfig) -> dict[str, Any]:
    """The part of it that says how the rotary embedding is stretched."""
    if run.model.use_rope_scaling:
        return {"rope_type": "llama3", "factor": run.model.rope_scaling_factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    if run.model.rotary_seq_len_interpolation_factor:
        return {"rope_type": "linear", "factor": float(run.model.rotary_seq_len_interpolation_factor)}
    return {"rope_type": "default"}


def experts_config(config: Any) -> dict[str, Any]:
    """The part of it that describes experts."""
    same = ("router_score_function", "router_pre_softmax", "router_topk_scaling_factor", "router_enable_expert_bias",
            "router_num_groups", "router_group_topk", "router_dtype", "shared_expert_intermediate_size",
            "shared_expert_gate")  # fmt: skip
    return {
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        **{f"moe_{name}": getattr(config, f"moe_{name}") for name in same},
    }


def expert_names(block: dict[str, torch.Tensor], config: UMv2Config) -> dict[str, torch.Tensor]:
    """Weights of a block's experts, and their names after ``mlp.`` in megatron-core, under those of the other side."""
    state = {name: tensor for name, tensor in block.items() if name.startswith("router.")}
    first = "gate_up_proj" if config.gated_mlp else "up_proj"
    for ours, theirs in (("linear_fc1", first), ("linear_fc2", "down_proj")):
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            each = [f"experts.local_experts.{expert}.{ours}.{kind}" for expert in range(config.num_experts or 0)]
            if each[0] in block:
                state[f"experts.{theirs}{ending}"] = torch.stack([block[name] for name in each])
    if "shared_experts.linear_fc1.weight" in block:
        parts = block["shared_experts.linear_fc1.weight"].chunk(2 if config.gated_mlp else 1)
        for name, part in zip(("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",), parts):
            state[f"shared_expert.{name}.weight"] = part
        state["shared_expert.down_proj.weight"] = block["shared_experts.linear_fc2.weight"]
    if "shared_experts.gate_weight" in block:
        state["shared_expert_gate.weight"] = block["shared_experts.gate_weight"]
    return state


def hf_state(megatron: torch.nn.Module, config: UMv2Config) -> dict[str, torch.Tensor]:
    """The weights of ``megatron`` under the names of the Hugging Face model."""
    source = dict(megatron.state_dict())
    state: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers if config.ffn_variant == "moe" else 0):
        prefix = f"decoder.layers.{layer}.mlp."
        block = {name.removeprefix(prefix): source.pop(name) for name in list(source) if name.startswith(prefix)}
        state |= {f"model.layers.{layer}.mlp.{name}": tensor for name, tensor in expert_names(block, config).items()}
    groups, size = config.num_key_value_heads or 1, config.head_dim
    per_group = config.num_attention_heads // groups
    for name, tensor in source.items():
        if tensor is None or name.endswith("_extra_state"):
            continue
        parts = name.split(".")
        kind = parts[-1]
        if name.startswith("embedding."):
            state[f"model.embed_{'tokens' if 'word' in name else 'positions'}.weight"] = tensor
        elif name.startswith("output_layer."):
            state["lm_head.weight"] = tensor
        elif name.startswith("decoder.final_layernorm."):
            state[f"model.norm.{kind}"] = tensor
        else:
            prefix, rest = f"model.layers.{parts[2]}.", ".".join(parts[3:-1])
            if rest == "self_attention.linear_qkv":
                split = tensor.view(groups, per_group + 2, size, *tensor.shape[1:])
                for target, part in zip("qkv", split.split([per_group, 1, 1], dim=1)):
                    state[f"{prefix}self_attn.{target}_proj.{kind}"] = part.reshape(-1, *tensor.shape[1:])
            elif rest == "mlp.ffn.linear_fc1" and config.gated_mlp:
                for target, part in zip(("gate", "up"), tensor.chunk(2)):
                    state[f"{prefix}mlp.{target}_proj.{kind}"] = part
            elif ".table" in rest:
                for index, chunk in enumerate(tensor.split(config.memory_table_chunk_rows or len(tensor))):
                    state[f"{prefix}{parts[4]}.table.{kind}.{index}"] = chunk
            elif rest.startswith(("mlp.memory", "mlp.engram")):
                state[prefix + name.split(".mlp.", 1)[1]] = tensor
            else:
                state[f"{prefix}{SIMPLE[rest]}.{kind}"] = tensor
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


SIMPLE = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.post_layernorm": "post_attention_layernorm",
    "mlp.post_layernorm": "post_feedforward_layernorm",
    "mlp.ffn.linear_fc1": "mlp.up_proj",
    "mlp.ffn.linear_fc2": "mlp.down_proj",
}


def pair(changes: dict[str, Any], hf_changes: dict[str, Any]) -> tuple[torch.nn.Module, UMv2ForCausalLM]:
    """The two models, with randomised norms, biases and gains so that nothing is left out by being 0 or 1."""
    run = configured(**changes)
    megatron = build_model(run, run.values["vocab_size"])
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in megatron.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for _, layer in memory_layers(megatron):
            if layer.config.hashes and layer.conv is not None:  # which starts at zero, and ids as they are
                layer.conv.copy_(torch.randn(layer.conv.shape, generator=generator))
                layer.set_canonical(torch.arange(layer.vocabulary) // 3)
    for _, layer in memory_layers(megatron):
        layer.refresh_singular_vectors()
    config = hf_config(run, **hf_changes)
    model = UMv2ForCausalLM(config)
    model.load_state_dict(hf_state(megatron, config))
    return megatron.eval(), model.eval()


def logits_differ_by(changes: dict[str, Any], hf_changes: dict[str, Any]) -> float:
    """Largest difference of the logits of the two models on random tokens, relative to the largest logit.

    Both compute in float64: in float32 it would depend on the CPU which of two near scores wins a pick.
    """
    megatron, model = (each.double() for each in pair(changes, hf_changes))
    tokens = torch.randint(model.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mask = torch.ones(40, 40).triu(1).bool()[None, None]
        expected = megatron(tokens, torch.arange(40).expand(3, -1), mask)
        found = model(tokens).logits
    assert expected.abs().max() > 0.1
    return float((found - expected).abs().max() / expected.abs().max())

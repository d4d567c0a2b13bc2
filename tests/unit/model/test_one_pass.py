"""A block whose steps take one pass each equals one of megatron-core's own modules, gradients included, and uses the
compiled functions where it should."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))
from harness import run_ranks  # noqa: E402

SEQUENCE, BATCH, HIDDEN, HEADS = 24, 3, 32, 4

EXPERTS: dict[str, Any] = {"num_moe_experts": 5, "moe_ffn_hidden_size": 40, "moe_token_dispatcher_type": "alltoall",
                           "moe_router_load_balancing_type": "none"}  # fmt: skip

CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    # settings, and how often a block calls each function: norms of attention, queries, keys and FFN; both rotated
    "plain": ({}, {"swiglu": 1, "rms_norm": 4, "rotate": 2}),
    "grouped queries": ({"num_query_groups": 2}, {"swiglu": 1, "rms_norm": 4, "rotate": 2}),
    "bf16": ({"bf16": True, "params_dtype": torch.bfloat16}, {"swiglu": 1, "rms_norm": 4}),
    "other norms": ({"normalization": "LayerNorm", "qk_layernorm": False}, {"swiglu": 1, "rotate": 2}),
    "biases": ({"add_bias_linear": True}, {"rms_norm": 4, "rotate": 2}),
    "GELU": ({"activation_func": torch.nn.functional.gelu}, {"rms_norm": 4, "rotate": 2}),
    "clamped": ({"activation_func_clamp_value": 0.1}, {"rms_norm": 4, "rotate": 2}),
    "half of a head is rotated": ({"rotary_percent": 0.5}, {"swiglu": 1, "rms_norm": 4}),
    "pairs are neighbours": ({"rotary_interleaved": True}, {"swiglu": 1, "rms_norm": 4}),
    "experts": (EXPERTS, {"swiglu": 5, "rms_norm": 4, "rotate": 2}),
    "experts in bf16": ({**EXPERTS, "bf16": True, "params_dtype": torch.bfloat16}, {"swiglu": 5, "rms_norm": 4}),
    "clamped experts": ({**EXPERTS, "activation_func_clamp_value": 0.1}, {"rms_norm": 4, "rotate": 2}),
    "no rotation": ({"rotary_percent": 0.0}, {"swiglu": 1, "rms_norm": 4}),
}


def compare(settings: dict[str, Any]) -> tuple[float, dict[str, int]]:
    """Largest difference of output and gradients from megatron-core's modules, relative to the largest number of each,
    and the calls of the compiled functions."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    from umv2_megatron.config.memory_config import MemoryConfig
    from umv2_megatron.model import layer_specs
    from umv2_megatron.ops import cpu_blocks

    settings = {"num_query_groups": HEADS, "normalization": "RMSNorm", "qk_layernorm": True, "rotary_percent": 1.0,
                "add_bias_linear": False, "activation_func": torch.nn.functional.silu, **settings}  # fmt: skip
    percent = settings.pop("rotary_percent")
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=48, num_attention_heads=HEADS, attention_dropout=0.0,
        hidden_dropout=0.0, gated_linear_unit=True, transformer_impl="local", **settings,
    )  # fmt: skip
    angles = RotaryEmbedding(HIDDEN // HEADS, percent, use_cpu_initialization=True)(SEQUENCE) if percent else None
    found, calls = [], dict.fromkeys(("swiglu", "rms_norm", "rotate"), 0)

    def counted(name: str) -> Any:
        plain = getattr(cpu_blocks, name)

        def function(*args: Any) -> Any:
            calls[name] += 1
            return plain(*args)

        return function

    for ours in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if ours:
                for name in calls:
                    patch.setattr(cpu_blocks, name, counted(name))
            else:
                patch.setattr(layer_specs, "OnePassNorm", WrappedTorchNorm)
                patch.setattr(layer_specs, "OnePassFFN", MLP)
                patch.setattr(layer_specs, "experts_in_one_pass", lambda experts: None)
                patch.setattr(layer_specs, "OnePassAttention", SelfAttention)
            spec = layer_specs.umv2_layer_spec(config, MemoryConfig(), with_memory=False)
            block = build_module(spec, config=config, layer_number=1).to(config.params_dtype)
            g = torch.Generator().manual_seed(1)
            for parameter in block.parameters():
                drawn = torch.randn(parameter.shape, generator=g) / parameter.shape[-1] ** 0.5
                parameter.data = drawn.to(parameter.dtype)
            x = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=g).to(config.params_dtype).requires_grad_()
            upstream = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=g).to(config.params_dtype)
            out, _ = block(x, attention_mask=None, rotary_pos_emb=angles)
            out.backward(upstream)
            found.append([out.detach(), x.grad, *(each.grad for each in block.parameters())])
    worst = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in zip(*found, strict=True))
    return worst, {name: count for name, count in calls.items() if count}


def all_cases() -> dict[str, tuple[float, dict[str, int]]]:
    """``compare`` of every case."""
    from megatron.core import tensor_parallel

    from umv2_megatron.parallel import groups

    groups.initialize_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return {name: compare(settings) for name, (settings, _) in CASES.items()}


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[float, dict[str, int]]]:
    """One rank's results of all cases."""
    (found,) = run_ranks(1, all_cases)
    return found


def marks() -> list[bool]:
    """Whether a norm's weight is marked for sums over tensor-parallel ranks, with sequence parallelism and without."""
    from types import SimpleNamespace

    from umv2_megatron.model.one_pass import OnePassNorm, OnePassRMSNorm

    found = []
    for parallel in (True, False):
        config = SimpleNamespace(
            sequence_parallel=parallel, normalization="RMSNorm", layernorm_zero_centered_gamma=False,
            persist_layer_norm=False, memory_efficient_layer_norm=False,
        )  # fmt: skip
        norm = OnePassNorm(config, 8, eps=1e-5)
        assert type(norm) is OnePassRMSNorm
        found.append(norm.weight.sequence_parallel)
    return found


def test_norms_are_marked_for_sequence_parallelism() -> None:
    assert run_ranks(1, marks) == [[True, False]]


@pytest.mark.parametrize("name", CASES)
def test_equals_mcore_and_is_used(results: dict[str, tuple[float, dict[str, int]]], name: str) -> None:
    difference, calls = results[name]
    assert calls == CASES[name][1]
    assert difference < (5e-2 if "bf16" in name else 1e-5)

"""Experts of the Hugging Face model: routing as megatron-core's, setting by setting, and what they read and refuse.

Whole models are compared in test_hf_against_megatron.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import VARIANTS, tiny_config, tiny_model  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402
from umv2_megatron.hf.experts_umv2 import UMv2Experts, UMv2Router  # noqa: E402

SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 1.5}, SIGMOID,
     {**SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 3},
     {"moe_router_num_groups": 2, "moe_router_group_topk": 1}],
)  # fmt: skip
def test_routing_is_megatrons_bit_for_bit(changes: dict[str, Any], dtype: torch.dtype) -> None:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = tiny_config(ffn_variant="moe", num_experts=16, num_experts_per_tok=5, moe_intermediate_size=8, **changes)
    torch.manual_seed(0)
    router = UMv2Router(config).to(dtype)
    torch.nn.init.normal_(router.weight, std=0.1)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias, std=0.1)
    x = torch.randn(200, config.hidden_size, dtype=dtype)
    if router.expert_bias is not None:
        router.expert_bias = torch.randn(16) * 0.2
    with torch.no_grad():
        experts, weights = router(x)
        probabilities, chosen = topk_routing_with_score_function(
            torch.nn.functional.linear(x, router.weight),
            5,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=config.moe_router_score_function,
            expert_bias=router.expert_bias,
        )
    assert torch.equal(torch.zeros_like(chosen).scatter(1, experts, True), chosen)
    assert torch.equal(torch.zeros_like(probabilities).scatter(1, experts, weights), probabilities)


def test_only_experts_that_are_picked_are_read() -> None:
    """Weights of the others are not a number, and their gradients are zero."""
    config = tiny_config(**VARIANTS["moe"])
    experts = UMv2Experts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.1)
            parameter[[0, 3, 4, 7]] = float("nan")
    picked = torch.tensor([[1, 2, 5], [6, 5, 2]])
    x = torch.randn(2, config.hidden_size, requires_grad=True)
    weights = torch.rand(2, 3, requires_grad=True)
    output = experts(x, picked, weights)
    output.sum().backward()
    assert output.isfinite().all() and x.grad is not None and x.grad.isfinite().all() and weights.grad is not None
    for token in range(2):
        expected = torch.zeros(config.hidden_size)
        for expert, weight in zip(picked[token].tolist(), weights[token]):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            expected = expected + weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(output[token], expected)
    assert experts.down_proj.grad[[0, 3, 4, 7]].count_nonzero() == 0
    assert experts.down_proj.grad[[1, 2, 5, 6]].count_nonzero(dim=(1, 2)).all()


def test_the_bias_of_the_choice_stays_in_float32(tmp_path: Path) -> None:
    model = tiny_model(**{**VARIANTS["moe"], **SIGMOID})
    bias = torch.full((8,), 0.1234567)
    model.model.layers[1].mlp.router.expert_bias.copy_(bias)
    model.to(torch.bfloat16)
    assert torch.equal(model.model.layers[1].mlp.router.expert_bias, bias)
    model.save_pretrained(tmp_path)
    again = UMv2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[1].mlp.router
    assert again.weight.dtype == torch.bfloat16 and torch.equal(again.expert_bias, bias)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_score_function is 'softmax'"),
        ({"num_experts_per_tok": 1}, "moe_router_pre_softmax is False"),
        ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "moe_router_group_topk is 1"),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 1}, "moe_router_group_topk is 1"),
        ({"moe_router_dtype": "fp16"}, "moe_router_dtype is 'fp16'"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor is 1.0"),
    ],
)
def test_settings_that_cannot_be_computed_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(**{**VARIANTS["moe"], **changes})


def test_defaults_are_those_of_olmoe() -> None:
    config = tiny_config(ffn_variant="moe")
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (64, 8, 12)
    assert tiny_config().num_experts is None

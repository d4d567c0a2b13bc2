"""The models that the benchmarks compare: a preset with memory layers, experts and a dense FFN of equal size.

"Equal" is by the arithmetic of ``umv2_megatron/planning``: operations per token of the blocks, and, between memory
layers and experts, all parameters of the blocks. Attention is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.flags import read_mapping
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.presets import find_preset
from umv2_megatron.config.resolve import from_layers
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.planning.flops import FlopsPerToken, flops_per_token
from umv2_megatron.planning.parameters import count_parameters

EXPERTS, PICKED = 64, 8
"""As OLMoE, the paper's baseline."""


@dataclass(frozen=True)
class Size:
    """What "equal" is about, in one model: operations per token (forward) and parameters of the blocks."""

    flops: FlopsPerToken
    parameters: int

    @classmethod
    def of(cls, fields: Mapping[str, Any], memory: MemoryConfig | None) -> Size:
        """Of the model with these flags."""
        return cls(flops_per_token(fields, memory), count_parameters(fields, memory).total)


def preset_fields(name: str, **changes: Any) -> tuple[dict[str, Any], MemoryConfig]:
    """Model fields of a preset with ``changes`` (a ``memory_`` field changes the memory layers), and its memory."""
    preset = find_preset(name)
    ours = {name.removeprefix("memory_"): value for name, value in changes.items() if name.startswith("memory_")}
    others = {name: value for name, value in changes.items() if not name.startswith("memory_")}
    return {**preset.model, **others}, MemoryConfig(**{**preset.memory, **ours})


def expert_fields(fields: Mapping[str, Any], memory: MemoryConfig) -> dict[str, Any]:
    """``fields`` with 64 experts, 8 for a token, in place of FFN and memory layers, of equal operations and parameters.

    Two unknowns, the expert's inner size e and the shared expert's s, solve two linear equations. Where s would be
    negative there is no shared expert, and e minimises the larger of the two relative errors.
    """
    wanted = Size.of({**fields, "ffn_variant": "umv2"}, memory)

    def size(expert: int, shared: int) -> Size:
        return Size.of(_with_experts(fields, expert, shared), None)

    def error(expert: int, shared: int) -> float:
        found = size(expert, shared)
        return max(abs(found.flops.blocks / wanted.flops.blocks - 1), abs(found.parameters / wanted.parameters - 1))

    # counts are linear in e and s: slopes from three points
    base, wider, shared = size(1, 1), size(2, 1), size(1, 2)
    a, b = wider.flops.blocks - base.flops.blocks, shared.flops.blocks - base.flops.blocks
    c, d = wider.parameters - base.parameters, shared.parameters - base.parameters
    flops, parameters = wanted.flops.blocks - base.flops.blocks, wanted.parameters - base.parameters
    determinant = a * d - b * c
    expert = 1 + (flops * d - b * parameters) / determinant
    width = 1 + (a * parameters - flops * c) / determinant
    if width >= 1:
        return _with_experts(fields, max(1, round(expert)), round(width))
    without = [1 + flops / a, 1 + parameters / c]
    candidates = range(max(1, int(min(without)) - 2), int(max(without)) + 3)
    return _with_experts(fields, min(candidates, key=lambda e: error(e, 0)), 0)


def _with_experts(fields: Mapping[str, Any], expert: int, shared: int) -> dict[str, Any]:
    return {
        **fields,
        "ffn_variant": "moe",
        "num_experts": EXPERTS,
        "moe_router_topk": PICKED,
        "moe_ffn_hidden_size": expert,
        "moe_shared_expert_intermediate_size": shared or None,
    }


def dense_fields(fields: Mapping[str, Any], memory: MemoryConfig) -> dict[str, Any]:
    """``fields`` without memory layers, with an FFN as wide as equal operations per token allow."""
    wanted = Size.of({**fields, "ffn_variant": "umv2"}, memory).flops.blocks
    narrow = {**fields, "ffn_variant": "dense", "ffn_hidden_size": 1}
    base = Size.of(narrow, None).flops.blocks
    slope = Size.of({**narrow, "ffn_hidden_size": 2}, None).flops.blocks - base
    return {**narrow, "ffn_hidden_size": max(1, 1 + round((wanted - base) / slope))}


def configured(
    fields: Mapping[str, Any], memory: MemoryConfig | None, training: bool = False, **flags: Any
) -> RunConfig:
    """The checked configuration of one rank; ``flags`` with underscores. ``training``: with what a run needs."""
    named: dict[str, Any] = {**fields, "transformer_impl": "local"}
    if fields.get("num_experts"):
        named["moe_aux_loss_coeff"] = 0.01  # OLMoE's weight of the loss that balances experts
    if memory is not None:
        named |= {f"memory_{name}": value for name, value in vars(memory).items()}
    layer = read_mapping({name: value for name, value in (named | flags).items() if value is not None}, "benchmark")
    return from_layers([("benchmark", layer)], 1, for_training=training)

"""The family of models that ``--ffn-variant`` names: what stands in the FFN slot, and the switches that make it so.

Layers with a memory are one ``MemoryConfig``; a variant is a set of defaults for its switches (arXiv 2508.18756 and
2411.12364; Memory+: arXiv 2412.09764; PKM: 1907.05242; PEER: 2407.04153):

    umv2         a memory layer in every block, Tucker scores, pre-values, one query per side and rank, one head
    ultramem     UltraMem v1: few layers, one query per side, keys expanded twofold with four value projections, two
                 heads, no pre-values; the layer of block i adds its output after block i + 3
    memory-plus  few layers over one table, product keys with one query per head and side, softmax, two heads, gate;
                 the table learns at 1e-3
    pkm          memory-plus without the gate
    peer         few layers with tables of their own, product keys, 8 heads; a row is a whole expert of one hidden unit,
                 GELU(<pre-value, x>) * value, as wide as the hidden size, without projections
    engram       few layers with tables of their own, whose rows are addressed by hashes of the last 2 and 3 tokens and
                 joined instead of added up; gate and short convolution (arXiv 2601.07372); tables learn at 5 times the
                 learning rate, without weight decay
    moe          mcore's experts in every block, as OLMoE: 64 experts of 1/8 of the FFN's width, 8 of them active,
                 chosen in float32
    dense        the FFN alone

Presets name sizes and variants name switches. So a variant's defaults replace what a preset or checkpoint of *another*
variant says about them, and yield to a preset of the same variant, to a configuration file and to flags. Experts of a
preset go when a variant without them is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from umv2_megatron.config.engram_config import EngramConfig
from umv2_megatron.config.memory_config import MemoryConfig, parse_layer_freq

MEMORY_VARIANTS = ("umv2", "ultramem", "memory-plus", "pkm", "peer", "engram")
FFN_VARIANTS = (*MEMORY_VARIANTS, "moe", "dense")

OLMOE_LOSSES = {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001}
OLMOE = {"num_moe_experts": 64, "moe_router_topk": 8, **OLMOE_LOSSES}
"""Experts as in OLMoE (arXiv 2409.02060): load-balance loss and router z-loss included."""
ROUTER = {"moe_router_dtype": "fp32"}
"""Scores of experts are compared, and their outputs averaged, in float32 whatever the weights are: mcore advises it
from 32 experts on, and it costs one matrix product of hidden size times experts."""
NO_EXPERTS = {
    "num_moe_experts": None,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": None,
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_router_dtype": None,
}
"""Megatron-core's defaults of what presets of ``moe`` and the variant itself set."""
NO_ENGRAM = {field.name: field.default for field in fields(EngramConfig)}
"""No n-gram layers beside others; variants without other memory layers drop those of a checkpoint."""

SWITCHES = (
    "scoring", "score_normalization", "query_mode", "qk_norm", "gate", "pre_projection", "pre_value_activation",
    "tucker_rank", "num_cores", "num_heads", "key_expansion", "value_expansion", "layer_freq", "read_delay", "sharing",
    "sharing_size", "value_lr", "norm_gain_exponent", "ngram_size", "ngram_tokens", "conv_kernel",
)  # fmt: skip
_UMV2 = {name: MemoryConfig.__dataclass_fields__[name].default for name in SWITCHES}
_PRODUCT_KEYS = {
    **_UMV2,
    "scoring": "additive",
    "score_normalization": "softmax",
    "query_mode": "per_head",
    "tucker_rank": 1,
    "num_cores": 1,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "umv2": _UMV2,
    "ultramem": {
        **_UMV2,
        "query_mode": "shared",
        "key_expansion": 2,
        "value_expansion": "per-block",
        "pre_value_dim": 0,
        "num_heads": 2,
        "norm_gain_exponent": 0.33,
    },
    "memory-plus": {**_PRODUCT_KEYS, "num_heads": 2, "gate": "silu", "pre_value_dim": 0, "value_lr": 1e-3},
    "pkm": {**_PRODUCT_KEYS, "num_heads": 2, "pre_value_dim": 0, "value_lr": 1e-3},
    "peer": {
        **_PRODUCT_KEYS,
        "num_heads": 8,
        "pre_projection": "none",
        "pre_value_activation": "gelu",
        "value_expansion": "none",
    },
    "engram": {
        **_UMV2,
        "scoring": "ngram",
        "query_mode": "shared",
        "tucker_rank": 1,
        "num_cores": 1,
        "num_heads": 16,
        "topk": 1,
        "pre_value_dim": 0,
        "value_lr_mult": 5.0,
        "value_lr_decay_iters": 0,
        "value_weight_decay": 0.0,
    },
}
READ_DELAY = 3
_LEARNING = ("value_lr_mult", "value_lr_decay_iters", "value_weight_decay")


def has_memory(variant: str) -> bool:
    """Whether blocks of this variant have memory layers."""
    return variant in MEMORY_VARIANTS


def variant_defaults(variant: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by key that ``variant`` sets where the user does not.

    Args:
        variant: one of ``FFN_VARIANTS``; an unknown one sets nothing.
        values: all settings as they are without these defaults; sizes are read here.
        given: those that the user gave, which decide what follows from them.
    """
    layers, hidden = values.get("num_layers"), values.get("hidden_size")
    kept = variant not in ("engram", "moe", "dense") or "engram_layer_freq" in given
    dropped = {} if kept or not values.get("engram_layer_freq") else NO_ENGRAM
    if variant == "moe":
        return {**ROUTER, **({} if "num_moe_experts" in given else _experts(values, given)), **dropped}
    if variant not in FFN_VARIANTS:
        return {}
    without = {**(NO_EXPERTS if values.get("num_moe_experts") else {}), **dropped}
    if variant == "dense":
        return dict(without)
    memory = dict(_CHANGES[variant])
    if variant == "umv2" and not values.get("memory_pre_value_dim"):
        memory["pre_value_dim"] = _default("pre_value_dim")
    if variant == "peer" and hidden:
        memory.update(pre_value_dim=hidden, value_dim=hidden)
    if variant == "engram":
        heads = given.get("memory_num_heads") or memory["num_heads"]
        if hidden:
            memory["value_dim"] = max(1, hidden // heads)
        if given.get("memory_value_lr") is not None:
            memory.update(value_lr_mult=_default("value_lr_mult"), value_lr_decay_iters=None)
    elif values.get("memory_scoring") == "ngram":  # a preset or checkpoint of engram, whose tables learn their own way
        memory.update({name: _default(name) for name in _LEARNING})
    if variant != "umv2" and isinstance(layers, int) and layers > 0:
        memory.update(_few_layers(variant, layers, given))
    if {"memory_value_lr_mult", "memory_value_lr_decay_iters"} & given.keys():
        memory["value_lr"] = None  # a multiple of the learning rate was asked for
    return {**without, **{f"memory_{name}": value for name, value in memory.items()}}


def _default(name: str) -> Any:
    return MemoryConfig.__dataclass_fields__[name].default


def _few_layers(variant: str, num_layers: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Where the memory layers are, how late they add their output, and how many share a table.

    At most 4 layers and at most every fourth block, evenly spread: of 20 blocks 4, 8, 12 and 16 (counted from 0), and
    for UltraMem 2, 6, 10 and 14, which add after 5, 9, 13 and 17, as published. For engram the first block and the one
    before the middle.
    """
    count = max(1, min(4, num_layers // 4))
    asked = given.get("memory_read_delay")
    delay = (READ_DELAY if asked is None else asked) if variant == "ultramem" else (asked or 0)
    if asked is None:
        delay = min(delay, num_layers - 1)
    blocks = [max(0, int(num_layers * (index + 1) / (count + 1) - delay / 2)) for index in range(count)]
    if variant == "engram":  # their outputs are there before the attention of blocks 1 and 15 of 30, as in the demo
        blocks = [0, max(0, num_layers // 2 - 1)]
    pattern = "[" + ",".join(str(int(block in blocks)) for block in range(num_layers)) + "]"
    found: dict[str, Any] = {"layer_freq": pattern}
    if variant == "ultramem":
        found["read_delay"] = delay
    freq = given.get("memory_layer_freq")
    if freq is not None:
        try:
            present = parse_layer_freq(freq, num_layers)
        except ValueError:
            return found  # the checks will say so
        count = sum(present)
        if variant == "ultramem" and count:
            found["read_delay"] = min(READ_DELAY, present[::-1].index(True))
    if variant in ("memory-plus", "pkm") and count > 1 and "memory_sharing" not in given:
        found.update(sharing="block", sharing_size=count)
    return found


def _experts(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """OLMoE's experts, so wide that the active ones are as wide as the FFN."""
    topk = given.get("moe_router_topk") or OLMOE["moe_router_topk"]
    ffn = values.get("ffn_hidden_size")
    return {**OLMOE, **({"moe_ffn_hidden_size": max(1, ffn // topk)} if ffn else {})}

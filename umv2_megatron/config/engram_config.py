"""N-gram layers (Engram) beside the memory layers of another variant: a second family of memory layers in one model.

The family is a ``MemoryConfig`` of its own. What its flags do not say it has in common with the first one, so that one
memory-parallel group, one backend and one kind of optimizer state serve both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Optional

from umv2_megatron.config.memory_config import NGRAM_SETTINGS, OF_A_RUN, MemoryConfig
from umv2_megatron.config.option import option

_NEEDED = ("engram_layer_freq",)


@dataclass
class EngramConfig:
    """Flags of the n-gram layers beside others; every field is the flag of its name."""

    engram_layer_freq: Optional[str] = option(
        None,
        "which blocks have an n-gram layer beside the memory layers of --ffn-variant: an integer or a 0/1 list, as "
        "--memory-layer-freq (default: none)",
    )
    engram_num_keys: int = option(
        128, "N of the n-gram layers: each has a table of N*N rows", at_least=1, needs=_NEEDED
    )
    engram_value_dim: Optional[int] = option(
        None,
        "Dv of the n-gram layers (default: --hidden-size over --engram-num-heads)",
        at_least=1,
        needs=_NEEDED,
    )
    engram_num_heads: int = option(16, "hashes of all n-gram lengths together", at_least=1, needs=_NEEDED)
    engram_ngram_size: int = option(3, "as --memory-ngram-size", at_least=2, needs=_NEEDED)
    engram_ngram_tokens: str = option(
        "folded", "as --memory-ngram-tokens", choices=("folded", "ids"), needs=_NEEDED
    )
    engram_conv_kernel: int = option(4, "as --memory-conv-kernel", at_least=0, needs=_NEEDED)
    engram_value_lr_mult: float = option(
        5.0, "as --memory-value-lr-mult, for the tables of n-gram layers", above=0, needs=_NEEDED
    )
    engram_value_lr_decay_iters: Optional[int] = option(
        0, "as --memory-value-lr-decay-iters, for the tables of n-gram layers", at_least=0, needs=_NEEDED
    )
    engram_value_weight_decay: Optional[float] = option(
        0.0,
        "as --memory-value-weight-decay, for the tables of n-gram layers (null in a file: --weight-decay)",
        at_least=0,
        needs=_NEEDED,
    )


class NgramLayers(MemoryConfig):
    """The ``MemoryConfig`` of n-gram layers beside others."""

    family = "engram"


COMMON = (*OF_A_RUN, "init", "norm_epsilon")
"""Fields of ``MemoryConfig`` that both families of a model have alike."""
_SEED_SHIFT = 0x5EED0E
"""What the seed of the second family differs by: its layers are to start with other numbers than those of the first."""


def ngram_layers(values: Mapping[str, Any]) -> NgramLayers | None:
    """The n-gram layers beside others that settings by key describe, None without. Missing settings have their
    defaults; whether the settings can work is for ``NgramLayers.validate`` to say."""
    if values.get("engram_layer_freq") is None:
        return None
    made: dict[str, Any] = {"scoring": "ngram", "tucker_rank": 1, "num_cores": 1, **NGRAM_SETTINGS}
    for field in fields(MemoryConfig):
        if field.name in COMMON:
            made[field.name] = values.get(f"memory_{field.name}", field.default)
        elif field.name == "seed":
            made["seed"] = values.get("memory_seed", field.default) ^ _SEED_SHIFT
    for field in fields(EngramConfig):
        made[field.name.removeprefix("engram_")] = values.get(field.name, field.default)
    if made["value_dim"] is None:
        made["value_dim"] = max(1, (values.get("hidden_size") or 1) // made["num_heads"])
    return NgramLayers(**made)

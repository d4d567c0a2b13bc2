"""Bytes of weights that decoding reads per generated token: the reason to have memory layers instead of experts.

A step that decodes B sequences reads every dense weight once, whatever B is. Of a value table it reads the rows that at
least one of the B tokens picked, which stay few; of experts it soon reads all. Both are expected numbers of
distinct items when every token picks at random: n * (1 - (1 - k/n)^B) of n items, k picked per token.

The MoE compared with has the same attention, norms and embeddings, the same activated and the same total parameters:
8 active experts share what a token activates beyond attention, and as many experts exist as the total allows (65.6 for
umv2-227m-1.2b, where the paper's OLMoE-227M/1.2B has 64). Its router, about 1% of its weights, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.parameters import count_parameters, memory_in_use

ACTIVE_EXPERTS = 8


@dataclass(frozen=True)
class BytesTouched:
    """Weight bytes read per decoded token, for ``batch`` tokens decoded in one step.

    ``dense``: all dense weights, the output matrix and one embedding row per token. ``rows``: value and pre-value rows.
    ``moe``: the same sum for an MoE of the same size; None where the model has no memory layers.
    """

    batch: int
    dense: float
    rows: float
    moe: float | None

    @property
    def all(self) -> float:
        """Dense weights and rows."""
        return self.dense + self.rows


def bytes_touched_per_token(
    model_fields: Mapping[str, Any], memory_config: MemoryConfig | None, batch: int = 1, bytes_per_weight: int = 2
) -> BytesTouched:
    """Weight bytes that decoding reads per token; key-value cache and activations are left out.

    Args:
        model_fields, memory_config: as in ``count_parameters``.
        batch: tokens decoded together in one step.
        bytes_per_weight: 2 for bf16.

    Raises:
        ValueError: one sentence naming the flag whose value cannot work.
    """
    count = count_parameters(model_fields, memory_config)
    memory_config = memory_in_use(model_fields, memory_config)
    shape = ModelShape.from_fields(model_fields)
    # the output matrix is read whole, the input embedding one row per token
    around = shape.vocab_size * shape.hidden_size + batch * shape.hidden_size * (2 if shape.learned_positions else 1)
    dense = around + count.attention + count.ffn + count.norms + count.memory
    if memory_config is None:
        return BytesTouched(batch, dense * bytes_per_weight / batch, 0.0, None)
    rows = 0.0
    for family in shape.families(memory_config):
        row, picks = family.pre_value_dim + family.value_dim, family.num_heads * family.topk
        rows += sum(family.memory_layers(shape.num_layers)) * row * _distinct(family.window_rows, picks, batch)
    outside = count.attention + count.norms
    expert = (count.activated_without_embeddings - outside) / ACTIVE_EXPERTS
    experts = (count.total - outside) / expert
    moe = around + outside + expert * _distinct(experts, ACTIVE_EXPERTS, batch)
    return BytesTouched(
        batch, dense * bytes_per_weight / batch, rows * bytes_per_weight / batch, moe * bytes_per_weight / batch
    )


def _distinct(items: float, picked: int, batch: int) -> float:
    """Expected distinct items among ``items`` when ``batch`` tokens pick ``picked`` each at random."""
    if picked >= items:
        return float(items)
    return -items * math.expm1(batch * math.log1p(-picked / items))

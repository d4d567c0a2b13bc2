"""A small model that has learnt a text with a rule, so that its loss says what a quantizer has spoilt.

Sizes suit bitsandbytes' 4-bit product on a CPU: rows of a weight in 32s, columns in 64s.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_model import VARIANTS, VOCABULARY, tiny_model
from torch import Tensor

from umv2_megatron.hf import UMv2ForCausalLM

NAMES = ("plain", "ring", "delayed", "memory-plus", "v1", "moe", "dense")
# Tokens that occur, and the share of places in which the likelier one of two follows.
_LETTERS, _LIKELY = 11, 0.8


def sizes(name: str) -> dict[str, Any]:
    """What ``tiny_model`` is made with."""
    wide = {"head_dim": 32, "intermediate_size": 128, "memory_value_dim": 64, "memory_pre_value_dim": 32}
    changes = {**wide, **VARIANTS[name], "initializer_range": 0.05}
    if name == "moe":
        changes |= {"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64}
    return changes


def text(rows: int, length: int, seed: int) -> Tensor:
    """Tokens [rows, length]: by the two before it each is one of two, so that no model gets below 0.5004 nats."""
    follows = torch.randint(_LETTERS, (VOCABULARY, VOCABULARY, 2), generator=torch.Generator().manual_seed(3)) + 1
    generator = torch.Generator().manual_seed(seed)
    likely = (torch.rand(rows, length, generator=generator) < _LIKELY).long()
    made = torch.randint(1, _LETTERS + 1, (rows, length), generator=generator)
    for place in range(2, length):
        made[:, place] = follows[made[:, place - 2], made[:, place - 1], likely[:, place]]
    return made


def trained(name: str, steps: int = 90, rate: float = 5e-3) -> UMv2ForCausalLM:
    """The model, in eval mode."""
    model = tiny_model(**sizes(name)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, 3 * (1 - step / steps))
        batch = text(8, 48, 1000 + step)
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()

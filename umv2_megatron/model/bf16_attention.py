"""Attention that stays in bfloat16 where the FFNs of the blocks compute in FP8.

mcore wraps whole blocks in Transformer Engine's FP8 context, so that attention's projections would compute in FP8, too.
In this package FP8 is for the dense FFNs alone. Attention is therefore built and run in a nested context that is off.
Delayed scaling allows that: its largest numbers are reduced when the outermost context ends, once for a forward pass.
Backward needs no context: a module of Transformer Engine keeps what its forward pass did.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig


class Bf16Attention(SelfAttention):
    """mcore's ``SelfAttention`` without FP8; arguments, results and names of parameters are the same.

    To be used only where Transformer Engine is installed.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        with _no_fp8_weights():
            super().__init__(config, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ``SelfAttention.forward``: [S, B, H] to ([S, B, H], bias)."""
        with _no_fp8():
            return super().forward(*args, **kwargs)


def _no_fp8() -> Any:
    """Transformer Engine's context in which its modules compute in the type of their weights."""
    from transformer_engine import pytorch as engine

    return (getattr(engine, "autocast", None) or engine.fp8_autocast)(enabled=False)


def _no_fp8_weights() -> Any:
    """Transformer Engine's context in which its modules make their weights in bfloat16 (--fp8-param-gather)."""
    from transformer_engine import pytorch as engine

    return (getattr(engine, "quantized_model_init", None) or engine.fp8_model_init)(enabled=False)

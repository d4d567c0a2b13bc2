"""Core attention of ``--transformer-impl local`` that never holds the scores of all pairs of tokens.

megatron-core's ``DotProductAttention`` writes the scores [b, np, s, s] and keeps their softmax for the backward.
Causal attention in float32 is our own on a CPU (``ops/cpu_attention.py``), where it can be compiled. Otherwise
PyTorch's ``scaled_dot_product_attention`` works in tiles (FlashAttention, arXiv 2205.14135) on a CPU and on a GPU, and
keeps the logarithm of each softmax's denominator, [b, np, s], instead. What it cannot do is left to megatron-core.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from umv2_megatron.ops import cpu_attention

HOLD_SCORES = (AttnBackend.local, AttnBackend.unfused)
"""Values of ``--attention-backend`` that ask for megatron-core's own module."""


class FusedAttention(DotProductAttention):
    """``DotProductAttention`` through ``scaled_dot_product_attention`` where that computes the same.

    Takes the arguments of ``DotProductAttention`` and has its parameters. megatron-core's code runs with
    ``--attention-backend local`` or ``unfused``, dropout in training, a window, a softmax offset, query-key layer
    scaling, for queries that are the last of their keys without a mask that says so, and on a GPU with
    ``--deterministic-mode``: PyTorch's kernels there add up gradients in any order where it merely warns of that.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *args: Any, **kwargs: Any
    ):
        super().__init__(config, layer_number, attn_mask_type, *args, **kwargs)
        self.can_fuse = not (
            config.attention_backend in HOLD_SCORES
            or config.softmax_type != "vanilla"
            or config.apply_query_key_layer_scaling
            or is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """softmax(scale * query key^T) value.

        Args:
            query: [sq, b, np/TP, hn].
            key, value: [sk, b, ng/TP, hn]; ng divides np.
            attention_mask: bool, broadcast to [b, np/TP, sq, sk], True where not to look; None: what the module's own
                mask type says.
            packed_seq_params: documents one after the other (``data/documents.py``), each attended to alone; query, key
                and value are [t, heads/TP, hn] then.

        Returns:
            [sq, b, np/TP * hn], or [t, np/TP * hn] of documents, of the query's dtype; the softmax is float32.
        """
        if packed_seq_params is not None:
            return self._each_document(query, key, value, packed_seq_params)
        causal = attention_mask is None and self.attn_mask_type == AttnMaskType.causal and query.shape[0] > 1
        dropout = self.training and self.attention_dropout.p > 0
        if (
            not self.can_fuse
            or dropout
            or (self.config.deterministic_mode and query.is_cuda)
            or (causal and query.shape[0] != key.shape[0])
            or attention_bias is not None
        ):
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        if causal and cpu_attention.can(query, key, value):
            context = cpu_attention.causal_attention(query, key, value, float(self.softmax_scale))
            return context.view(*query.shape[:2], -1)
        heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = F.scaled_dot_product_attention(
            *heads_first,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _each_document(self, query: Tensor, key: Tensor, value: Tensor, documents: PackedSeqParams) -> Tensor:
        """Causal attention within each document of [t, heads/TP, hn]: a call for each, as a sample of its own."""
        lengths = getattr(documents, "lengths", None) or documents.cu_seqlens_q.diff().tolist()
        queries, keys, values = (tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value))
        return torch.cat([self.forward(q, k, v, None).squeeze(1) for q, k, v in zip(queries, keys, values)])

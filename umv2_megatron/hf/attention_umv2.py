"""Attention of an UltraMemV2 decoder for transformers: norms, rotary embedding, causal attention with grouped keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_umv2 import UMv2Config
from .linear_umv2 import project


class UMv2Norm(nn.Module):
    """RMS norm or layer norm over the last dimension, computed in float32 or better."""

    def __init__(self, config: UMv2Config, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.normalization == "LayerNorm" else None
        self.epsilon = config.norm_eps
        self.zero_centered = config.norm_zero_centered

    def forward(self, x: Tensor) -> Tensor:
        gain = (self.weight + 1 if self.zero_centered else self.weight).to(x.dtype)  # which autocast may have changed
        if self.bias is None:
            return functional.rms_norm(x, gain.shape, gain, self.epsilon)
        return functional.layer_norm(x, gain.shape, gain, self.bias.to(x.dtype), self.epsilon)


class UMv2RotaryEmbedding(nn.Module):
    """cos and sin of the rotary embedding, for the part of the head dimension that is rotated."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: UMv2Config) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = (config.rope_parameters or {})["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        compute = self.compute_default_rope_parameters
        self.position_scale = 1.0
        if self.rope_type == "linear":  # positions are scaled, not frequencies: as megatron-core rounds
            self.position_scale = 1 / (config.rope_parameters or {})["factor"]
            self.rope_type = "default"  # by which transformers computes frequencies again
        elif self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module, but frequencies stay float32: rounded, angles of late positions would be far off."""
        before = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        for name, old in zip(("inv_freq", "original_inv_freq"), before):
            new = getattr(self, name)
            if new.dtype != old.dtype and not old.is_meta:
                setattr(self, name, old.to(new.device))
        return self

    @staticmethod
    def compute_default_rope_parameters(config: UMv2Config, **_: Any) -> tuple[Tensor, float]:
        """Frequencies base^(-2i/d) for i < d/2, d the rotated part of the head dimension, and a factor of 1."""
        rope = config.rope_parameters or {}
        size = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        # as megatron-core computes it: a power with a negative exponent rounds otherwise
        return 1.0 / rope["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What ``rotate`` takes: both [b, 1, s, d] for ``position_ids`` [b, s], in the dtype of ``x``."""
        positions = position_ids[:, None, :, None].float() * self.position_scale
        angles = positions * self.inv_freq.to(device=x.device, dtype=torch.float32)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        pairs = torch.stack if self.config.rope_interleaved else torch.cat
        cos, sin = pairs([cos, cos], dim=-1), pairs([-sin, sin], dim=-1)
        if self.config.rope_interleaved:
            cos, sin = cos.flatten(-2), sin.flatten(-2)
        return cos.to(x.dtype), sin.to(x.dtype)


def head_dim(config: UMv2Config) -> int:
    """Numbers of a head's query, key and value."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of the first d numbers of each head of ``x`` [b, heads, s, head_dim]; cos and sin are [b, 1, s, d].

    The sine has the sign of its product with the other number of the pair.
    """
    size = cos.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else turned.roll(size // 2, -1)
    turned = torch.addcmul(turned * cos, partner, sin)
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, of query [b, heads, s, d], key and value [b, groups, s', d].

    The mask [b or 1, 1, s, s'] is added, or (bool) says what is seen. Gives the output [b, s, heads, d] and the weights
    [b, heads, s, s'].
    """
    batch, heads, length, size = query.shape
    # The heads that share keys and values are rows of one product: nothing is repeated.
    together = (batch, key.shape[1], -1)
    scores = query.reshape(*together, size) @ key.transpose(-1, -2) * scaling
    scores = scores.view(batch, heads, length, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    output = (weights.view(*together, weights.shape[-1]) @ value).view(query.shape)
    return output.transpose(1, 2).contiguous(), weights


class UMv2Attention(nn.Module):
    """Causal attention with grouped keys and values, of any head dimension."""

    def __init__(self, config: UMv2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim(config)
        groups = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // groups
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.dropout = config.attention_dropout
        self.rope_interleaved = config.rope_interleaved
        self.sliding_window = config.sliding_window if config.has_window(layer_idx) else None
        inner, shared = config.num_attention_heads * self.head_dim, groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_out_bias)
        self.norms_heads = config.qk_norm_span == "head"
        sizes = (self.head_dim, self.head_dim) if self.norms_heads else (inner, shared)
        self.q_norm = UMv2Norm(config, sizes[0]) if config.qk_norm else None
        self.k_norm = UMv2Norm(config, sizes[1]) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = project(self.q_proj, hidden_states), project(self.k_proj, hidden_states)
        value = project(self.v_proj, hidden_states).view(shape).transpose(1, 2)
        if not self.norms_heads and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(shape), key.view(shape)
        if self.norms_heads and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query = rotate(query, cos, sin, self.rope_interleaved)
            key = rotate(key, cos, sin, self.rope_interleaved)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        chosen = self.config._attn_implementation
        if chosen == "sdpa" and query.shape[2] == 1 and query.device.type == "cpu":
            chosen = "eager"  # half the time of torch's kernel for a single query
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return project(self.o_proj, output.reshape(*hidden_states.shape[:-1], -1)), weights

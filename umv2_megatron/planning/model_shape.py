"""The sizes of the decoder around the memory layers, and the n-gram layers beside them, read from flag values with
Megatron's defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.engram_config import ngram_layers
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.variants import MEMORY_VARIANTS, has_memory

FFN_VARIANTS = (*MEMORY_VARIANTS, "dense")
"""What ``tools/plan.py`` plans. Counts of parameters and operations know experts ("moe") too."""


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int = 1) -> int:
    """The vocabulary after padding: the next multiple of ``divisible_by * tensor_parallel_size``, as in Megatron-LM."""
    step = divisible_by * tensor_parallel_size
    return -(-vocab_size // step) * step


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only model without the memory layers of its variant. ``vocab_size`` is the padded one,
    ``num_tokens`` is without padding.

    ``ngrams``: the n-gram layers beside those of the variant (--engram-layer-freq).
    ``num_experts`` is 0 where blocks have an FFN; ``shared_expert_hidden_size`` is 0 without a shared expert.
    ``post_norm``, ``wide_qk_norm``: --norm-placement post, --qk-norm-span projection.
    ``query_size`` is heads * head dim, ``key_value_size`` groups * head dim; all sizes are counts of elements.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    seq_length: int
    vocab_size: int
    num_tokens: int
    learned_positions: int
    untied: bool
    gated: bool
    linear_bias: bool
    qkv_bias: bool
    norm_bias: bool
    qk_norm: bool
    post_norm: bool
    wide_qk_norm: bool
    has_memory: bool
    num_experts: int
    experts_per_token: int
    expert_hidden_size: int
    shared_expert_hidden_size: int
    shared_expert_gate: bool
    ngrams: MemoryConfig | None = None

    def families(self, memory: MemoryConfig | None) -> list[MemoryConfig]:
        """All kinds of memory layers of the model, of which ``memory`` is that of its variant."""
        return [family for family in (memory, self.ngrams) if family is not None]

    @property
    def query_size(self) -> int:
        """Output size of the query projection."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        """Output size of the key projection, and of the value projection."""
        return self.num_query_groups * self.kv_channels

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """Gains of the norm of queries, and of that of keys; both 0 without."""
        if not self.qk_norm:
            return 0, 0
        wide = self.query_size, self.key_value_size
        return wide if self.wide_qk_norm else (self.kv_channels, self.kv_channels)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelShape:
        """Read Megatron's flag names (or megatron-core's: ``add_bias_linear``); missing ones take Megatron's defaults.

        Raises ``ValueError`` naming the flag when a size is missing, not a positive integer or does not fit another.
        """
        hidden = _size(fields, "hidden_size")
        heads = _size(fields, "num_attention_heads")
        if not fields.get("kv_channels") and hidden % heads:
            raise ValueError(f"--hidden-size is {hidden}; expected a multiple of --num-attention-heads ({heads}), "
                             "or give --kv-channels")
        grouped = fields.get("group_query_attention", fields.get("num_query_groups") is not None)
        groups = _size(fields, "num_query_groups", heads) if grouped else heads
        if heads % groups:
            raise ValueError(f"--num-query-groups is {groups}; expected a divisor of --num-attention-heads ({heads})")
        gated = bool(fields.get("swiglu", fields.get("gated_linear_unit", False)))
        # Megatron-LM's default: 4H, or the multiple of 64 below 8/3 H that gives SwiGLU about as many weights.
        ffn_default = int(hidden * 4 * 2 / 3) // 64 * 64 if gated else 4 * hidden
        variant = fields.get("ffn_variant", "umv2")
        has_experts = variant == "moe"
        if variant not in FFN_VARIANTS and not has_experts:
            *others, last = FFN_VARIANTS
            raise ValueError(f"--ffn-variant is {variant!r}; planning knows {', '.join(others)} and {last} only")
        seq_length = _size(fields, "seq_length")
        positions = _size(fields, "max_position_embeddings", seq_length)
        linear_bias = not fields.get("disable_bias_linear", not fields.get("add_bias_linear", True))
        ffn = _size(fields, "ffn_hidden_size", ffn_default)
        shared = fields.get("moe_shared_expert_intermediate_size") if has_experts else None
        return cls(
            num_layers=_size(fields, "num_layers"),
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=_size(fields, "kv_channels", hidden // heads),
            seq_length=seq_length,
            vocab_size=padded_vocab_size(
                _size(fields, "vocab_size"), _size(fields, "make_vocab_size_divisible_by", 128),
                _size(fields, "tensor_model_parallel_size", 1),
            ),
            num_tokens=_size(fields, "vocab_size"),
            learned_positions=positions if fields.get("position_embedding_type") == "learned_absolute" else 0,
            untied=bool(fields.get("untie_embeddings_and_output_weights", False)),
            gated=gated,
            linear_bias=linear_bias,
            qkv_bias=linear_bias or bool(fields.get("add_qkv_bias", False)),
            norm_bias=fields.get("normalization", "LayerNorm") == "LayerNorm",
            qk_norm=bool(fields.get("qk_layernorm", False)),
            post_norm=fields.get("norm_placement") == "post",
            wide_qk_norm=fields.get("qk_norm_span") == "projection",
            has_memory=has_memory(variant),
            num_experts=_size(fields, "num_experts", fields.get("num_moe_experts")) if has_experts else 0,
            experts_per_token=_size(fields, "moe_router_topk", 2) if has_experts else 0,
            expert_hidden_size=_size(fields, "moe_ffn_hidden_size", ffn) if has_experts else 0,
            shared_expert_hidden_size=_size(fields, "moe_shared_expert_intermediate_size") if shared else 0,
            shared_expert_gate=bool(shared and fields.get("moe_shared_expert_gate", False)),
            ngrams=ngram_layers(fields) if has_memory(variant) else None,
        )


def _size(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer from ``fields``; None counts as missing."""
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} is {'missing' if value is None else repr(value)}; expected a positive integer")
    return value

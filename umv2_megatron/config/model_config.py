"""The decoder around the memory layers, as far as megatron-core's own dataclasses do not define it (``flags.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umv2_megatron.config.option import option
from umv2_megatron.config.variants import FFN_VARIANTS


@dataclass
class ModelConfig:
    """The decoder around the memory layers, as far as megatron-core's TransformerConfig does not describe it."""

    ffn_variant: str = option(
        "umv2",
        "what stands in the FFN slot of the blocks: FFN and memory (umv2, ultramem, memory-plus, pkm, peer, engram: "
        "each sets defaults of the memory flags), mcore's experts, or the FFN alone",
        choices=FFN_VARIANTS,
    )
    seq_length: int = option(1024, "tokens per sample", at_least=1)
    max_position_embeddings: Optional[int] = option(
        None, "longest sequence the model takes (default: --seq-length)", at_least=1
    )
    position_embedding_type: str = option(
        "rope", "kind of position embedding", choices=("rope", "learned_absolute", "none")
    )
    rotary_base: int = option(10000, "base of the rotary embedding", above=0, needs=("position_embedding_type=rope",))
    rotary_percent: float = option(
        1.0, "share of the head dimension that is rotated", above=0, at_most=1, needs=("position_embedding_type=rope",)
    )
    use_rope_scaling: bool = option(
        False,
        "low frequencies of the rotary embedding divided by --rope-scaling-factor, those in between less, as in Llama "
        "3.1 for contexts beyond 8192 tokens",
        needs=("position_embedding_type=rope",),
    )
    rope_scaling_factor: float = option(
        8.0, "by what --use-rope-scaling divides low frequencies", above=0, needs=("use_rope_scaling",)
    )
    rotary_seq_len_interpolation_factor: Optional[int] = option(
        None,
        "positions are divided by this in the rotary embedding",
        at_least=1,
        needs=("position_embedding_type=rope",),
    )
    norm_placement: str = option(
        "pre",
        "norms of a block: before attention and FFN, or behind them (OLMo 2), where memory layers read the residual "
        "stream divided by its root mean square",
        choices=("pre", "post"),
    )
    qk_norm_span: str = option(
        "head",
        "what --qk-layernorm normalises together: each head, or all heads of a token (projection, OLMo 2)",
        choices=("head", "projection"),
        needs=("qk_layernorm",),
    )
    swiglu: bool = option(True, "SwiGLU in the FFN (SiLU gate); without it the FFN uses GELU")
    group_query_attention: bool = option(False, "grouped-query attention with --num-query-groups groups")
    untie_embeddings_and_output_weights: bool = option(False, "separate weights for input and output embedding")
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this (times TP size)", at_least=1
    )
    num_layers_per_virtual_pipeline_stage: Optional[int] = option(
        None, "layers per virtual pipeline stage; turns the interleaved schedule on", at_least=1
    )

"""The settings of megatron-core that choose fused kernels; ``fusions.py`` decides where a setting is None."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Optional

from umv2_megatron.config.option import option

_ENGINE = "transformer_impl=transformer_engine"


@dataclass
class FusionSettings:
    """Fields of mcore's TransformerConfig that choose fused kernels; None: where their parts are there."""

    bias_activation_fusion: Optional[bool] = option(
        None,
        "fuse bias and activation of the FFN (default: with --swiglu on a GPU with Triton and a C compiler)",
        flags=("no-bias-swiglu-fusion", "no-bias-gelu-fusion"),
    )
    bias_dropout_fusion: Optional[bool] = option(
        None,
        "fuse bias, dropout and residual addition (default: on a GPU with Triton and a C compiler)",
        read_by="transformer/transformer_layer.py: which function adds a block's output",
    )
    apply_rope_fusion: Optional[bool] = option(
        None,
        "fused rotary embedding (default: with Transformer Engine's layers)",
        flags=("no-rope-fusion",),
        needs=(_ENGINE,),
    )
    fused_single_qkv_rope: bool = option(
        False, "rotate queries and keys inside the joint projection", needs=("apply_rope_fusion",)
    )
    masked_softmax_fusion: Optional[bool] = option(
        None,
        "fuse scale, mask and softmax of local attention that holds scores in bfloat16 (default: on a GPU with Apex's "
        "kernels)",
        read_by="transformer/dot_product_attention.py: which softmax attention takes",
    )
    gradient_accumulation_fusion: Optional[bool] = option(
        None,
        "add gradients of weights inside the matrix product (default: on a GPU with Apex's extension)",
        read_by="tensor_parallel/layers.py: how gradients of weights are added",
    )
    cross_entropy_loss_fusion: bool = option(False, "fused cross-entropy over the split vocabulary")
    cross_entropy_fusion_impl: str = option(
        "native",
        "whose fused cross-entropy: mcore's or Transformer Engine's",
        choices=("native", "te"),
        needs=("cross_entropy_loss_fusion",),
    )
    deallocate_pipeline_outputs: Optional[bool] = option(
        None,
        "free a stage's output once it is sent (default: where stages are not interleaved)",
        needs=("pipeline_model_parallel_size>1",),
        read_by="pipeline_parallel/schedules.py: memory of outputs that were sent",
    )


AUTOMATIC = tuple(field.name for field in dataclasses.fields(FusionSettings) if field.default is None)
"""Keys of the settings that ``fusions.automatic`` decides on."""

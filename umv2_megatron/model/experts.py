"""mcore's block of experts for ``--ffn-variant moe``: the model to compare memory layers with.

Experts are split over the expert-parallel group, which consists of the same ranks as a memory-parallel group of that
size, and are whole otherwise (expert tensor size 1): each tensor-parallel rank sends its own tokens.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class Experts(MoELayer):
    """mcore's ``MoELayer`` whose experts' gradients are always reduced over the ranks that hold the same experts.

    mcore marks experts' parameters ``allreduce = False``, which says so, only where an expert-parallel group has
    several ranks. With one, tensor-parallel ranks would each go their own way, as their tokens differ.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        for parameter in self.experts.parameters():
            parameter.allreduce = False


def experts_spec(config: TransformerConfig, use_engine: bool) -> ModuleSpec:
    """The spec of a block's experts, and of its shared expert if it has one, for the ``mlp`` slot."""
    spec = get_moe_module_spec(
        use_te=use_engine, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    return ModuleSpec(module=Experts, submodules=spec.submodules, metainfo=spec.metainfo)

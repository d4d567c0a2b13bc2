"""Norms where OLMo 2 has them (arXiv 2501.00656): behind attention and FFN, and over all heads of a projection at once.

    s' = s + norm(attention(s)),   s'' = s' + norm(FFN(s') + Memory(s' / rms(s')))

A memory layer is made for inputs of root mean square 1, which the residual stream is not: it reads the stream divided
by its root mean square.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from umv2_megatron.model.one_pass import OnePassAttention


class PostNormAttention(OnePassAttention):
    """mcore's ``SelfAttention`` (``OnePassAttention`` is it) with a norm of its output, the bias included.
    ``post_norm`` is the norm's spec."""

    def __init__(self, config: TransformerConfig, *args: Any, post_norm: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = build_post_norm(post_norm, config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As ``SelfAttention.forward``: [s, b, H] to ([s, b, H], None)."""
        output, bias = super().forward(*args, **kwargs)
        return self.post_layernorm(output if bias is None else output + bias), None


def build_post_norm(spec: Any, config: TransformerConfig) -> nn.Module:
    """A norm over the hidden size."""
    made: nn.Module = build_module(
        spec, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
    )
    return made


class ProjectionNorm(nn.Module):
    """RMS norm over all heads of a token together: weight [heads / TP * hn], of which each rank has its heads'.

    The mean square is over the heads of all tensor-parallel ranks. Computed in float32 or better.

    Args:
        hidden_size: hn, width of a head (mcore's name for what a norm of queries or keys is given).
        config: of the model.
        eps: added to the mean square.
        heads: of queries or keys, over all ranks.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, heads: int):
        super().__init__()
        ranks = config.tensor_model_parallel_size
        self.width = heads * hidden_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.width // ranks, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads / TP, hn] to the same."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        total = exact.square().sum((-2, -1), keepdim=True)
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            total = _SumOverRanks.apply(total)
        normed = exact * torch.rsqrt(total / self.width + self.eps)
        return (normed * self.weight.view(x.shape[-2:])).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """For mcore's checkpoints: one tensor over all tensor-parallel ranks."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        found: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(), dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
        return found


class _SumOverRanks(torch.autograd.Function):
    """The sum over tensor-parallel ranks, each of which uses it for its own heads: gradients add up, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total

"""Parts of mcore's block whose steps between the products take one pass each on CPUs (``ops/cpu_blocks.py``).

For ``--transformer-impl local``. Each class has the parameters, arguments and results of mcore's, and is mcore's
wherever the compiled functions do not apply: on a GPU, without a C++ compiler, under autocast, or with a setting that
they do not know. mcore composes these steps of PyTorch's functions, each of which makes tensors as large as its input,
whose pages the system has to make first.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor, nn
from torch.nn import functional

from umv2_megatron.ops import cpu_blocks


class OnePassFFN(MLP):
    """mcore's ``MLP``, with SwiGLU in one pass."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **others: Any) -> Any:
        """[.., H] to ([.., H], None); an expert gets the weights [..] of its tokens, ``per_token_scale``, too."""
        if not self._has_plain_swiglu() or not _compiled(hidden_states):
            return super().forward(hidden_states, per_token_scale, **others)
        gates, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(cpu_blocks.swiglu(gates, per_token_scale))

    def _has_plain_swiglu(self) -> bool:
        config = self.config
        return (
            config.gated_linear_unit
            and config.activation_func is functional.silu
            and not config.add_bias_linear
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
            and not config.use_te_activation_func
            and not config.bias_activation_fusion
        )


def experts_in_one_pass(experts: nn.Module) -> None:
    """Make each ``MLP`` of mcore's ``SequentialMLP`` a ``OnePassFFN``; other modules of experts stay as they are."""
    for each in experts.modules():
        if type(each) is MLP:
            each.__class__ = OnePassFFN  # mcore makes them and takes no other class


class OnePassRMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Like ``x`` [.., D]."""
        if self.eps is None or x.numel() == 0 or not _compiled(x, self.weight):
            return super().forward(x)
        return cpu_blocks.rms_norm(x, self.weight, self.eps)


class OnePassNorm:
    """What makes the norms of a layer: mcore's ``WrappedTorchNorm``, with RMS norms in one pass."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **others: Any) -> Any:
        """A module with the arguments of ``WrappedTorchNorm``, which refuses what PyTorch's norms cannot do."""
        made = WrappedTorchNorm(config, hidden_size, eps, **others)
        if type(made) is nn.RMSNorm:
            made.__class__ = OnePassRMSNorm  # and its weight keeps the marks that it got
        return made


class OnePassAttention(SelfAttention):
    """mcore's ``SelfAttention``, with the rotary embedding in one pass."""

    _angles: tuple[Tensor, Tensor] | None = None
    """Of queries and keys, while a forward runs that turns them here."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *others: Any,
        rotary_pos_emb: Any = None,
        **named: Any,
    ) -> Any:
        """[s, b, H] to ([s, b, H], bias)."""
        if not others and self._turns(hidden_states, rotary_pos_emb, named):
            both = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
            self._angles, rotary_pos_emb = both, None
        try:
            return super().forward(hidden_states, attention_mask, *others, rotary_pos_emb=rotary_pos_emb, **named)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *args: Any, **named: Any) -> Any:
        """As mcore's; queries and keys turned already where ``forward`` says so."""
        found = super().get_query_key_value_tensors(*args, **named)
        if self._angles is None:
            return found
        turned = (cpu_blocks.rotate(x, angles) for x, angles in zip(found[:2], self._angles))
        return (*turned, *found[2:])

    def _turns(self, hidden_states: Tensor, angles: Any, named: dict[str, Any]) -> bool:
        """Whether this forward's rotation is the plain one of all numbers of a head, at the positions of a batch."""
        config = self.config
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1  # of the sequence, on other ranks
        other = ("inference_context", "inference_params", "packed_seq_params", "sequence_len_offset")
        first = angles[0] if isinstance(angles, tuple) else angles
        return (
            isinstance(first, Tensor)
            and not (config.no_rope_freq and config.no_rope_freq[self.layer_number - 1])
            and all(named.get(name) is None for name in other)
            and first.shape == (hidden_states.shape[0] * parts, 1, 1, self.hidden_size_per_attention_head)
            and not config.rotary_interleaved
            and not config.multi_latent_attention
            and not config.apply_rope_fusion
            and not config.flash_decode
            and getattr(config, "yarn_rotary_scaling_factor", None) is None
            # in bfloat16 mcore rounds sines and products, and does so with a cache of keys, too
            and hidden_states.dtype == torch.float32
            and _compiled(hidden_states)
        )


def _compiled(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and cpu_blocks.takes(*tensors) and cpu_blocks.available()

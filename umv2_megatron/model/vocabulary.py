"""Padding of the vocabulary: rows that only make its size divisible by the ranks take no part in the model.

Embedding and output layer have ``padded`` rows, of which the tokenizer knows the first ``vocab_size``. The others are
zero from the start, get logits that softmax turns into exact zeros, and so have no gradient, and no weight decay can
move them: losses and gradients do not depend on the padding. mcore alone counts them in every denominator.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

# exp(-1e30) is an exact zero. Finite in bfloat16 and float32, because a rank may have such columns alone, whose own
# softmax is then no 0 / 0.
_NO_LOGIT = -1e30


def _no_logit(logits: Tensor, first: int) -> float:
    """What the padded columns get. -inf on a CPU where there are others: PyTorch's exp there takes twenty times as long
    for numbers whose result is too small for a float, and four times for -inf."""
    return float("-inf") if logits.is_cpu and first > 0 else _NO_LOGIT


class _LeaveOut(torch.autograd.Function):
    """Overwrite the last columns of logits in place: no copy of the largest tensor of a step."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, first: int) -> Tensor:
        ctx.mark_dirty(logits)
        logits[..., first:] = _no_logit(logits, first)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Of a softmax their gradient is an exact zero already.
        return gradient, None


def leave_padding_out(model: GPTModel, vocab_size: int) -> None:
    """Make the rows of ``model`` from ``vocab_size`` on take no part. Call it once, on a model that is just built.

    The hook stands on the output layer, so that every user of logits sees the same: training, evaluation, generation.
    """
    for weight in _weights(model):
        first = _first_padded_row(weight.shape[0], vocab_size)
        with torch.no_grad():
            weight[first:] = 0
    if not model.post_process:
        return
    rows = model.output_layer.output_size_per_partition
    first = _first_padded_row(rows, vocab_size)
    if first < rows:
        model.output_layer.register_forward_hook(
            lambda layer, given, result: (_LeaveOut.apply(result[0], first), result[1])
        )


def _weights(model: GPTModel) -> list[Tensor]:
    """The matrices [rows of this rank, H] of embedding and output layer that this stage holds."""
    found = [model.embedding.word_embeddings.weight] if model.pre_process else []
    if model.post_process and model.output_layer.weight is not None:
        found.append(model.output_layer.weight)
    return found


def _first_padded_row(rows: int, vocab_size: int) -> int:
    """Of the ``rows`` of this tensor-parallel rank, the first one that is padding; ``rows`` where none is."""
    before = rows * parallel_state.get_tensor_model_parallel_rank()
    return min(max(vocab_size - before, 0), rows)

"""The two optional auxiliary losses of a memory layer, and how their gradient joins that of the training loss.

Balance loss (arXiv 2411.12364): keeps the first stage from preferring few keys. Tucker penalty (ibid., eq. 8): keeps
the cores close to rank one, so that the first stage, which sees only the leading singular pair, picks well.
Letters: T tokens, h heads, N keys per side, R rank, K' keys kept per side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from torch import Tensor

from umv2_megatron.memory.singular_pair import singular_values


def balance_loss(key_scores: Tensor, chosen: Tensor) -> Tensor:
    """N * sum_n pbar_n f_n of one side.

    Args:
        key_scores: [T, h, N] first-stage scores; gradients flow into them.
        chosen: [T, h, K'] int64, the keys kept.

    Returns:
        A scalar that is 1 when the keys are used evenly. pbar is the softmax of the scores averaged over tokens and
        heads, f the share of each key among all kept keys (a constant for autograd).
    """
    num_keys = key_scores.shape[-1]
    probability = key_scores.softmax(-1).flatten(0, 1).mean(0)
    picked = chosen.flatten()
    # not bincount, for which the host would wait on a CUDA device
    counts = torch.zeros(num_keys, dtype=torch.int64, device=picked.device)
    counts = counts.index_add_(0, picked, torch.ones_like(picked)).to(key_scores.dtype)
    return num_keys * (probability * (counts / chosen.numel())).sum()


def tucker_penalty(cores: Tensor, margin: float) -> Tensor:
    """1/(R-1) * sum over heads and i >= 2 of max(0, sigma_i - margin)^2, without its coefficient alpha.

    ``cores`` is [C, h, R, R]; sigma_i are the singular values of their sum over C, in float32 or better. Zero when R
    is 1.
    """
    rank = cores.shape[-1]
    total = cores.sum(0)
    total = total.float() if total.dtype in (torch.bfloat16, torch.float16) else total
    if rank == 1:
        return total.sum() * 0.0
    excess = (singular_values(total)[:, 1:] - margin).clamp(min=0)
    return excess.square().sum() / (rank - 1)


def attach_loss(output: Tensor, loss: Tensor, scale: Callable[[], float]) -> Tensor:
    """Return ``output`` unchanged; in its backward, ``loss`` (a scalar) also gets the gradient ``scale()``.

    So a loss made inside a layer reaches the optimizer without travelling through the model's outputs, whatever the
    pipeline stage. ``scale`` is asked in the backward, when the schedule knows its micro-batches. mcore's
    MoEAuxLossAutoScaler does the same, but its scale is set by the schedules only in models with experts.
    """
    return _AttachLoss.apply(output, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: Callable[[], float]) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full_like(ctx.like, ctx.scale()), None


def microbatch_scale(sequence_parallel: bool) -> float:
    """What an auxiliary loss is multiplied by, so that a step's gradient holds its mean over all micro-batches.

    1 / micro-batches, because gradients are summed over them (mcore's calculator; 1 when it was not set up).
    With sequence parallelism also 1 / tensor-parallel size: each rank computes the loss on its own tokens and the
    gradients of the replicated parameters are summed over those ranks. Data-parallel ranks are averaged by mcore.
    """
    scale = 1.0
    if num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
        scale /= num_microbatches_calculator.get_num_microbatches()
    if sequence_parallel and parallel_state.model_parallel_is_initialized():
        scale /= parallel_state.get_tensor_model_parallel_world_size()
    return scale

"""Scores of all keys: products of normalised queries and normalised keys, from little that is kept for the backward.

    S[side, r, t, (head, n)] = < q[t, side, r] , k[head, side, n, :, r] >,   both RMS-normalised over Dk

(steps 1 and 2 of docs/memory-layer.md). Autograd would keep three tensors of the size of the queries for their norm and
one for the product. Here the plain queries are kept; both norms are computed again in the backward, for about a
fiftieth of the time of the layer. The keys are a parameter, so that keeping them costs nothing.

Letters: T tokens, h heads, N keys per side, R rank, R' queries per side (R, or 1 that serves every rank), Dk key dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def key_scores(query: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, epsilon: float) -> Tensor:
    """[2, R, T, h * N] in the dtype of the parameters.

    Args:
        query: [T, 2, R', Dk], as projected.
        keys: [h, 2, N, Dk, R].
        query_gain, key_gain: [Dk], the gains of the norms.
        epsilon: of both norms.
    """
    return _KeyScores.apply(query, keys, query_gain, key_gain, epsilon)


class _KeyScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, epsilon: float
    ) -> Tensor:
        ctx.save_for_backward(query, keys, query_gain, key_gain)
        ctx.epsilon = epsilon
        left, right = _normalised(query, keys, query_gain, key_gain, epsilon)
        return left @ right.transpose(-1, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, keys, query_gain, key_gain = leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            left, right = _normalised(query, keys, query_gain, key_gain, ctx.epsilon)
        # Under autocast queries, keys and their product can be of different dtypes.
        common = torch.promote_types(left.dtype, right.dtype)
        grad = grads[0].to(common)
        upstream = (
            (grad @ right.detach().to(common)).to(left.dtype),
            (grad.transpose(-1, -2) @ left.detach().to(common)).to(right.dtype),
        )
        return (*torch.autograd.grad((left, right), leaves, upstream), None)


def _normalised(
    query: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Queries [2, R, T, Dk] and keys [2, R, h * N, Dk]."""
    left = rms_norm(query, query_gain, epsilon).permute(1, 2, 0, 3).expand(-1, keys.shape[-1], -1, -1)
    return left, rms_norm(keys.permute(1, 4, 0, 2, 3), key_gain, epsilon).flatten(2, 3)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * gain along the last dimension; in float32 or better, returned in x's dtype."""
    return functional.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), epsilon)

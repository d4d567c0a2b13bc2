"""The leading singular pair of small matrices, computed where they lie, without a wait of the host.

``torch.linalg.svd`` on a CUDA device reads back whether it has converged; for the cores of a memory layer, of R x R
numbers with R mostly 2, copies to the host and back once took longer than the rest of the layer's search. Here every
step is elementwise or a batched product of R x R matrices, in float64. Training calls this function, too.

The right vector t is the leading eigenvector of B = A'A. For R = 2 it is (cos a, sin a) with tan 2a = 2 B01 / (B00 -
B11). Otherwise B is squared again and again: B^(2^n) tends to (a multiple of) t t'. The left vector is u = A t / |A t|.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The part of the second vector that is left is (sigma2 / sigma1)^(2 * 2^28): gone where the two values differ by more
# than their rounding in float32.
_SQUARINGS = 28
_TINY = 1e-300


@torch.no_grad()
def leading_pair(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """u and t, both [h, R] float32 with A t = sigma1 u, of ``matrices`` A [h, R, R], on their device.

    Their common sign is the one that makes the largest entry of t positive (of equal ones the first). Any unit vectors
    that fit where the two largest singular values are equal; of a matrix of zeros, the first unit vector, twice.
    """
    exact = matrices.double()
    right = _right_vector(exact)
    place = right.abs().argmax(-1, keepdim=True)
    right = right * torch.where(right.gather(-1, place) < 0, -1.0, 1.0)
    image = (exact @ right.unsqueeze(-1)).squeeze(-1)
    length = image.norm(dim=-1, keepdim=True)
    first = torch.zeros_like(image)
    first[:, 0] = 1.0
    left = torch.where(length > _TINY, image / length.clamp(min=_TINY), first)
    return left.float(), right.float()


def _right_vector(exact: Tensor) -> Tensor:
    """Leading right singular vector [h, R] of ``exact`` [h, R, R], of either sign."""
    squared = exact.mT @ exact
    if exact.shape[-1] == 1:
        return torch.ones_like(exact[:, 0])
    if exact.shape[-1] == 2:
        angle = 0.5 * torch.atan2(2 * squared[:, 0, 1], squared[:, 0, 0] - squared[:, 1, 1])
        return torch.stack([angle.cos(), angle.sin()], dim=-1)
    # Equal singular values leave a multiple of the projection on their space, of which any column fits.
    for _ in range(_SQUARINGS):
        squared = squared / squared.abs().amax((-2, -1), keepdim=True).clamp(min=_TINY)
        squared = squared @ squared
    lengths = squared.square().sum(-2)
    column = squared.gather(-1, lengths.argmax(-1)[:, None, None].expand(-1, squared.shape[-1], 1)).squeeze(-1)
    length = column.norm(dim=-1, keepdim=True)
    first = torch.zeros_like(column)
    first[:, 0] = 1.0
    return torch.where(length > _TINY, column / length.clamp(min=_TINY), first)

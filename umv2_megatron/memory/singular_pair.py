"""The leading singular pair of small matrices, and their singular values, without a wait of the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from umv2_megatron.ops.from_export import module_of_exports

leading_pair: Callable[[Tensor], tuple[Tensor, Tensor]] = module_of_exports("singular_pair_umv2").leading_pair
"""u and t, both [h, R], of matrices [h, R, R]; exports have the same function (``hf/singular_pair_umv2.py``)."""


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values [h, R] of ``matrices`` [h, R, R], descending, differentiable, in their dtype.

    In closed form for R = 2, without a wait of the host: with p = |(a + d, b - c)| and q = |(a - d, b + c)| they are
    (p + q) / 2 and |p - q| / 2. Otherwise by ``torch.linalg``, which makes the host wait on a CUDA device.
    """
    if matrices.shape[-1] != 2:
        return torch.linalg.svdvals(matrices)
    a, b, c, d = matrices.flatten(-2).unbind(-1)
    tiny = torch.finfo(matrices.dtype).tiny  # where both are 0 the root has no slope
    p = ((a + d).square() + (b - c).square() + tiny).sqrt()
    q = ((a - d).square() + (b + c).square() + tiny).sqrt()
    return torch.stack([(p + q) / 2, (p - q).abs() / 2], dim=-1)

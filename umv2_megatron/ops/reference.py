"""The lookup in plain PyTorch: the oracle for every other backend, on any device and in any dtype.

Autograd derives the backward, so the tables get a fresh dense gradient per call: right, readable and slow.
Letters as in ``interface.py``.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor
from torch.nn import functional

from umv2_megatron.ops.interface import activate, pre_value_scores


def lookup(
    rows: Tensor,
    blocks: Optional[Tensor],
    scores: Tensor,
    projected: Optional[Tensor],
    pre_values: Optional[Tensor],
    values: Tensor,
    num_blocks: int,
    activation: str,
) -> Tensor:
    """See ``interface.TableLookup``. Weights and sums are kept in the dtype of ``scores`` until the end."""
    tokens, picks = rows.shape
    cores = scores.shape[-1]
    weights = scores
    if pre_values is not None:
        assert projected is not None, "pre-values need the projected input"
        rho = pre_value_scores(rows, projected, pre_values).to(scores.dtype)
        weights = scores * activate(rho, activation).unsqueeze(-1)
    slices = functional.embedding(rows, values).to(scores.dtype).view(tokens, picks, cores, values.shape[1] // cores)
    weighted = (weights.unsqueeze(-1) * slices).flatten(2)
    if num_blocks == 1:
        return weighted.sum(1).to(values.dtype)
    assert blocks is not None, "several blocks need the block of each pick"
    summed = weighted.new_zeros(tokens, num_blocks, values.shape[1])
    summed = summed.scatter_add(1, blocks.unsqueeze(-1).expand_as(weighted), weighted)
    return summed.flatten(1).to(values.dtype)

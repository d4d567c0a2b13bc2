"""The contract between the memory layer and whatever looks rows up in a value table.

Letters: T tokens, P picks of a token (heads * K), C cores, E virtual blocks with a projection of their own,
A rows of the table, Dp pre-value dim, Dv value dim.

A lookup computes, for token t and the slice of the value dimension that core c scales (columns c*Dv/C to
(c+1)*Dv/C),

    out[t, e, slice c] = sum over picks p with blocks[t, p] = e of
                         scores[t, p, c] * rho[t, p] * values[rows[t, p], slice c]
    rho[t, p]          = activation(<pre_values[rows[t, p]], projected[t]>), or 1 without pre-values

(arXiv 2508.18756, the PEER form of section 4; virtual blocks: arXiv 2411.12364, implicit value expansion).
A row picked twice contributes twice. A new backend is a new file with one function of this signature and one line
in ``get_backend``.
"""

from __future__ import annotations

from typing import Optional, Protocol

import torch
from torch import Tensor
from torch.nn import functional


class TableLookup(Protocol):
    """Weighted sum of the picked rows, differentiable in scores, projected, pre_values and values."""

    def __call__(
        self,
        rows: Tensor,
        blocks: Optional[Tensor],
        scores: Tensor,
        projected: Optional[Tensor],
        pre_values: Optional[Tensor],
        values: Tensor,
        num_blocks: int,
        activation: str,
    ) -> Tensor:
        """Look ``rows`` up and add them.

        Args:
            rows: [T, P] int64, each in [0, A).
            blocks: [T, P] int64, each in [0, E); may be None when E is 1.
            scores: [T, P, C] floating point, at least as precise as ``values``.
            projected: [T, Dp] in the dtype of ``pre_values``; None without pre-values.
            pre_values: [A, Dp] parameter or None.
            values: [A, Dv] parameter, C divides Dv.
            num_blocks: E.
            activation: "none" or "gelu" (exact, erf), applied to rho.

        Returns:
            [T, E * Dv] in the dtype of ``values``, block-major.

        The gradients of the two tables go into ``main_grad`` where the parameter has one, and to autograd otherwise.
        """
        ...


def get_backend(name: str, device: torch.device | str) -> TableLookup:
    """Return the lookup called ``name``: "reference", "scatter", or "auto" (the fastest there is for ``device``).

    Raises ``ValueError`` for a name that is none of these.
    """
    # Imported here because each backend imports pre_value_scores from this file.
    from umv2_megatron.ops import reference, scatter

    lookups: dict[str, TableLookup] = {"reference": reference.lookup, "scatter": scatter.lookup}
    if name == "auto":
        name = "scatter"  # as yet the fastest on every device
    if name not in lookups:
        raise ValueError(f"--memory-backend is {name}; expected one of auto, {', '.join(lookups)}")
    return lookups[name]


def pre_value_scores(rows: Tensor, projected: Tensor, pre_values: Tensor) -> Tensor:
    """rho before its activation: [T, P] from ``rows`` [T, P], ``projected`` [T, Dp] and ``pre_values`` [A, Dp]."""
    return torch.bmm(functional.embedding(rows, pre_values), projected.unsqueeze(-1)).squeeze(-1)


def activate(rho: Tensor, activation: str) -> Tensor:
    """The activation called ``activation`` ("none" or "gelu"), element by element."""
    assert activation in ("none", "gelu"), activation
    return functional.gelu(rho) if activation == "gelu" else rho


def activation_backward(grad: Tensor, rho: Tensor, activation: str) -> Tensor:
    """Gradient of rho from ``grad``, that of ``activate(rho, activation)``."""
    return torch.ops.aten.gelu_backward(grad, rho) if activation == "gelu" else grad

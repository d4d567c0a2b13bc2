"""The contracts between the memory layer and whatever searches its keys and looks rows up in its value table.

Letters: T tokens, P picks of a token (heads * K), C cores, E virtual blocks with a projection of their own,
A rows of the table, Dp pre-value dim, Dv value dim.

A lookup computes, for token t and the slice of the value dimension that core c scales (columns c*Dv/C to
(c+1)*Dv/C),

    out[t, e, slice c] = sum over picks p with blocks[t, p] = e of
                         scores[t, p, c] * rho[t, p] * values[rows[t, p], slice c]
    rho[t, p]          = activation(<pre_values[rows[t, p]], projected[t]>), or 1 without pre-values

(arXiv 2508.18756, the PEER form of section 4; virtual blocks: arXiv 2411.12364, implicit value expansion).
A row picked twice contributes twice. A backend is this whole lookup, differentiable, and for tables that are shared
out over ranks its parts without autograd, on a [T, P] grid of picks and on a list of picks. ``registry.py`` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class PickOrder:
    """The picks of one lookup in the order of their rows, for backends that add the gradients of tables in that order.

    Whoever needs it first makes it: both tables share it, and it can be made before the backward (``Backend``).
    """

    made: Any = None
    """What the backend keeps, or None."""


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


class GridParts(Protocol):
    """Steps of the lookup without autograd, for picks on a [T, P] grid; ``scatter.py`` states them in plain PyTorch."""

    def pre_scores(self, rows: Tensor, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
        """rho before its activation, [T, P] in ``dtype``; with some of the Dp columns, their part of the sum."""
        ...

    def weighted_sum(
        self, rows: Tensor, blocks: Optional[Tensor], weights: Tensor, values: Tensor, num_blocks: int
    ) -> Tensor:
        """[T, E * Dv] in the dtype of ``values``: the sum at the top, ``weights`` [T, P, C] being scores * rho."""
        ...

    def weighted_sum_backward(
        self,
        rows: Tensor,
        blocks: Optional[Tensor],
        weights: Tensor,
        grad_out: Tensor,
        values: Tensor,
        value_sum: Optional[Tensor],
        order: Optional[PickOrder] = None,
    ) -> Tensor:
        """From ``grad_out`` [T, E, Dv] to the gradient of ``weights``; that of the table is added to ``value_sum``
        [A, Dv], in a floating-point dtype of its own, unless that is None. ``order``: of these ``rows``; backends that
        sort nothing take no notice."""
        ...

    def pre_scores_backward(
        self, rows: Tensor, rho_grad: Tensor, projected: Tensor, pre_values: Tensor, pre_value_sum: Optional[Tensor],
        order: Optional[PickOrder] = None,
    ) -> Tensor:  # fmt: skip
        """From ``rho_grad`` [T, P] to the gradient of ``projected`` [T, Dp]; the table's is added to
        ``pre_value_sum`` unless that is None."""
        ...


@dataclass(frozen=True)
class ListedPicks:
    """n picks in a list, sorted by token; a token has any number of them, also none."""

    rows: Tensor
    """[n] int64, each in [0, A)."""
    tokens: Tensor
    """[n] int64, ascending: the token of each pick."""
    counts: Tensor
    """[T] int64: the picks of each token."""
    blocks: Optional[Tensor] = None
    """[n] int64, each in [0, E); None when E is 1."""
    num_blocks: int = 1
    """E."""
    order: PickOrder = field(default_factory=PickOrder, compare=False)


class RaggedParts(Protocol):
    """The same steps for picks in a list; ``ragged.py`` states them in plain PyTorch.

    ``weights`` is [n, C], ``projected`` [T, Dp], ``pre_values`` [A, Dp], ``values`` [A, Dv], ``grad_out`` [T, E, Dv].
    """

    def pre_scores(self, picks: ListedPicks, projected: Tensor, pre_values: Tensor, dtype: torch.dtype) -> Tensor:
        """rho before its activation, [n] in ``dtype``."""
        ...

    def weighted_sum(self, picks: ListedPicks, weights: Tensor, values: Tensor) -> Tensor:
        """[T, E * Dv] in the dtype of ``values``."""
        ...

    def weighted_sum_backward(
        self, picks: ListedPicks, weights: Tensor, grad_out: Tensor, values: Tensor, value_sum: Optional[Tensor]
    ) -> Tensor:
        """The gradient of ``weights``, [n, C]; the table's is added to ``value_sum`` unless that is None."""
        ...

    def pre_scores_backward(
        self,
        picks: ListedPicks,
        rho_grad: Tensor,
        projected: Tensor,
        pre_values: Tensor,
        pre_value_sum: Optional[Tensor],
    ) -> Tensor:
        """From ``rho_grad`` [n] to the gradient of ``projected``, [T, Dp]; the table's is added to ``pre_value_sum``
        unless that is None."""
        ...


class Search(Protocol):
    """The two stages of retrieval and the scores of what they pick; ``search.py`` has the equations and letters.

    ``key_scores`` is [2, R, T, h, N], float32 or float64, contiguous; of a module with READS_HALVES also bfloat16 or
    float16, for the same results as with their values in float32.
    """

    def best_keys(self, key_scores: Tensor, u: Tensor, t: Tensor, kept: int) -> Tensor:
        """The ``kept`` (at most N) best keys of either side, [2, T, h, K'] int64; u and t are [h, R]."""
        ...

    def best_cells(self, key_scores: Tensor, keys: Tensor, cores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """Row and column keys, [T, h, K] int64 each, of the ``topk`` best cells of the grid that ``keys``, found by
        ``best_keys``, span. ``cores`` [h, R, R] is the sum of all cores."""
        ...

    def cell_scores(self, key_scores: Tensor, rows: Tensor, columns: Tensor, cores: Tensor) -> Tensor:
        """[T, h, K, C]: the scores of the cells with row keys ``rows`` and column keys ``columns``, both [T, h, K],
        under each of ``cores`` [C, h, R, R]. Differentiable in ``key_scores`` and ``cores``; does not keep
        ``key_scores`` for the backward."""
        ...


class Retrieve(Protocol):
    """From projected queries to scored picks in one piece, where norms, products and search are not apart: the same as
    key scores (``memory/key_scores.py``) and ``Search``. Differentiable in all parameters; float32 only."""

    def __call__(
        self, query: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, epsilon: float, u: Tensor, t: Tensor,
        cores: Tensor, kept: int, topk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Cells i * N + j, [T, h, K] int64, and their scores [T, h, K, C].

        Args:
            query: [T, 2, R', Dk], as projected; R' is R or 1.
            keys: [h, 2, N, Dk, R].
            query_gain, key_gain: [Dk], the gains of the norms.
            epsilon: of both norms.
            u, t: [h, R].
            cores: [C, h, R, R].
            kept: K', at most N.
            topk: K, at most K' * K'.
        """
        ...


@dataclass(frozen=True)
class Backend:
    """One way to search and to look up. A module with the functions of a protocol is one of its kind."""

    name: str
    search: Search
    lookup: TableLookup
    """In a whole table."""
    grid: Optional[GridParts] = None
    """For tables shared out by column; None: such tables are refused."""
    ragged: Optional[RaggedParts] = None
    """For tables shared out by row; None: such tables are refused."""
    sort_ahead: Optional[Callable[[Tensor, int, PickOrder], None]] = None
    """Of a backend whose backward sorts picks: sort ``rows`` [T, P] of a whole table of A rows already now, for a
    lookup that is given the same ``PickOrder`` as ``order``. None: the lookup takes no such argument."""
    retrieve: Optional[Retrieve] = None
    """Of a backend that has it: retrieval in one piece."""


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

"""Muon: momentum whose matrices are orthogonalised, as megatron-core has it, for whole and for split matrices.

For a matrix W [rows, columns] with gradient G, learning rate a, weight decay w and momentum b:

    M = b M + (1 - b) G                              momentum_buffer
    D = M, or (1 - b) G + b M with Nesterov's rule
    W = (1 - a w) W - a s NS(D)

NS brings all singular values of D near 1 by the Newton-Schulz iteration (Jordan et al. 2024, "Muon: an optimizer for
hidden layers in neural networks"), s is a factor of the matrix's shape (``scale_factor``). A matrix that tensor
parallelism splits is orthogonalised part by part, or as a whole; see ``--muon-tp-mode``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# x -> a x + b x^3 + c x^5 on every singular value, a step each, then from the first again. Found by You (2025,
# leloykun.github.io/ponder/muon-opt-coeffs); "quintic" in NVIDIA's emerging-optimizers, which mcore's Muon uses.
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class Matrix:
    """What Muon has to know of one parameter.

    ``split``: dimension along which the ranks of ``group`` hold parts, None for a matrix that this rank has whole (or
    that is updated part by part); ``heads``: rows of queries, keys, values, ... in each of the equal blocks of rows
    that a fused projection consists of, None for a matrix that is orthogonalised as one.
    """

    split: Optional[int] = None
    group: Optional[ProcessGroup] = None
    heads: Optional[tuple[int, ...]] = None


@dataclass(frozen=True)
class MuonRule:
    """The numbers and modes of an update: the flags ``--muon-*``."""

    momentum: float
    nesterov: bool
    steps: int
    scale_mode: str
    extra_scale_factor: float
    precision: str
    distributed: bool
    decoupled: bool


class Muon(torch.optim.Optimizer):
    """Muon over matrices, with ``momentum_buffer`` [like the matrix], float32, for each.

    The number of steps is ``step`` of each parameter group. All ranks of a ``Matrix.group`` must have the same matrices
    in the same order, as they exchange parts while they update.

    Args:
        groups: parameter groups with lr and weight_decay; all their tensors are matrices, float32.
        matrices: of every tensor in the groups.
        rule: see there.
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: Mapping[Tensor, Matrix], rule: MuonRule) -> None:
        super().__init__([{"params": []}], {})
        self.param_groups = groups
        self.matrices = dict(matrices)
        self.rule = rule
        held = [tensor for group in groups for tensor in group["params"]]
        assert all(tensor.dim() == 2 and tensor in self.matrices for tensor in held), "Muon is for matrices"
        for group in groups:
            group.setdefault("step", 0)

    def allocate(self) -> None:
        """Make the state of before the first step, where there is none yet."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if not self.state[matrix]:
                    self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. ``closure`` is there for torch's interface."""
        assert closure is None, "no loss is evaluated again"
        self.allocate()
        rule = self.rule
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            group["step"] += 1
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                gradient = matrix.grad
                if rule.decoupled:
                    matrix.mul_(1 - rate * decay)
                elif decay:
                    gradient = gradient.add(matrix, alpha=decay)
                mean = self.state[matrix]["momentum_buffer"].lerp_(gradient, 1 - rule.momentum)
                direction = gradient.lerp(mean, rule.momentum) if rule.nesterov else mean
                matrix.sub_(self._update(direction, self.matrices[matrix]), alpha=rate)

    def _update(self, direction: Tensor, matrix: Matrix) -> Tensor:
        """What ``direction`` is after orthogonalisation and scaling, in the parts that ``matrix`` names."""
        if matrix.heads is None:
            return self._scaled(direction, matrix)
        blocks = direction.view(-1, sum(matrix.heads), direction.shape[1])
        parts = [
            self._scaled(part.reshape(-1, direction.shape[1]), matrix).view_as(part)
            for part in blocks.split(matrix.heads, dim=1)
        ]
        return torch.cat(parts, dim=1).view_as(direction)

    def _scaled(self, direction: Tensor, matrix: Matrix) -> Tensor:
        rule = self.rule
        shape = list(direction.shape)
        if matrix.split is not None:
            assert matrix.group is not None, "a split matrix has its group"
            shape[matrix.split] *= matrix.group.size()
        factor = scale_factor(shape[0], shape[1], rule.scale_mode) * rule.extra_scale_factor
        if matrix.split is None:
            return orthogonalized(direction, rule.steps, rule.precision) * factor
        assert matrix.group is not None
        if rule.distributed:
            return orthogonalized(direction, rule.steps, rule.precision, matrix.split, matrix.group) * factor
        parts = [torch.empty_like(direction) for _ in range(matrix.group.size())]
        torch.distributed.all_gather(parts, direction.contiguous(), group=matrix.group)
        whole = orthogonalized(torch.cat(parts, dim=matrix.split), rule.steps, rule.precision)
        return whole.chunk(matrix.group.size(), dim=matrix.split)[matrix.group.rank()] * factor


def scale_factor(rows: int, columns: int, mode: str) -> float:
    """Factor of an orthogonal update of a matrix [rows, columns].

    spectral: the root of the larger side, with which a number of the update has a root mean square of 1 (Liu et al.
    2025, arXiv 2502.16982); unit_rms_norm: Pethick et al. 2025, arXiv 2502.07529; shape_scaling: Jordan et al. 2024.
    """
    if mode == "spectral":
        return math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(ratio if mode == "unit_rms_norm" else max(1.0, ratio))


def orthogonalized(
    matrix: Tensor,
    steps: int,
    precision: str = "highest",
    split: Optional[int] = None,
    group: Optional[ProcessGroup] = None,
) -> Tensor:
    """The matrix with the same singular vectors and singular values near 1, float32.

    Args:
        matrix: [rows, columns], float32; with ``split`` this rank's part of it.
        steps: of the iteration.
        precision: of its products: medium (bfloat16), high (TensorFloat-32 where there is such) or highest.
        split: dimension along which ``group`` holds the matrix; its ranks then add up their parts of X X^T.
    """
    # The products are with X X^T, which is the smaller the fewer rows X has; of parts only the columns may be missing.
    turned = matrix.shape[0] > matrix.shape[1] if split is None else split == 0
    x = matrix.mT if turned else matrix
    square = x.square().sum()
    if split is not None:
        torch.distributed.all_reduce(square, group=group)
    x = x / square.sqrt().clamp_min(_SMALLEST_NORM)
    if precision == "medium":
        x = x.bfloat16()
    with _products(precision):
        for a, b, c in itertools.islice(itertools.cycle(COEFFICIENTS), steps):
            gram = x @ x.mT
            if split is not None:
                torch.distributed.all_reduce(gram, group=group)
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.float()
    return x.mT if turned else x


@contextlib.contextmanager
def _products(precision: str) -> Iterator[None]:
    """Inside, float32 products are as ``precision`` says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

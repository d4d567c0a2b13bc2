"""From a token to the cells it picks: Tucker-decomposed query-key retrieval (arXiv 2411.12364, section 3.2).

A cell (i, j) of the N x N grid is addressed by a row key i and a column key j. Its score under core c is the bilinear
form Srow[i]^T Cc[c] Scol[j] of the R-dimensional scores of its two keys. Scoring all N^2 cells is out of
question, so the search has two stages: the leading singular vectors u, t of the summed cores turn the two sides into
plain scores a and b, whose best K' = min(K, cap) keys span a small grid that is scored exactly. Here: queries, keys and
the scores of all keys; the search among them is a backend's (``ops/search.py``).

Letters: T tokens, H hidden, h heads, N keys per side, R rank, C cores, K values kept per head, K' keys kept per side,
Dk key dim. "Side" 0 is the row, 1 the column.

Precision: the projection and the scoring product run in the dtype of the parameters; the norms, both stages of the
selection and the scores that are returned are float32 (float64 in a float64 model), because neighbours in the ranking
are close and bfloat16 would tie them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.key_scores import key_scores
from umv2_megatron.memory.losses import balance_loss
from umv2_megatron.memory.singular_pair import leading_pair, singular_values
from umv2_megatron.ops import get_backend
from umv2_megatron.ops.interface import Retrieve, Search
from umv2_megatron.ops.search import first_stage_scores


@dataclass
class Picks:
    """What retrieval found for T tokens. Each head's K picks lie together, in descending order of summed score."""

    grid: Tensor
    """[T, h * K] int64: i * N + j."""
    scores: Tensor
    """[T, h * K, C]: the score of each pick under each core; differentiable."""
    balance: Optional[Tensor]
    """The balance loss of both sides, a scalar; None when its coefficient is 0."""


class Projection(nn.Module):
    """y = x W^T without bias; ``weight`` [rows, columns] is left uninitialised (see initialization.py)."""

    def __init__(self, columns: int, rows: int, **tensor_options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, **tensor_options))

    def forward(self, x: Tensor) -> Tensor:
        """[..., columns] to [..., rows]."""
        return functional.linear(x, self.weight)


class QueriesAndKeys(nn.Module):
    """What every kind of retrieval has: queries, keys and their norms, and a balance loss of the keys that are kept.

    Parameters: ``query.weight`` [config.query_rows, H], ``keys`` [h, 2, N, Dk, R], and as ``config.qk_norm`` says
    ``query_norm`` and ``key_norm`` [Dk], else None.
    """

    def __init__(
        self,
        config: MemoryConfig,
        hidden_size: int,
        num_keys: int,
        params_dtype: torch.dtype = torch.float32,
        device: Optional[torch.device | str] = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_keys = num_keys
        options: dict[str, Any] = {"dtype": params_dtype, "device": device}
        dim = config.key_dim
        self.query = Projection(hidden_size, config.query_rows, **options)
        self.keys = nn.Parameter(torch.empty(config.num_heads, 2, num_keys, dim, config.tucker_rank, **options))
        self.query_norm = nn.Parameter(torch.empty(dim, **options)) if config.qk_norm != "none" else None
        self.key_norm = nn.Parameter(torch.empty(dim, **options)) if config.qk_norm == "both" else None
        self.refresh_due = False
        """Whether the next forward refreshes singular vectors first, if there are any. How a training step asks for it:
        with mcore's --overlap-param-gather the new cores are only there once this module's forward begins."""

    def search(self, device: torch.device) -> Search:
        """The backend's search for ``device``. Whoever compares two models (``conversion/picks.py``) looks in here."""
        return get_backend(self.config.backend, device).search

    def one_piece(self, device: torch.device) -> Optional[Retrieve]:
        """The backend's retrieval in one piece for ``device``, if it has any; whoever looks into the search gives
        None here."""
        return get_backend(self.config.backend, device).retrieve

    def balance(self, sides: Iterable[Tensor], keys: Tensor) -> Optional[Tensor]:
        """The balance loss of both sides, or None where nothing asks for it.

        Args:
            sides: the first-stage scores of all keys, [T, h, N] for each side; computed only where there is a loss.
            keys: [2, T, h, K'] int64, those that the first stage kept.
        """
        if self.config.balance_loss_coeff == 0 or not torch.is_grad_enabled():
            return None
        row_loss, column_loss = (balance_loss(side, chosen) for side, chosen in zip(sides, keys))
        return row_loss + column_loss


class Retrieval(QueriesAndKeys):
    """Queries, keys, cores, and the two-stage search.

    ``query.weight`` is side-major, then rank: [2 * R' * Dk, H], where R' is R with per-rank queries, else 1. Queries
    and keys are both normalised. Further parameters: ``cores`` [C, h, R, R].
    Buffers: ``u`` and ``t`` [h, R], float32 whatever the parameters' dtype, zero until ``refresh_singular_vectors``.
    """

    query_norm: nn.Parameter
    key_norm: nn.Parameter
    u: Tensor
    t: Tensor

    def __init__(self, config: MemoryConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        heads, rank = config.num_heads, config.tucker_rank
        self.cores = nn.Parameter(self.keys.new_empty(config.num_cores, heads, rank, rank))
        for name in ("u", "t"):
            vector = torch.zeros(heads, rank, dtype=torch.float32, device=self.keys.device)
            self.register_buffer(name, vector)

    def forward(self, x: Tensor) -> Picks:
        """Pick cells for ``x`` [T, H], the normalised input of the FFN."""
        if self.refresh_due:
            self.refresh_singular_vectors()
        found = self._in_one_piece(x)
        if found is not None:
            grid, cell_scores = found
            return Picks(grid=grid.flatten(1), scores=cell_scores.flatten(1, 2), balance=None)
        search = self.search(x.device)
        scores = self.key_scores(x, as_computed=reads_halves(search))
        keys = search.best_keys(scores, self.u, self.t, self.config.key_topk)
        total = self.cores.detach().sum(0, dtype=torch.promote_types(scores.dtype, torch.float32))
        rows, columns = search.best_cells(scores, keys, total, self.config.topk)
        return Picks(
            grid=torch.add(columns, rows, alpha=self.num_keys).flatten(1),
            scores=search.cell_scores(scores, rows, columns, self.cores).flatten(1, 2),
            balance=self.balance(self._sides(scores), keys),
        )

    def _in_one_piece(self, x: Tensor) -> Optional[tuple[Tensor, Tensor]]:
        """Cells and their scores by the backend's ``retrieve``; None where the steps must be apart, because there is no
        such function, or a balance loss that reads the scores of all keys, or a dtype that it does not take."""
        config, retrieve = self.config, self.one_piece(x.device)
        if (
            retrieve is None
            or (config.balance_loss_coeff != 0 and torch.is_grad_enabled())
            or any(each.dtype != torch.float32 for each in (x, *self.parameters()))
            or torch.is_autocast_enabled(x.device.type)
        ):
            return None
        return retrieve(
            self._queries(x), self.keys, self.query_norm, self.key_norm, config.norm_epsilon, self.u, self.t,
            self.cores, config.key_topk, config.topk,
        )  # fmt: skip

    def _queries(self, x: Tensor) -> Tensor:
        """[T, 2, R', Dk] of ``x`` [T, H]."""
        config = self.config
        return self.query(x).view(x.shape[0], 2, config.query_rows // (2 * config.key_dim), config.key_dim)

    def _sides(self, scores: Tensor) -> Iterator[Tensor]:
        """The first-stage scores of all keys, [T, h, N] for each side, differentiable; computed when asked for."""
        # Copies, because autograd keeps what it is given until the backward, and the next refresh may come earlier:
        # under pipeline parallelism other forwards run first. The buffers themselves stay where they are.
        u, t, scores = self.u.clone(), self.t.clone(), at_least_float32(scores)
        for side in (0, 1):
            yield first_stage_scores(scores, u, t, side)

    def key_scores(self, x: Tensor, as_computed: bool = False) -> Tensor:
        """Scores of every key, [2, R, T, h, N], of ``x`` [T, H]: step 1 and 2 of docs/memory-layer.md.

        In float32 or better, or ``as_computed``, in the dtype of the parameters, for a search that converts what it
        reads: the same numbers in half the memory.
        """
        config = self.config
        scores = key_scores(self._queries(x), self.keys, self.query_norm, self.key_norm, config.norm_epsilon)
        scores = scores if as_computed else at_least_float32(scores)
        return scores.view(2, config.tucker_rank, x.shape[0], config.num_heads, self.num_keys)

    def refresh_singular_vectors(self) -> None:
        """Set u and t to the leading singular pair of the summed cores; call once per optimizer step, and after load.

        Both are written in place: no forward may hand the buffers to autograd (see ``_sides``).
        The pair's common sign is chosen so that it stays near the previous pair (smaller L1 distance; a tie keeps
        that of ``leading_pair``). Every rank computes it from equal cores by the same operations, without waiting for
        the device.
        """
        refresh_together([self])

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """Singular values of the summed cores, [h, R], float32, in descending order; changes nothing."""
        return singular_values(self.cores.detach().sum(0, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Retrieval:
        # mcore turns whole models to bfloat16 by module.bfloat16(); u and t must not lose bits by that.
        exact = {"u": self.u, "t": self.t}
        super()._apply(fn, recurse)
        for name, vector in exact.items():
            converted = getattr(self, name)
            if converted.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, vector.to(converted.device))
        return self


@torch.no_grad()
def refresh_together(layers: Sequence[QueriesAndKeys]) -> None:
    """``refresh_singular_vectors`` of all ``layers``, which are alike, in as many small operations as one takes."""
    for each in layers:
        each.refresh_due = False
    tucker = [each for each in layers if isinstance(each, Retrieval)]
    if not tucker:
        return
    heads = tucker[0].u.shape[0]
    cores = torch.stack([each.cores.detach() for each in tucker])
    u, t = leading_pair(cores.sum(1, dtype=torch.float32).flatten(0, 1))
    pair = torch.stack([u, t])
    before = torch.stack([torch.cat([each.u for each in tucker]), torch.cat([each.t for each in tucker])])
    kept, flipped = (distance.abs().sum((0, -1)) for distance in (pair - before, pair + before))
    pair = pair * torch.where(flipped < kept, -1.0, 1.0).unsqueeze(-1)
    buffers = [vector for each in tucker for vector in (each.u, each.t)]
    torch._foreach_copy_(buffers, [part for each in pair.split(heads, dim=1) for part in each])


def reads_halves(search: Search) -> bool:
    """Whether ``search`` takes key scores of 16 bits and computes with them in float32."""
    return bool(getattr(search, "READS_HALVES", False))


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, in float32 when its dtype is a half one."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

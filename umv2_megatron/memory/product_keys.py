"""From a token to the cells it picks with additive scores: product keys (arXiv 1907.05242), for Memory+, PKM and PEER.

A cell (i, j) of the N x N grid has the score a_i + b_j, the sum of what the row query gives row key i and the column
query column key j. The K best cells can be found exactly: with both sides sorted, a cell in places (m, n) has
(m+1)(n+1) cells that are at least as good, itself included, so only places with (m+1)(n+1) <= K come into question,
about K ln K of them. The K scores of a head may then be replaced by their softmax.

``ProductKeys`` has the interface of ``retrieval.Retrieval``: the same ``Picks``, with one "core" (C = 1), and nothing
to refresh. Letters as there: T tokens, H hidden, h heads, N keys per side, K values kept per head, K' = min(K, cap)
keys kept per side, Dk key dim. "Side" 0 is the row, 1 the column.

Precision: the projection and the scoring product run in the dtype of the parameters; norms, selection, sums and the
softmax in float32 or better.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from umv2_megatron.memory.key_scores import key_scores, rms_norm
from umv2_megatron.memory.retrieval import Picks, QueriesAndKeys, at_least_float32
from umv2_megatron.ops.search import gather_keys


class ProductKeys(QueriesAndKeys):
    """Queries, keys, and the search for the cells with the largest sums.

    ``query.weight`` is head-major, then side: [2 * h' * Dk, H], where h' is h with per-head queries, else 1. R is 1.
    There are no singular vectors to refresh.
    """

    def forward(self, x: Tensor) -> Picks:
        """Pick cells for ``x`` [T, H], the normalised input of the FFN."""
        config = self.config
        every = self.key_scores(x)
        one = torch.ones(config.num_heads, 1, dtype=torch.float32, device=x.device)
        keys = self.search(x.device).best_keys(every, one, one, config.key_topk)
        row_scores, column_scores = gather_keys(every, keys)[:, 0].unbind(0)
        rows, columns = _candidates(config.topk, config.key_topk, x.device)
        sums = row_scores.index_select(-1, rows) + column_scores.index_select(-1, columns)
        with torch.no_grad():
            best = sums.topk(config.topk, dim=-1).indices
            row_keys = keys[0].gather(-1, rows[best])
            column_keys = keys[1].gather(-1, columns[best])
        scores = gather_keys(sums.unsqueeze(0), best)[0]
        if config.score_normalization == "softmax":
            scores = scores.softmax(-1)
        return Picks(
            grid=torch.add(column_keys, row_keys, alpha=self.num_keys).flatten(1),
            scores=scores.flatten(1).unsqueeze(-1),
            balance=self.balance((every[side, 0] for side in (0, 1)), keys),
        )

    def key_scores(self, x: Tensor) -> Tensor:
        """Scores of every key, [2, 1, T, h, N], of ``x`` [T, H]."""
        config, dim = self.config, self.config.key_dim
        query = self.query(x).view(x.shape[0], config.query_rows // (2 * dim), 2, dim)
        if self.query_norm is not None and self.key_norm is not None:
            # Heads take the place of ranks there: [T, 2, h', Dk] and [1, 2, N, Dk, h] to [2, h, T, N].
            per_rank = self.keys.permute(4, 1, 2, 3, 0)
            scores = key_scores(query.transpose(1, 2), per_rank, self.query_norm, self.key_norm, config.norm_epsilon)
        else:
            if self.query_norm is not None:
                query = rms_norm(query, self.query_norm, config.norm_epsilon)
            # [2, h, T, Dk] x [2, h, Dk, N]; a shared query serves every head.
            query = query.permute(2, 1, 0, 3).expand(-1, config.num_heads, -1, -1)
            scores = query @ self.keys.squeeze(-1).permute(1, 0, 3, 2)
        return at_least_float32(scores).transpose(1, 2).contiguous().unsqueeze(1)

    @torch.no_grad()
    def refresh_singular_vectors(self) -> None:
        """There are none."""
        self.refresh_due = False

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """None: an empty tensor [h, 0]."""
        return torch.zeros(self.config.num_heads, 0)


@functools.cache
def _candidates(topk: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places (m, n) of both sorted sides, int64 each, that can be among the ``topk`` best: (m+1)(n+1) <= K.

    Made once: a copy to the device makes the host wait.
    """
    places = [(m, n) for m in range(kept) for n in range(min(kept, topk // (m + 1)))]
    rows, columns = zip(*places)
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)

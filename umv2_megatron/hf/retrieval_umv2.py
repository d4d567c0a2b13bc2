"""From a token to the table cells that it picks, and their scores: what memory layers of UltraMemV2 search.

A cell (i, j) of the N x N grid is addressed by a row key i and a column key j. Its score is the Tucker form of the two
keys' scores (``UMv2Retrieval``, arXiv 2411.12364: a first stage keeps K' keys per side, a second scores the cells of
their grid), or their sum (``UMv2ProductKeys``, arXiv 1907.05242).

Decoding has a few tokens per step, so that the count of small operations decides. The normalised keys are kept between
calls on a CPU while autograd is off, as long as the keys have the same contents (``normalised_keys``). And what the
configuration says is read once, because transformers looks for each of its attributes in several places.

Letters: T tokens, H hidden, h heads, N keys per side, R rank, C cores, K values kept per head, K' = min(K, cap) keys
kept per side, P = h * K picks of a token, Dk key dim. Side 0 is the row.

Precision: projections and key scores in the dtype of the parameters; norms, selection and scores in float32 or better.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_umv2 import UMv2Config
from .linear_umv2 import in_parts, project
from .lookup_umv2 import search
from .singular_pair_umv2 import leading_pair

# Cells of second-stage grids that are held at once: 64 MB in float32.
_GRID_CELLS = 1 << 24


class UMv2QueriesAndKeys(nn.Module):
    """What both kinds of retrieval have: the parameters of queries and keys, and what is kept of the keys.

    ``query.weight`` [memory_query_rows, H], ``keys`` [h, 2, N, Dk, R], and as ``memory_qk_norm`` says ``query_norm``
    and ``key_norm`` [Dk], else None.
    """

    def __init__(self, config: UMv2Config) -> None:
        super().__init__()
        self.num_keys, self.topk = config.memory_scored_keys, config.memory_topk
        self.kept = min(config.memory_topk, config.memory_key_topk_cap)
        self.epsilon = config.memory_norm_epsilon
        self.heads, self.rank, self.dim = config.memory_num_heads, config.memory_tucker_rank, config.memory_key_dim
        norms = config.memory_qk_norm
        self.query = nn.Linear(config.hidden_size, config.memory_query_rows, bias=False)
        self.keys = nn.Parameter(torch.empty(self.heads, 2, self.num_keys, self.dim, self.rank))
        self.query_norm = nn.Parameter(torch.empty(self.dim)) if norms != "none" else None
        self.key_norm = nn.Parameter(torch.empty(self.dim)) if norms == "both" else None
        self._kept_keys: tuple[tuple[Any, ...], Tensor] | None = None
        self._ramp: Tensor | None = None

    def normalised_keys(self) -> Tensor:
        """What ``_normalised_keys`` gives, kept on a CPU without autograd: strided as they are, keys of 360 x 192 x 2
        take a hundred times as long to normalise as to multiply with one query.

        Contents say whether they have changed. Versions and addresses do not: fused optimizers raise no version, and
        memory is used again.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.keys.device.type != "cpu":
            self._kept_keys = None
            return self._normalised_keys()
        mark = self._fingerprint()
        if self._kept_keys is None or self._kept_keys[0] != mark:
            self._kept_keys = (mark, self._normalised_keys())
        return self._kept_keys[1]

    def _fingerprint(self) -> tuple[Any, ...]:
        """Numbers that are others for other contents of the keys and their gain, or another dtype of theirs."""
        keys = at_least_float32(self.keys.detach()).flatten()
        if self._ramp is None or self._ramp.shape != keys.shape or self._ramp.dtype != keys.dtype:
            self._ramp = torch.linspace(1, 2, keys.numel(), dtype=keys.dtype)  # so that the order counts, too
        gain = () if self.key_norm is None else tuple(self.key_norm.tolist())
        return self.keys.dtype, torch.dot(keys, self._ramp).item(), gain

    def _normalised_keys(self) -> Tensor:
        """The keys, normalised if they are to be, as the product with the queries wants them."""
        raise NotImplementedError


class UMv2Retrieval(UMv2QueriesAndKeys):
    """Queries, keys, cores, and the two-stage search.

    ``query.weight`` is side-major: [2 R' Dk, H], where R' is R with per-rank queries, else 1. Queries and keys are both
    normalised. ``cores`` [C, h, R, R]; buffers ``u``, ``t`` [h, R], float32: the leading singular pair of the summed
    cores.
    """

    query_norm: nn.Parameter
    key_norm: nn.Parameter
    u: Tensor
    t: Tensor

    def __init__(self, config: UMv2Config) -> None:
        super().__init__(config)
        heads, rank = self.heads, self.rank
        self.cores = nn.Parameter(torch.empty(config.memory_num_cores, heads, rank, rank))
        self.register_buffer("u", torch.zeros(heads, rank, dtype=torch.float32))
        self.register_buffer("t", torch.zeros(heads, rank, dtype=torch.float32))
        self._cores_seen: Tensor | None = None  # contents of the cores, a copy
        self._checked = False  # against them, since the last forward with gradients and change of mode
        self._trained = False  # a forward with gradients has been compiled, since the last change of mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [T, H] to the picked cells [T, P] (i * N + j) and their scores [T, P, C], differentiable."""
        picked = []
        for part in in_parts(x):
            key_scores = self.key_scores(part)
            with without_autocast(x.device):
                picked.append(self._pick(key_scores))
        cells, scores = zip(*picked)
        return (cells[0], scores[0]) if len(picked) == 1 else (torch.cat(cells), torch.cat(scores))

    def _pick(self, key_scores: Tensor) -> tuple[Tensor, Tensor]:
        """What ``forward`` gives, from the scores of every key."""
        rank, tokens = key_scores.shape[1:3]
        self._refresh_for_forward()
        found = search(self, key_scores)
        if found is not None:
            return found
        with torch.no_grad():
            vectors, total = self._for_search(key_scores.dtype)
            keys = (key_scores * vectors).sum(1).topk(self.kept, dim=-1).indices
        # The scores of the kept keys, [2, R, T, h, K']; from here on no others are needed.
        kept_scores = key_scores.gather(-1, keys.unsqueeze(1).expand(-1, rank, -1, -1, -1))
        cell = self._best_cells(kept_scores.detach(), total)
        # Row and column of each cell among the kept keys, [2, T, h, K].
        places = torch.stack([cell.div(self.kept, rounding_mode="floor"), cell % self.kept])
        row, column = keys.gather(-1, places)
        left, right = kept_scores.gather(-1, places.unsqueeze(1).expand(-1, rank, -1, -1, -1))
        # score[c] = sum over r, s of left[r] cores[c, r, s] right[s]: [h, T K, R] x [h, R, C S], then the sum over s.
        left = left.permute(2, 1, 3, 0).reshape(self.heads, -1, rank)
        mixed = left @ self.cores.to(left.dtype).permute(1, 2, 0, 3).reshape(self.heads, rank, -1)
        mixed = mixed.view(self.heads, tokens, self.topk, -1, rank)
        scores = (mixed * right.permute(2, 1, 3, 0).unsqueeze(3)).sum(-1)
        return (row * self.num_keys + column).flatten(1), scores.transpose(0, 1).flatten(1, 2)

    def key_scores(self, x: Tensor) -> Tensor:
        """Scores of every key, [2, R, T, h, N], float32 or better, of ``x`` [T, H]."""
        query = project(self.query, x).view(x.shape[0], 2, -1, self.dim)
        query = rms_norm(query, self.query_norm, self.epsilon).permute(1, 2, 0, 3)
        scores = query.expand(-1, self.rank, -1, -1) @ self.normalised_keys()
        return at_least_float32(scores).view(2, self.rank, x.shape[0], self.heads, self.num_keys)

    def _normalised_keys(self) -> Tensor:
        """[2, R, Dk, h N]."""
        keys = rms_norm(self.keys.permute(1, 4, 0, 2, 3), self.key_norm, self.epsilon)
        return keys.flatten(2, 3).transpose(-1, -2)

    def _for_search(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """u and t as [2, R, 1, h, 1], and the summed cores [h, R, R], both in ``dtype``."""
        vectors = torch.stack([self.u, self.t]).transpose(1, 2)[:, :, None, :, None]
        return vectors.to(dtype), self.cores.detach().sum(0, dtype=dtype)

    def _best_cells(self, kept_scores: Tensor, total: Tensor) -> Tensor:
        """The K best cells [T, h, K] of the K' x K' grids, by the score of the summed cores ``total`` [h, R, R]."""
        left = kept_scores[0].permute(1, 2, 3, 0) @ total
        right = kept_scores[1].permute(1, 2, 0, 3)
        part = max(1, _GRID_CELLS // (self.heads * self.kept * self.kept))
        if torch.compiler.is_exporting() or left.shape[0] <= part:
            return (left @ right).flatten(2).topk(self.topk, dim=-1).indices
        parts = zip(left.split(part), right.split(part))
        return torch.cat([(one @ other).flatten(2).topk(self.topk, dim=-1).indices for one, other in parts])

    def leading_pair(self) -> tuple[Tensor, Tensor]:
        """The leading left and right singular vectors of the summed cores, both [h, R], float32."""
        return leading_pair(self.cores.detach().sum(0, dtype=torch.float32))

    @torch.no_grad()
    def refresh_singular_vectors(self) -> None:
        """Set u and t to the leading singular pair of the summed cores, with the common sign that keeps them nearer to
        what they were."""
        u, t = self.leading_pair()
        kept = (u - self.u).abs().sum(-1) + (t - self.t).abs().sum(-1)
        flipped = (u + self.u).abs().sum(-1) + (t + self.t).abs().sum(-1)
        sign = torch.where(flipped < kept, -1.0, 1.0).unsqueeze(-1)
        self.u.copy_(u * sign)
        self.t.copy_(t * sign)

    def train(self, mode: bool = True) -> UMv2Retrieval:
        super().train(mode)
        self._checked = False
        if self._trained and self.cores_are_whole():
            self.refresh_singular_vectors()  # of the cores after the last step
            self._trained = False
        return self

    def _refresh_for_forward(self) -> None:
        """Have u and t belong to the cores. In a compiled forward, which can not ask whether contents have changed,
        they are computed anew while gradients are on, and the loaded ones are taken otherwise."""
        if not torch.compiler.is_compiling():
            self._refresh_if_changed(with_gradients=torch.is_grad_enabled())
        elif torch.is_grad_enabled() and not torch.compiler.is_exporting() and self.cores_are_whole():
            self._trained = True
            self._cores_seen = None
            self.refresh_singular_vectors()
        elif self._trained:  # evaluation in the midst of training
            self.refresh_singular_vectors()

    def cores_are_whole(self) -> bool:
        """Whether the cores are here: not sharded over ranks and not offloaded."""
        cores = self.cores
        return not cores.is_meta and type(cores) is nn.Parameter and cores.shape[1:] == (
            self.heads, self.rank, self.rank
        )  # fmt: skip

    def _refresh_if_changed(self, with_gradients: bool = True) -> None:
        """Refresh u and t if the cores have other contents than those that they were last seen with. On a CUDA device
        they are compared once after training, not in every forward without gradients.

        The pair comes with the weights and is theirs until then; where it is missing (zeros) it is computed. Cores that
        are not here as a whole (sharded over ranks, offloaded) leave it as it is.
        """
        cores = self.cores
        if not self.cores_are_whole():
            return
        seen = self._cores_seen
        if seen is not None and self._checked and cores.is_cuda and not with_gradients:
            return  # to compare would wait for the device in every step of decoding
        self._checked = not with_gradients and not self.training
        if seen is not None and torch.equal(seen, cores):
            return
        if seen is not None or not bool(self.u.any()):
            self.refresh_singular_vectors()
        self._cores_seen = cores.detach().clone()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._trained and self.cores_are_whole():
            self.refresh_singular_vectors()
        elif self._cores_seen is not None:
            self._refresh_if_changed()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UMv2Retrieval:
        if self._cores_seen is not None:
            self._refresh_if_changed()  # before a cast rounds the cores, whose pair it is to stay
        self._cores_seen = None
        # u and t stay float32 when a model is turned into a half dtype.
        exact = {"u": self.u, "t": self.t}
        super()._apply(fn, recurse)
        for name, vector in exact.items():
            converted = getattr(self, name)
            if converted.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, vector.to(converted.device))
        return self


class UMv2ProductKeys(UMv2QueriesAndKeys):
    """Queries, keys, and the exact search for the cells with the largest sums of their two keys' scores.

    ``query.weight`` is head-major, then side: [2 h' Dk, H], where h' is h with per-head queries, else 1. R is 1.
    """

    def __init__(self, config: UMv2Config) -> None:
        super().__init__(config)
        self.softmax = config.memory_score_normalization == "softmax"
        self._candidates: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [T, H] to the picked cells [T, P] (i * N + j) and their scores [T, P, 1], differentiable."""
        scores, keys = self.key_scores(x).topk(self.kept, dim=-1)
        rows, columns = self._places(x.device)
        sums = scores[0].index_select(-1, rows) + scores[1].index_select(-1, columns)
        picked, best = sums.topk(self.topk, dim=-1)
        cells = keys[0].gather(-1, rows[best]) * self.num_keys + keys[1].gather(-1, columns[best])
        if self.softmax:
            picked = picked.softmax(-1)
        return cells.flatten(1), picked.flatten(1).unsqueeze(-1)

    def key_scores(self, x: Tensor) -> Tensor:
        """Scores of every key, [2, T, h, N], float32 or better, of ``x`` [T, H]."""
        query = project(self.query, x).view(x.shape[0], -1, 2, self.dim)
        if self.query_norm is not None:
            query = rms_norm(query, self.query_norm, self.epsilon)
        # [2, h, T, Dk] x [2, h, Dk, N]; a shared query serves every head.
        scores = query.permute(2, 1, 0, 3).expand(-1, self.heads, -1, -1) @ self.normalised_keys()
        return at_least_float32(scores).transpose(1, 2)

    def _normalised_keys(self) -> Tensor:
        """[2, h, Dk, N]."""
        keys = self.keys.squeeze(-1)
        if self.key_norm is not None:
            keys = rms_norm(keys, self.key_norm, self.epsilon)
        return keys.permute(1, 0, 3, 2)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places (m, n) in both sorted sides that can be among the K best: cells in (m+1)(n+1) places are as good."""
        if torch.compiler.is_compiling():
            return self._make_places(device)
        if self._candidates is None or self._candidates[0].device != device:
            self._candidates = self._make_places(device)
        return self._candidates

    def _make_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        pairs = [(m, n) for m in range(self.kept) for n in range(self.kept) if (m + 1) * (n + 1) <= self.topk]
        rows, columns = zip(*pairs)
        return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast would compute in a half dtype inside, where scores that are close to each other are told apart."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * gain along the last dimension; in float32 or better, returned in x's dtype."""
    return functional.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), epsilon)


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, in float32 when its dtype is a half one."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

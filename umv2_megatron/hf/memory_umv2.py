"""The memory layer of UltraMemV2, for inference and fine-tuning: y = Wv( sum over picks of score * <pre_row, Wp x> * row ).

Retrieval picks cells of an N x N grid of keys (Tucker-decomposed scores, arXiv 2411.12364), a shuffle and a window turn
cells into rows of a value table, and the picked rows are added up, each weighted with its score and its pre-value's.

Decoding has a few tokens per step, so that the count of small operations decides: what depends on parameters alone is
kept between calls while autograd is off (``_Derived``), and steps that would change nothing are left out.

Letters: T tokens, H hidden, h heads, N keys per side, R rank, C cores, K values kept per head, K' keys kept per side,
P = h * K picks of a token, E virtual blocks with a projection of their own, A rows of a table. Side 0 is the row.

Precision: projections and key scores in the dtype of the parameters; norms, selection and scores in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .configuration_umv2 import UMv2Config
from .tables_umv2 import UMv2Table

# Cells of second-stage grids, and numbers in picked rows, that are held at once.
_GRID_CELLS = 1 << 24
_PICKED_NUMBERS = 1 << 26


class _Derived:
    """A value computed from parameters, kept until one of the parameters is changed or replaced."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._marks: list[tuple[int, int]] = []
        self._value: Any = None

    @property
    def used(self) -> bool:
        """Whether there was a call before."""
        return bool(self._marks)

    def changed(self, *parameters: Tensor) -> bool:
        """Whether these are not the tensors, or not the contents, of the last call; in-place changes show in a tensor's
        version. Remembers them."""
        marks = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        same = marks == self._marks and all(a is b for a, b in zip(parameters, self._sources))
        self._sources, self._marks = parameters, marks
        return not same

    def get(self, make: Callable[[], Any], *parameters: Tensor) -> Any:
        """``make()``, or what it gave last time."""
        if self.changed(*parameters):
            self._value = make()
        return self._value


class UMv2Retrieval(nn.Module):
    """Queries, keys, cores, and the two-stage search.

    ``query.weight`` [2 R' Dk, H] (R' is R with per-rank queries, else 1), ``keys`` [h, 2, N, Dk, R], ``query_norm`` and
    ``key_norm`` [Dk], ``cores`` [C, h, R, R]; buffers ``u``, ``t`` [h, R], float32: the leading singular pair of the
    summed cores.
    """

    u: Tensor
    t: Tensor

    def __init__(self, config: UMv2Config) -> None:
        super().__init__()
        self.config = config
        self.num_keys = config.memory_scored_keys
        self.kept = min(config.memory_topk, config.memory_key_topk_cap)
        heads, rank, dim = config.memory_num_heads, config.memory_tucker_rank, config.memory_key_dim
        self.query_ranks = rank if config.memory_query_mode == "per_rank" else 1
        self.query = nn.Linear(config.hidden_size, 2 * self.query_ranks * dim, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, 2, self.num_keys, dim, rank))
        self.query_norm = nn.Parameter(torch.empty(dim))
        self.key_norm = nn.Parameter(torch.empty(dim))
        self.cores = nn.Parameter(torch.empty(config.memory_num_cores, heads, rank, rank))
        self.register_buffer("u", torch.zeros(heads, rank, dtype=torch.float32))
        self.register_buffer("t", torch.zeros(heads, rank, dtype=torch.float32))
        self.forget_derived()

    def forget_derived(self) -> None:
        """Forget what was computed from parameters; for changes of them that leave no trace."""
        self._normalised, self._search, self._factored = _Derived(), _Derived(), _Derived()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [T, H] to the picked cells [T, P] (i * N + j) and their scores [T, P, C], differentiable."""
        config, tokens = self.config, x.shape[0]
        heads, cores, rank = config.memory_num_heads, config.memory_num_cores, config.memory_tucker_rank
        key_scores = self._key_scores(x)
        with torch.no_grad():
            vectors, total = self._for_search(key_scores.dtype)
            keys = (key_scores * vectors).sum(1).topk(self.kept, dim=-1).indices
        # The scores of the kept keys, [2, R, T, h, K']; from here on no others are needed.
        kept_scores = key_scores.gather(-1, keys.unsqueeze(1).expand(-1, rank, -1, -1, -1))
        cell = self._best_cells(kept_scores.detach(), total)
        row = cell.div(self.kept, rounding_mode="floor")
        column = cell - row * self.kept
        cells = keys[0].gather(-1, row) * self.num_keys + keys[1].gather(-1, column)
        left = kept_scores[0].gather(-1, row.expand(rank, -1, -1, -1))
        right = kept_scores[1].gather(-1, column.expand(rank, -1, -1, -1))
        # score[c] = sum over r, s of left[r] cores[c, r, s] right[s]: [h, T K, R] x [h, R, C S], then the sum over s.
        left = left.permute(2, 1, 3, 0).reshape(heads, -1, rank)
        mixed = left @ self.cores.to(left.dtype).permute(1, 2, 0, 3).reshape(heads, rank, cores * rank)
        mixed = mixed.view(heads, tokens, -1, cores, rank)
        scores = (mixed * right.permute(2, 1, 3, 0).unsqueeze(3)).sum(-1)
        return cells.flatten(1), scores.transpose(0, 1).flatten(1, 2)

    def _key_scores(self, x: Tensor) -> Tensor:
        """Scores of every key, [2, R, T, h, N], float32 or better."""
        config, tokens, rank = self.config, x.shape[0], self.config.memory_tucker_rank
        query = self.query(x).view(tokens, 2, self.query_ranks, config.memory_key_dim)
        query = rms_norm(query, self.query_norm, config.memory_norm_epsilon).permute(1, 2, 0, 3)
        if torch.is_grad_enabled():
            keys = self._normalised_keys()
        else:
            keys = self._normalised.get(self._normalised_keys, self.keys, self.key_norm)
        scores = query.expand(-1, rank, -1, -1) @ keys
        return at_least_float32(scores).view(2, rank, tokens, config.memory_num_heads, self.num_keys)

    def _normalised_keys(self) -> Tensor:
        """[2, R, Dk, h N]."""
        keys = rms_norm(self.keys.permute(1, 4, 0, 2, 3), self.key_norm, self.config.memory_norm_epsilon)
        return keys.flatten(2, 3).transpose(-1, -2)

    def _for_search(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """u and t as [2, R, 1, h, 1], and the summed cores [h, R, R], both in ``dtype``.

        The pair comes with the weights; it is computed afresh when the cores change, or where it is missing (zeros).
        """
        known = self._factored.used
        if self._factored.changed(self.cores) and (known or not bool(self.u.any())):
            self.refresh_singular_vectors()

        def make() -> tuple[Tensor, Tensor]:
            vectors = torch.stack([self.u, self.t]).transpose(1, 2)[:, :, None, :, None]
            return vectors.to(dtype), self.cores.detach().sum(0, dtype=dtype)

        return self._search.get(make, self.cores, self.u, self.t)

    def _best_cells(self, kept_scores: Tensor, total: Tensor) -> Tensor:
        """The K best cells [T, h, K] of the K' x K' grids, by the score of the summed cores ``total`` [h, R, R]."""
        left = kept_scores[0].permute(1, 2, 3, 0) @ total
        right = kept_scores[1].permute(1, 2, 0, 3)
        tokens, heads, topk = left.shape[0], left.shape[1], self.config.memory_topk
        part = max(1, _GRID_CELLS // (heads * self.kept * self.kept))
        if tokens <= part:
            return (left @ right).flatten(2).topk(topk, dim=-1).indices
        parts = zip(left.split(part), right.split(part))
        return torch.cat([(one @ other).flatten(2).topk(topk, dim=-1).indices for one, other in parts])

    @torch.no_grad()
    def refresh_singular_vectors(self) -> None:
        """Set u and t to the leading singular pair of the summed cores, with the common sign that keeps them nearer to
        what they were."""
        total = self.cores.detach().sum(0, dtype=torch.float32).cpu()
        left, _, right = torch.linalg.svd(total)
        new = torch.stack([left[:, :, 0], right[:, 0, :]])
        old = torch.stack([self.u, self.t]).float().cpu()
        flip = (new + old).abs().sum((0, -1)) < (new - old).abs().sum((0, -1))
        new = torch.where(flip[None, :, None], -new, new)
        self.u.copy_(new[0])
        self.t.copy_(new[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UMv2Retrieval:
        # u and t stay float32 when a model is turned into a half dtype.
        exact = {"u": self.u, "t": self.t}
        super()._apply(fn, recurse)
        for name, vector in exact.items():
            converted = getattr(self, name)
            if converted.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, vector.to(converted.device))
        self.forget_derived()
        return self


class UMv2Memory(nn.Module):
    """One memory layer. Its input [..., H] is the FFN's normalised input, its output is added to the FFN's.

    ``retrieval``; ``pre_proj.weight`` [Dp, H]; ``value_proj.weight`` [H, E Dv]; ``perm`` [N^2], the shuffle; ``table`` in
    the layer that owns it, the other layers of the window refer to it.

    Args:
        config: of the model.
        index: 0-based among the memory layers.
        table: of the layer that owns it, when another one does.
        tables: see ``UMv2Table``.
    """

    perm: Tensor

    def __init__(self, config: UMv2Config, index: int, table: UMv2Table | None, tables: str) -> None:
        super().__init__()
        self.config = config
        owner, self.table_rows, self.offset, self.window = config.memory_windows()[index]
        self.retrieval = UMv2Retrieval(config)
        cells = config.memory_scored_keys**2
        self.pre_proj = None
        if config.memory_pre_value_dim:
            self.pre_proj = nn.Linear(config.hidden_size, config.memory_pre_value_dim, bias=False)
        self.value_proj = None
        if config.memory_value_expansion != "none":
            summed = config.memory_num_blocks * config.memory_value_dim
            self.value_proj = nn.Linear(summed, config.hidden_size, bias=False)
        self.register_buffer("perm", torch.arange(cells, dtype=torch.int32 if cells <= 2**31 else torch.int64))
        self.table: UMv2Table
        if owner == index:
            self.table = UMv2Table(config, self.table_rows, tables)
        else:
            assert table is not None and table.rows == self.table_rows, (index, owner)
            # Past nn.Module's registration, so that the table has one name.
            object.__setattr__(self, "table", table)
        # Cells are rows, without a detour, unless the window moves them or several cells share a row.
        self._plain = cells == self.window == self.table_rows and self.offset == 0

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return self.finish(self.start(x))

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pick rows for ``x`` [..., H] and tell the table about them; the FFN may be computed before ``finish``."""
        flat = x.reshape(-1, x.shape[-1])
        cells, scores = self.retrieval(flat)
        rows = self.perm[cells].long()
        blocks = rows.new_zeros(0)
        if not self._plain:
            blocks = rows.div(self.window, rounding_mode="floor")
            rows = (rows - blocks * self.window + self.offset) % self.table_rows
        self.table.announce(rows)
        return flat, x, rows, blocks, scores

    def finish(self, started: tuple[Tensor, ...]) -> Tensor:
        """The output [..., H] for the input of ``start``."""
        flat, x, rows, blocks, scores = started
        projected = self.pre_proj(flat) if self.pre_proj is not None else flat.new_zeros(flat.shape[0], 0)
        if torch.is_grad_enabled() and scores.requires_grad:
            # The picked rows of a whole batch are large: they are picked again for the backward.
            summed = checkpoint(self._sum_rows, rows, blocks, scores, projected, use_reentrant=False)
        else:
            summed = self._sum_rows(rows, blocks, scores, projected)
        output = self.value_proj(summed) if self.value_proj is not None else summed
        return output.view(x.shape)

    def _sum_rows(self, rows: Tensor, blocks: Tensor, scores: Tensor, projected: Tensor) -> Tensor:
        """The picked rows added up, [T, E Dv] in the dtype of the table: for part of the tokens after part of them."""
        width = max(self.config.memory_value_dim, self.config.memory_pre_value_dim)
        part = max(1, _PICKED_NUMBERS // (rows.shape[1] * width))
        if rows.shape[0] <= part:
            return self._sum_some(rows, blocks, scores, projected)
        split = [tensor.split(part) for tensor in (rows, blocks, scores, projected) if tensor is not blocks]
        block_parts = blocks.split(part) if blocks.numel() else [blocks] * len(split[0])
        return torch.cat([self._sum_some(r, b, s, p) for r, b, s, p in zip(split[0], block_parts, *split[1:])])

    def _sum_some(self, rows: Tensor, blocks: Tensor, scores: Tensor, projected: Tensor) -> Tensor:
        """out[t, e, slice c] = sum over picks of block e of score[c] * rho * row[slice c]; rho is the pre-value score."""
        config, (tokens, picks) = self.config, rows.shape
        cores, num_blocks = config.memory_num_cores, config.memory_num_blocks
        flat = rows.flatten()
        weights = scores
        if self.pre_proj is not None:
            pre_values = self.table.pick("pre_values", flat).view(tokens, picks, -1)
            rho = torch.bmm(pre_values, projected.to(pre_values.dtype).unsqueeze(-1)).to(scores.dtype)
            weights = scores * (functional.gelu(rho) if config.memory_pre_value_activation == "gelu" else rho)
        values = self.table.pick("values", flat)
        dtype = values.dtype
        # [T, C, P, Dv/C], and for each block the weights of its picks and zeros, [T, C, E, P].
        values = values.to(scores.dtype).view(tokens, picks, cores, -1).transpose(1, 2)
        weights = weights.transpose(1, 2).unsqueeze(2)
        if num_blocks > 1:
            own = blocks.unsqueeze(1) == torch.arange(num_blocks, device=blocks.device).unsqueeze(-1)
            weights = weights * own.unsqueeze(1)
        summed = weights @ values
        return summed.transpose(1, 2).reshape(tokens, -1).to(dtype)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * gain along the last dimension; in float32 or better, returned in x's dtype."""
    return functional.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), epsilon)


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, in float32 when its dtype is a half one."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

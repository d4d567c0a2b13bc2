"""The memory layer: y = Wv( sum over picks of score * <pre_row, Wp x> * row ), for inference and fine-tuning.

``retrieval_umv2`` picks cells, a shuffle and a window turn cells into rows of a value table (``tables_umv2``), and the
picked rows are added up, each weighted with its score and its pre-value's.

Letters: T tokens, H hidden, h heads, N keys per side, C cores, K values kept per head, P = h * K picks of a token,
E virtual blocks with a projection of their own, Dv and Dp dimensions of values and pre-values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .configuration_umv2 import UMv2Config
from .linear_umv2 import project
from .lookup_umv2 import sum_rows
from .retrieval_umv2 import UMv2ProductKeys, UMv2Retrieval, without_autocast
from .tables_umv2 import UMv2Table

# Numbers in picked rows that are held at once: 256 MB in float32.
_PICKED_NUMBERS = 1 << 26


class UMv2Elsewhere:
    """A block that another one looks into, past nn.Module's registration: it has its name elsewhere.

    Looked into is what stands there at that time. peft puts a copy to be trained in a module's place
    (``modules_to_save``), and sharding a wrapper: who keeps the module itself would go on with the old one.
    """

    def __init__(self, block: Any = None) -> None:
        self.block = block

    def __deepcopy__(self, memo: dict[int, Any]) -> UMv2Elsewhere:
        # The block is copied where it has its name: before this one, or not at all.
        return UMv2Elsewhere(memo.get(id(self.block), self.block))


class UMv2Memory(nn.Module):
    """One memory layer. Its input [..., H] is the FFN's normalised input, its output is added to the FFN's.

    ``retrieval``; ``pre_proj.weight`` [Dp, H]; ``gate_proj.weight`` [E Dv, H]; ``value_proj.weight`` [H, E Dv];
    ``perm`` [N^2], the shuffle; ``table`` in the layer that owns it, in which the layers that share it look it up.

    Args:
        config: of the model.
        index: 0-based among the memory layers.
        blocks: those of the memory layers before it.
        tables: see ``UMv2Table``.
    """

    perm: Tensor

    def __init__(self, config: UMv2Config, index: int, blocks: list[UMv2Elsewhere], tables: str) -> None:
        super().__init__()
        self.cores, self.num_blocks = config.memory_num_cores, config.memory_num_blocks
        self.width = max(config.memory_value_dim, config.memory_pre_value_dim)
        self.gelu = config.memory_pre_value_activation == "gelu"
        owner, self.table_rows, self.offset, self.window = config.memory_windows()[index]
        self.retrieval = UMv2Retrieval(config) if config.memory_scoring == "tucker" else UMv2ProductKeys(config)
        hidden, cells = config.hidden_size, config.memory_scored_keys**2
        summed = self.num_blocks * config.memory_value_dim
        self.has_pre_values = config.memory_pre_value_dim > 0
        self.pre_proj = self.gate_proj = self.value_proj = None
        if self.has_pre_values and config.memory_pre_projection == "linear":
            self.pre_proj = nn.Linear(hidden, config.memory_pre_value_dim, bias=False)
        if config.memory_gate == "silu":
            self.gate_proj = nn.Linear(hidden, summed, bias=False)
        if config.memory_value_expansion != "none":
            self.value_proj = nn.Linear(summed, hidden, bias=False)
        self.index = index
        self.seed = config.memory_seed
        self.register_buffer("perm", torch.empty(cells, dtype=torch.int32 if cells <= 2**31 else torch.int64))
        if not self.perm.is_meta:
            self.perm.copy_(self.shuffle())
        self.owner = None if owner == index else blocks[owner]
        if self.owner is None:
            self.table = UMv2Table(config, self.table_rows, tables)
        # Cells are rows, without a detour, unless the window moves them or several cells share a row.
        self._plain = cells == self.window == self.table_rows and self.offset == 0

    def find_table(self) -> UMv2Table:
        """The table: its own, or that of the layer that owns it."""
        return self.table if self.owner is None else self.owner.block.memory.table

    def shuffle(self) -> Tensor:
        """A permutation of the cells [N^2] that belongs to the layer's index: what ``perm`` is until weights are
        loaded. (Training draws others.)"""
        generator = torch.Generator().manual_seed(self.seed + self.index)
        return torch.randperm(self.perm.numel(), generator=generator, device="cpu")

    def forward(
        self, x: Tensor | None = None, begun: tuple[Tensor, ...] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """One half of the layer: ``x`` [..., H] to what is begun for it, or that to the output [..., H].

        Between the two the FFN may be computed, or with a read delay other blocks. Both are calls of the module,
        because what moves weights to a device for a while (accelerate's hooks) does so around such a call.
        """
        if begun is None:
            assert x is not None
            return self._start(x)
        return self._finish(begun)

    def _start(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pick rows for ``x`` and tell the table about them."""
        flat = x.reshape(-1, x.shape[-1])
        cells, scores = self.retrieval(flat)
        rows = self.perm[cells].long()
        blocks = rows.new_zeros(0)
        if not self._plain:
            blocks = rows.div(self.window, rounding_mode="floor")
            rows = (rows - blocks * self.window + self.offset) % self.table_rows
        return flat, x, self.find_table().announce(rows), blocks, scores

    def _finish(self, begun: tuple[Tensor, ...]) -> Tensor:
        flat, x, rows, blocks, scores = begun
        here = self.perm.device
        if here.type != "meta":  # with a read delay the calling block may lie on another device; rows go to the table
            flat, x, blocks, scores = flat.to(here), x.to(here), blocks.to(here), scores.to(here)
        projected = project(self.pre_proj, flat) if self.pre_proj is not None else flat
        if torch.is_grad_enabled() and scores.requires_grad:
            # The picked rows of a whole batch are large: they are picked again for the backward.
            summed = checkpoint(
                self._sum_rows, rows, blocks, scores, projected, use_reentrant=False, preserve_rng_state=False
            )
        else:
            summed = self._sum_rows(rows, blocks, scores, projected)
        if self.gate_proj is not None:
            summed = summed * functional.silu(project(self.gate_proj, flat))
        output = project(self.value_proj, summed) if self.value_proj is not None else summed
        return output.view(x.shape)

    def _sum_rows(self, rows: Tensor, blocks: Tensor, scores: Tensor, projected: Tensor) -> Tensor:
        """The picked rows added up, [T, E Dv] in the dtype of the table: for part of the tokens after part of them."""
        summed = sum_rows(self, rows, blocks, scores, projected)
        if summed is not None:
            return summed
        with without_autocast(scores.device):
            return self._sum_parts(rows, blocks, scores, projected)

    def _sum_parts(self, rows: Tensor, blocks: Tensor, scores: Tensor, projected: Tensor) -> Tensor:
        part = max(1, _PICKED_NUMBERS // (rows.shape[1] * self.width))
        if torch.compiler.is_exporting() or rows.shape[0] <= part:  # an exported program is one for any length
            return self._sum_some(rows, blocks, scores, projected)
        split = [tensor.split(part) for tensor in (rows, blocks, scores, projected) if tensor is not blocks]
        block_parts = blocks.split(part) if blocks.numel() else [blocks] * len(split[0])
        return torch.cat([self._sum_some(r, b, s, p) for r, b, s, p in zip(split[0], block_parts, *split[1:])])

    def _sum_some(self, rows: Tensor, blocks: Tensor, scores: Tensor, projected: Tensor) -> Tensor:
        """out[t, e, slice c] = sum over picks of block e of score[c] * rho * row[slice c]; rho from the pre-value."""
        (tokens, picks), flat, table = rows.shape, rows.flatten(), self.find_table()
        weights = scores
        if self.has_pre_values:
            pre_values = table.pick("pre_values", flat, scores.device).view(tokens, picks, -1)
            # A row vector times a matrix, which is nine times as fast on a CPU as a matrix times a column.
            rho = projected.to(pre_values.dtype).unsqueeze(1) @ pre_values.transpose(1, 2)
            rho = rho.transpose(1, 2).to(scores.dtype)
            weights = scores * (functional.gelu(rho) if self.gelu else rho)
        values = table.pick("values", flat, scores.device)
        dtype = values.dtype
        # [T, C, P, Dv/C], and for each block the weights of its picks and zeros, [T, C, E, P].
        values = values.to(scores.dtype).view(tokens, picks, self.cores, -1).transpose(1, 2)
        weights = weights.transpose(1, 2).unsqueeze(2)
        if self.num_blocks > 1:
            own = blocks.unsqueeze(1) == torch.arange(self.num_blocks, device=blocks.device).unsqueeze(-1)
            weights = weights * own.unsqueeze(1)
        summed = weights @ values
        return summed.transpose(1, 2).reshape(tokens, -1).to(dtype)

"""Search and lookup of a memory layer by the compiled kernels, for any number of tokens: a prompt's, for example.

Neither the grids of cells nor the picked rows of a prompt are ever in memory at once, as they are where PyTorch
computes with them. Results are those of ``retrieval_umv2`` and ``memory_umv2`` but for rounding.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

from .native_umv2 import MemoryPart, library, readable, usable

RANKS = (1, 2, 4)
"""Of the Tucker form, for which there are kernels."""


OUT_OF_RANGE = "a memory layer picks rows that its table does not have: its perm, and so the file, is damaged"


def set_search(call: MemoryPart, retrieval: Any) -> None:
    """Put sizes of a ``UMv2Retrieval`` into ``call``."""
    call.heads, call.num_keys, call.rank = retrieval.heads, retrieval.num_keys, retrieval.rank
    call.kept, call.topk, call.num_cores = retrieval.kept, retrieval.topk, retrieval.cores.shape[0]


def set_sum(call: MemoryPart, memory: Any) -> None:
    """Put sizes of a ``UMv2Memory`` into ``call``."""
    call.num_cores, call.blocks, call.gelu = memory.cores, memory.num_blocks, memory.gelu
    call.table_rows = memory.table_rows


def point_at_table(call: MemoryPart, table: Any, dtype: torch.dtype = torch.float32) -> list[Any] | None:
    """Put places of the chunks of a ``UMv2Table`` into ``call``; gives the arrays that it points to from now on. None
    where kernels for ``dtype`` cannot read the chunks."""
    kept: list[Any] = []

    def point(name: str, kind: Any, numbers: list[int]) -> None:
        kept.append((kind * len(numbers))(*numbers))
        setattr(call, name, ctypes.addressof(kept[-1]))

    call.value_dim, call.pre_dim = table.widths["values"], table.widths.get("pre_values", 0)
    call.chunk_rows, call.page = table.chunk_rows, mmap.PAGESIZE
    for kind, prefix in (("values", "value"), ("pre_values", "pre")):
        if kind not in table.widths:
            continue
        chunks = list(getattr(table, kind))
        if not chunks or not all(readable(chunk, dtype) for chunk in chunks):
            return None
        point(kind, ctypes.c_void_p, [chunk.data_ptr() for chunk in chunks])
        if table.place == "mmap":
            mapped = table._mapped[kind]
            point(f"{prefix}_files", ctypes.c_int32, [chunk.file for chunk in mapped])
            point(f"{prefix}_starts", ctypes.c_int64, [chunk.start for chunk in mapped])
    return kept


def search(retrieval: Any, key_scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cells [T, P] and their scores [T, P, C] from the scores of all keys [2, R, T, h, N]; None without kernels."""
    held = (retrieval.cores, retrieval.u, retrieval.t)
    if retrieval.rank not in RANKS or not _floats(key_scores) or not all(readable(tensor) for tensor in held):
        return None
    call, tokens = MemoryPart(), key_scores.shape[2]
    set_search(call, retrieval)
    call.cores, call.u, call.t = (tensor.data_ptr() for tensor in held)
    key_scores = key_scores.contiguous()
    picks = retrieval.heads * retrieval.topk
    cells = torch.empty(tokens, picks, dtype=torch.int64)
    scores = key_scores.new_empty(tokens, picks, call.num_cores)
    _run("umv2_search", call, key_scores, cells, scores, tokens=tokens)
    return cells, scores


def sum_rows(memory: Any, rows: Tensor, blocks: Tensor, scores: Tensor, projected: Tensor) -> Tensor | None:
    """The picked rows [T, P] added up, [T, E Dv], each weighted with its score and its pre-value's; None without
    kernels, and where something else stands in the table's place. Raises ``IndexError`` for rows that it has not."""
    if not _floats(scores) or not _floats(projected) or rows.device.type != "cpu":
        return None
    call, table = MemoryPart(), memory.find_table()
    if not table.is_plain():
        return None
    kept = point_at_table(call, table)
    if kept is None:
        return None
    set_sum(call, memory)
    call.heads, call.topk = 1, rows.shape[1]
    summed = scores.new_empty(rows.shape[0], call.blocks * call.value_dim)
    projected, rows, blocks, scores = (tensor.contiguous() for tensor in (projected, rows, blocks, scores))
    # with one projection all cells of a row add to the same sum
    _run("umv2_sum_rows", call, projected, rows, blocks if call.blocks > 1 else None, scores, summed,
         tokens=rows.shape[0])  # fmt: skip
    return summed


def _floats(x: Tensor) -> bool:
    return x.dtype is torch.float32 and usable(x)


def _run(function: str, call: MemoryPart, *tensors: Tensor | None, tokens: int) -> None:
    places = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    counts = ctypes.c_int64(tokens), ctypes.c_int64(torch.get_num_threads())
    if getattr(library(), function)(ctypes.byref(call), *places, *counts):
        raise IndexError(OUT_OF_RANGE)

"""Picks on their way to other ranks: rows beyond what 32 bits number, without tables of that size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.memory.picked_cells import decode, encode
from umv2_megatron.memory.row_sharded import RowShardedLookup


@pytest.mark.parametrize("blocks", [1, 4, 9])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 5])
def test_cells_take_four_bytes_only_where_they_fit(blocks: int, beyond: int) -> None:
    """``largest`` rows give cells up to largest * blocks - 1, which may be 2^31 - 1 in 32 bits."""
    largest = 2**31 // blocks + beyond
    rows = torch.tensor([0, 1, largest // 2, largest - 1])
    place = torch.arange(4) % blocks
    place[-1] = blocks - 1
    cells = encode(rows, place, blocks, largest)
    assert cells.dtype == (torch.int32 if largest * blocks <= 2**31 else torch.int64)
    found, found_blocks = decode(cells, blocks)
    assert torch.equal(found, rows)
    assert found_blocks is None if blocks == 1 else torch.equal(found_blocks, place)


class Sent(Exception):
    """Ends a lookup once its cells are sent."""


class TwoRanks:
    """In the place of an ``Exchange``: keeps the cells that are sent."""

    size = 2

    def all_to_all(self, step: str, tensor: Tensor) -> Any:
        return type("Pending", (), {"wait": lambda _: tensor})()

    def all_to_all_ragged(self, step: str, tensor: Tensor, send: list[int], receive: list[int]) -> None:
        assert step == "rows"
        raise Sent(tensor, send)


@pytest.mark.parametrize("rows", [2**32, 2**32 + 1, 2**32 + 2, 2**33])
def test_rows_of_a_huge_table_reach_their_owner(rows: int) -> None:
    """A rank of two holds 2^31 rows, or more; with unequal parts the larger one decides on the bytes of all ranks."""
    shard = TableShard("row", 2, 1)
    ranges = [TableShard("row", 2, rank).rows(rows) for rank in (0, 1)]
    lookup = RowShardedLookup(MemoryConfig(backend="scatter", topk=2, num_cores=1), rows, shard, TwoRanks())  # type: ignore[arg-type]
    picked = torch.tensor([[ranges[0][0], ranges[0][1] - 1], [ranges[1][0], ranges[1][1] - 1]])
    with pytest.raises(Sent) as caught:
        scores = torch.ones(2, 2, 1)
        lookup.start(picked, torch.zeros_like(picked), scores, lookup.gather(scores, None))
    cells, send = caught.value.args
    assert send == [2, 2]
    largest = max(stop - start for start, stop in ranges)
    assert cells.dtype == (torch.int32 if largest <= 2**31 else torch.int64)
    found, _ = decode(cells, 1)
    starts = torch.tensor([ranges[0][0]] * 2 + [ranges[1][0]] * 2)
    assert torch.equal(found + starts, picked.flatten())

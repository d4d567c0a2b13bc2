"""Which rows each layer sees, for every sharing pattern, checked against sets of rows written down from the rules."""

from __future__ import annotations

import math

import torch

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.sharing import TableWindow, from_share_ratio, table_windows


def windows(sharing: str, g: int, layers: int, num_keys: int = 4, **options: int) -> list[TableWindow]:
    return table_windows(MemoryConfig(num_keys=num_keys, sharing=sharing, sharing_size=g, topk=2, **options), layers)


def seen(window: TableWindow) -> set[int]:
    rows, _ = window.locate(torch.arange(window.window))
    return set(rows.tolist())


def test_none_gives_every_layer_its_own_table() -> None:
    assert windows("none", 1, 3) == [TableWindow(i, 16, 0, 16) for i in range(3)]


def test_block_groups_see_their_whole_table() -> None:
    got = windows("block", 4, 8)
    assert [w.owner for w in got] == [0, 0, 0, 0, 4, 4, 4, 4]
    assert [w.offset for w in got] == [0, 16, 32, 48] * 2
    assert all(w.rows == 64 and seen(w) == set(range(64)) for w in got)


def test_block_whose_rows_are_no_square_sees_the_largest_square_from_its_offset() -> None:
    got = windows("block", 2, 4)
    assert all(w.rows == 32 and w.window == 25 for w in got)
    assert seen(got[1]) == {(16 + i) % 32 for i in range(25)}


def test_ring_wraps_round() -> None:
    got = windows("ring", 4, 6)
    assert [w.owner for w in got] == [0] * 6
    assert seen(got[5]) == set(range(80, 96)) | set(range(48))
    assert seen(got[1]) == set(range(16, 80))


def test_noring_is_clipped_at_the_ends() -> None:
    got = windows("noring", 4, 6)
    assert [w.offset // 16 for w in got] == [0, 0, 0, 1, 2, 2]
    assert all(seen(w) == set(range(w.offset, w.offset + 64)) for w in got)


def test_ring_is_the_share_ratio_of_the_released_code() -> None:
    for g in (1, 2, 3, 5):
        assert from_share_ratio(12, 5, g / 5) == windows("ring", g, 5, num_keys=12)


def test_located_rows_and_blocks() -> None:
    window = TableWindow(owner=0, rows=32, offset=16, window=25)
    rows, block = window.locate(torch.tensor([[0, 24, 25], [99, 15, 16]]))
    assert rows.tolist() == [[16, 8, 16], [8, 31, 0]]
    assert block.tolist() == [[0, 0, 1], [3, 0, 0]]


def test_rows_of_one_block_need_no_division() -> None:
    cells = torch.arange(25)
    for rows, offset in ((25, 0), (32, 0), (32, 3), (32, 16)):
        window = TableWindow(owner=0, rows=rows, offset=offset, window=25)
        found, block = window.locate(cells, 1)
        assert block is None and torch.equal(found, window.locate(cells)[0])


def test_config_and_windows_agree_on_the_scored_keys() -> None:
    for sharing, g in (("none", 1), ("block", 3), ("ring", 2), ("noring", 5)):
        config = MemoryConfig(num_keys=7, sharing=sharing, sharing_size=g, key_expansion=2, topk=2)
        for window in table_windows(config, 15):
            assert config.key_expansion * window.side == config.scored_keys
            assert window.side == math.isqrt(g * 49)


def test_owners_come_first() -> None:
    assert [window.owner == layer for layer, window in enumerate(windows("block", 2, 4))] == [True, False, True, False]

"""Whole parameters dealt out to ranks: each once, about evenly, and alike wherever it is computed."""

from __future__ import annotations

import random

import pytest

from umv2_megatron.config.dealing import deal_out


def test_the_largest_go_first_each_to_the_rank_with_the_least() -> None:
    assert deal_out([1, 8, 5, 4, 3], 2) == [1, 0, 1, 1, 0]  # 8 | 5, 8 | 9, 11 | 9, 11 | 10
    assert deal_out([7, 7], 4) == [0, 1]
    assert deal_out([], 3) == []


@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_no_rank_has_more_than_an_even_share_and_one_parameter(ranks: int) -> None:
    numbers = random.Random(ranks)
    sizes = [numbers.choice((64, 4096, 100_000, 250_000)) for _ in range(60)]
    owners = deal_out(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, owners) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(sizes) and max(loads) <= sum(sizes) / ranks + max(sizes)

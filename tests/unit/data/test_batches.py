"""Which samples a step sees does not depend on the number of ranks, nor on where the run was interrupted."""

from __future__ import annotations

import pytest

from umv2_megatron.data.batches import RankSampler


def step_samples(world_size: int, micro: int, batch: int, consumed: int, steps: int, total: int = 1000) -> list[set]:
    """The samples of each step over all ranks."""
    ranks = [iter(RankSampler(total, consumed, micro, rank, world_size)) for rank in range(world_size)]
    count = batch // (micro * world_size)
    found = []
    for _ in range(steps):
        drawn = [index for rank in ranks for _ in range(count) for index in next(rank)]
        assert len(drawn) == len(set(drawn)) == batch
        found.append(set(drawn))
    return found


@pytest.mark.parametrize("world_size, micro", [(1, 1), (1, 4), (2, 2), (4, 1), (8, 1), (2, 4)])
def test_same_samples_on_any_number_of_ranks(world_size, micro):
    assert step_samples(world_size, micro, 8, 0, 5) == [set(range(8 * i, 8 * i + 8)) for i in range(5)]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 1)])
def test_a_resume_goes_on_where_the_run_stood(before, after):
    whole = step_samples(before, 2, 8, 0, 6)
    assert whole[3:] == step_samples(after, 2, 8, 24, 3)


def test_the_end_of_the_data():
    sampler = RankSampler(21, 8, 2, 1, 2)
    assert len(sampler) == 3 and list(sampler) == [[10, 11], [14, 15], [18, 19]]
    assert len(RankSampler(8, 8, 2, 0, 2)) == 0 and list(RankSampler(4, 8, 2, 0, 2)) == []

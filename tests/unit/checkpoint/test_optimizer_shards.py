"""Ranges as boxes, against a mask of every element; and pieces of parameters that go to several places."""

import random

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from umv2_megatron.checkpoint.optimizer_shards import boxes, pieces

SHAPES = [(), (1,), (7,), (1, 1), (3, 4), (1, 9), (9, 1), (2, 3, 4), (3, 1, 5), (2, 1, 1, 3), (2, 3, 2, 3)]


def check_boxes(shape: tuple[int, ...], start: int, stop: int) -> None:
    """The boxes cover the range once, in its order, and there are few."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    found = boxes(shape, start, stop)
    covered = [
        numbers[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))].reshape(-1)
        for offset, size in found
    ]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *covered]), torch.arange(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert all(part.numel() for part in covered)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_of_small_shapes(shape):
    count = torch.Size(shape).numel()
    for start in range(count + 1):
        for stop in range(start, count + 1):
            check_boxes(shape, start, stop)


def test_random_ranges_of_random_shapes():
    draw = random.Random(5)
    for _ in range(300):
        shape = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 5)))
        count = torch.Size(shape).numel()
        start = draw.randint(0, count)
        check_boxes(shape, start, draw.randint(start, count))


def test_sizes_beyond_32_bits():
    rows = 3_000_000_000
    assert boxes((rows, 2), 5, 2 * rows - 3) == [((2, 1), (1, 1)), ((3, 0), (rows - 5, 2)), ((rows - 2, 0), (1, 1))]


def assembled(found: list[ShardedTensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The global tensor that pieces make, and how often each of its elements is there."""
    whole, counts = torch.zeros(found[0].global_shape), torch.zeros(found[0].global_shape)
    for piece in found:
        whole[piece.global_slice()] = piece.data
        counts[piece.global_slice()] += 1
    return whole, counts


@pytest.mark.parametrize("experts", [0, 3])
def test_gate_and_up_of_a_gated_ffn_on_two_ranks(experts):
    """Rank r of 2 holds rows r of each half; with experts, an axis that only the global tensor has comes before."""
    gate, up = torch.arange(24.0).view(4, 6), 100 + torch.arange(24.0).view(4, 6)
    prepended = ((0, 1, experts),) if experts else ()
    found = []
    for rank in range(2):
        local = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
        axis = len(prepended)
        entry = ShardedTensor.from_rank_offsets(
            "fc1", local, *prepended, (axis, rank, 2), replica_id=(0, 0, 0), prepend_axis_num=axis
        )
        factory = apply_swiglu_sharded_factory(entry, prepended)
        for start, stop in ((0, 5), (5, 15), (15, 24)):  # three data-parallel ranks
            state = local.view(-1)[start:stop].clone()
            made = pieces(factory, state, start, "exp_avg")
            assert all(piece.key == "exp_avg.fc1" and piece.prepend_axis_num == 0 for piece in made)
            assert {piece.data.untyped_storage().data_ptr() for piece in made} == {state.untyped_storage().data_ptr()}
            found += made
    whole, counts = assembled(found)
    expected = torch.cat([gate, up])
    if experts:
        assert whole.shape == (3, 8, 6) and counts[[0, 2]].sum() == 0
        whole, counts = whole[1], counts[1]
    assert torch.equal(whole, expected) and bool((counts == 1).all())


def test_a_part_of_a_padded_vocabulary_stays_resizable():
    entry = ShardedTensor.from_rank_offsets(
        "embedding", torch.zeros(4, 3), (0, 1, 2), replica_id=(1, 0, 0), allow_shape_mismatch=True
    )
    (only,) = pieces(entry, torch.ones(2), 3, "exp_avg_sq")[:1]
    assert only.allow_shape_mismatch and only.global_shape == (8, 3) and only.replica_id == (1, 0, 0)
    assert only.global_offset == (5, 0) and only.local_shape == (1, 2)

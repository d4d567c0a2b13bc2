"""Stored tensors: rectangles that cover a tensor exactly once are read back, others are refused by name."""

from __future__ import annotations

import pytest
import torch

from umv2_megatron.conversion.checkpoint_tensors import (
    CheckpointTensors,
    ShardWriter,
    _overlap,
    _Rectangle,
    write_metadata,
)
from umv2_megatron.conversion.safetensors_files import ConversionError, TensorInfo

WHOLE = torch.arange(18.0).view(6, 3)


def store(directory, spans: list[tuple[int, int]]) -> CheckpointTensors:
    """A checkpoint with ``WHOLE``, of which the rows of ``spans`` are stored, half of them in a second file."""
    shards = []
    for number, half in enumerate((spans[::2], spans[1::2])):
        writer = ShardWriter(directory / f"__{number}_0.distcp")
        for start, stop in half:
            writer.write("x", start, WHOLE[start:stop].clone())
        writer.close()
        shards.append((writer.path.name, writer.stored))
    write_metadata(directory, {"x": TensorInfo(torch.float32, (6, 3))}, shards)
    return CheckpointTensors(directory)


def test_rows_come_from_whichever_rectangles_hold_them(tmp_path):
    tensors = store(tmp_path, [(4, 6), (0, 1), (1, 4)])
    tensors.check_covered("x")
    for start in range(6):
        for stop in range(start, 7):
            assert torch.equal(tensors.rows("x", start, stop), WHOLE[start:stop])
    tensors.close()


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 3), (2, 5)],  # as many elements as the tensor has, but row 2 twice and row 5 never
        [(0, 3)],
        [(0, 3), (3, 6), (5, 6)],
        [(0, 2), (1, 3), (4, 6)],
        [(0, 1), (1, 4), (3, 5)],
    ],
)
def test_rectangles_that_do_not_cover_a_tensor_exactly_once_are_refused(spans, tmp_path):
    tensors = store(tmp_path, spans)
    with pytest.raises(ConversionError, match="the stored parts of x hold"):
        tensors.check_covered("x")
    tensors.close()


@pytest.mark.parametrize(
    ("other", "overlaps"),
    [
        (((0, 2), (2, 2)), False),  # beside
        (((2, 0), (2, 2)), False),  # below
        (((2, 2), (2, 2)), False),  # only the corner touches
        (((1, 1), (1, 1)), True),  # inside
        (((0, 1), (2, 3)), True),
        (((1, 0), (3, 1)), True),
        (((0, 0), (2, 2)), True),
    ],
)
def test_overlaps_in_two_dimensions(other, overlaps):
    far = _Rectangle((9, 0), (1, 9), "c", 0, 0)
    for order in (1, -1):
        parts = [_Rectangle((0, 0), (2, 2), "a", 0, 0), _Rectangle(*other, "b", 0, 0), far]
        assert _overlap(parts[::order]) is overlaps

"""Which part of a global tensor a contiguous range of a local parameter's elements is.

mcore's distributed optimizer deals out flat gradient buffers, so a rank's optimizer state belongs to a range of
elements of a parameter that ends somewhere inside a row. Such a range is a few axis-aligned boxes:

    range [5, 18) of a [4, 6] tensor      . . . . . x      box (0, 5), 1 x 1
                                          x x x x x x      box (1, 0), 2 x 6
                                          x x x x x x
                                          . . . . . .

Each box becomes a piece of the global tensor (mcore's `ShardedTensor`) whose data is a view of the rank's state. So
nothing is gathered or copied, and any other layout can read its own boxes out of those that were stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a row-major tensor of n axes as at most 2n - 1 boxes (offset, size), in their order."""
    if start >= stop:
        return []
    if len(shape) == 0:
        return [((), ())]
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        return _in_row(shape, first, head, tail)
    found: list[Box] = []
    if head:
        found += _in_row(shape, first, head, inner)
        first += 1
    if first < last:
        found.append(((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return found + _in_row(shape, last, 0, tail)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [((row, *offset), (1, *size)) for offset, size in boxes(shape[1:], start, stop)]


@dataclass(frozen=True)
class _Block:
    """Consecutive elements of the local parameter, from ``start`` on, that are one part of a global tensor."""

    start: int
    tensor: ShardedTensor


def _blocks(item: ShardedTensor | ShardedTensorFactory) -> list[_Block]:
    """Where the elements of a local parameter go; a factory (gate and up of a gated FFN) sends them to several places.

    The factory is asked with a tensor of the parameter's shape that has no memory: what it makes are views of that, and
    a view knows where it starts.
    """
    if isinstance(item, ShardedTensor):
        return [_Block(0, item)]
    assert item.flattened_range is None, item
    outline = torch.empty(item.data.shape, dtype=item.data.dtype, device="meta")
    built = list(nested_values(item.build_fn(item.key, outline, item.replica_id, None)))
    found = sorted((_Block(tensor.data.storage_offset(), tensor) for tensor in built), key=lambda block: block.start)
    reached = 0
    for block in found:
        assert block.start == reached and block.tensor.data.is_contiguous(), f"{item.key} is not stored block by block"
        reached += block.tensor.data.numel()
    assert reached == outline.numel(), f"{item.key} is not stored whole"
    return found


def pieces(
    item: ShardedTensor | ShardedTensorFactory, state: torch.Tensor, start: int, name: str
) -> list[ShardedTensor]:
    """Pieces of the global tensors ``name.KEY`` that hold ``state``; all share its memory.

    item: the parameter's entry in the model's sharded state dict; KEY is its key. state: flat, for the parameter's
    local elements from ``start`` on.
    """
    stop = start + state.numel()
    found: list[ShardedTensor] = []
    for block in _blocks(item):
        whole = block.tensor
        low, high = max(start, block.start), min(stop, block.start + math.prod(whole.local_shape))
        position = low - start
        for offset, size in boxes(whole.local_shape, low - block.start, high - block.start):
            # Axes that only the global tensor has (experts) are of size 1 here.
            size = (1,) * whole.prepend_axis_num + size
            offset = (0,) * whole.prepend_axis_num + offset
            data = state[position : position + math.prod(size)].view(size)
            position += data.numel()
            found.append(
                ShardedTensor(
                    f"{name}.{whole.key}",
                    data,
                    data.dtype,
                    size,
                    whole.global_shape,
                    tuple(a + b for a, b in zip(whole.global_offset, offset, strict=True)),
                    None,  # boxes make no grid
                    whole.replica_id,
                    allow_shape_mismatch=whole.allow_shape_mismatch,
                )
            )
    return found


def row_pieces(item: ShardedTensor, state: torch.Tensor, first: int, inside: bool, name: str) -> list[ShardedTensor]:
    """Pieces of the global vector ``name.KEY`` [rows of the whole table] that hold ``state``; they share its memory.

    item: the entry of a table [rows, columns] in the model's sharded state dict. state: one number for each row of this
    rank's part of the table from row ``first`` on. inside: that row begins in the range of another rank, which stores
    its number. Of ranks that hold columns of the same rows, the first one stores them.
    """
    offset, width = item.global_offset[0] + first, item.global_offset[1]
    pipeline, tensor, data = item.replica_id
    alone = (pipeline, tensor + width, data)  # any other number than 0 says that another rank stores it

    def piece(start: int, stop: int, replica_id: tuple[int, int, int]) -> ShardedTensor:
        size = (stop - start,)
        return ShardedTensor(
            f"{name}.{item.key}", state[start:stop], state.dtype, size, item.global_shape[:1], (offset + start,), None,
            replica_id,
        )  # fmt: skip

    found = [piece(0, 1, (pipeline, tensor + width + 1, data))] if inside else []
    return found + ([piece(int(inside), len(state), alone)] if len(state) > inside else [])

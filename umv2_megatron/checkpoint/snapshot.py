"""A copy in main memory of what a rank has to write, which another process can read while training goes on.

The memory is an anonymous file (memfd), not /dev/shm, which is 64 MB in many containers. Both processes map it; only
descriptions travel. It stays from one save to the next and grows where it must. On a CUDA device it is pinned, so that
the copies run at the speed of the bus.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from umv2_megatron.checkpoint.shard_writing import Piece
from umv2_megatron.durable_files import CheckpointError

_ALIGNMENT = 64


@dataclass(frozen=True)
class Placed:
    """Where the data of one piece are in the snapshot. sizes: of this part. dtype: None for an object. The others are
    those of `shard_writing.Piece`."""

    key: str
    checksum: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype | None
    start: int
    length: int


class Snapshot:
    """The copy, on the side of the rank. descriptor: of the anonymous file, for the other process."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("checkpoint snapshot")
        self.size = 0
        self._map: mmap.mmap | None = None
        self._pinned: int | None = None

    def take(self, pieces: Sequence[Piece]) -> list[Placed]:
        """Copy all pieces; on return nothing of the run's own memory is needed any more.

        Raises CheckpointError naming the bytes where the host has too little memory.
        """
        placed, end = [], 0
        for piece in pieces:
            tensor = piece.data if isinstance(piece.data, torch.Tensor) else None
            sizes, dtype = ((), None) if tensor is None else (tuple(tensor.shape), tensor.dtype)
            length = piece.num_bytes
            placed.append(Placed(piece.key, piece.checksum, piece.offset, piece.shape, sizes, dtype, end, length))
            end += -(-length // _ALIGNMENT) * _ALIGNMENT
        device = next((p.data.device for p in pieces if isinstance(p.data, torch.Tensor) and p.data.is_cuda), None)
        self._reserve(end, pinned=device is not None)
        for piece, place in zip(pieces, placed, strict=True):
            if not place.length:
                continue
            assert self._map is not None
            if isinstance(piece.data, torch.Tensor):
                _tensor(self._map, place).copy_(piece.data.detach(), non_blocking=True)
            else:
                self._map[place.start : place.start + place.length] = piece.data
        if device is not None:
            torch.cuda.synchronize(device)
        return placed

    def _reserve(self, size: int, *, pinned: bool) -> None:
        if size <= self.size:
            return
        self._unmap()
        try:
            os.posix_fallocate(self.descriptor, 0, size)  # too little memory is told here, not by a signal later
            self._map = mmap.mmap(self.descriptor, size)
        except OSError as error:
            raise CheckpointError(
                f"--async-save needs {size} bytes of main memory on rank {torch.distributed.get_rank()} for a copy of "
                f"what it saves: {error.strerror}; give more memory, or leave --async-save out"
            ) from error
        self.size = size
        if pinned:
            address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
            if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:  # copies are slower without it
                self._pinned = address

    def _unmap(self) -> None:
        if self._pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned)
            self._pinned = None
        self._map, self.size = None, 0  # unmapped with the last tensor that looks into it

    def close(self) -> None:
        """Give the memory back."""
        self._unmap()
        os.close(self.descriptor)


def read_snapshot(descriptor: int, size: int, placed: Sequence[Placed]) -> list[Piece]:
    """The pieces of a snapshot of ``size`` bytes, as views of it: nothing is copied."""
    memory = mmap.mmap(descriptor, size) if size else mmap.mmap(-1, 1)
    pieces = []
    for place in placed:
        data: torch.Tensor | bytes
        if place.dtype is None:
            data = memory[place.start : place.start + place.length]
        elif place.length:
            data = _tensor(memory, place)
        else:
            data = torch.empty(place.sizes, dtype=place.dtype)
        pieces.append(Piece(place.key, data, place.checksum, place.offset, place.shape))
    return pieces


def _tensor(memory: mmap.mmap, place: Placed) -> torch.Tensor:
    assert place.dtype is not None
    count = place.length // place.dtype.itemsize
    return torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.start).view(place.sizes)

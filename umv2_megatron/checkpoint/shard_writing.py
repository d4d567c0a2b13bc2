"""Writing shards of mcore's `torch_dist` format: every rank writes and hashes its file, rank 0 joins the descriptions.

`pieces.py` lists what a rank has to write; `write_shard` writes such a list to the rank's file. It needs nothing but
the list: no device, no process group, no mcore, so a process in the background can run it on copies of the pieces. What
it returns is small; rank 0 joins that of all ranks to the `.metadata` (`joined_metadata`) and to the manifest. A save
reads nothing back: every rank hashes its file while it writes it.

torch's own `FileSystemWriter` is not used: until its file is complete it keeps a copy in main memory of every tensor
that it writes, it drops the errors of its threads, and it offers no place to hash the file.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from umv2_megatron.checkpoint.checksum_files import SHARD, checksums_name, checksums_text
from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.user_paths import is_remote

Sealed = dict[str, tuple[int, str]]
"""Files that were hashed while they were written: name -> (bytes, SHA-256 in hex)."""


@dataclass(frozen=True)
class Piece:
    """One part of a tensor, or one object, that a rank writes.

    key: of the tensor or object. offset: place of the part in the whole tensor. shape: of the whole tensor. Both are
    empty for an object, whose data is bytes of torch.save. data of a tensor: row-major, or not, on any device.
    checksum: `tensor_checks.checksum` of the data as they were in the run's memory.
    """

    key: str
    data: torch.Tensor | bytes
    checksum: str
    offset: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.numel() * self.data.itemsize


@dataclass(frozen=True)
class Written:
    """Where one piece is in a file; sizes and dtype are those of the part, dtype None for an object."""

    key: str
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int
    length: int


@dataclass(frozen=True)
class WrittenShard:
    """What one rank has written: its file (None: it had nothing to write) with its pieces, and the hashes."""

    file: str | None
    pieces: list[Written]
    sealed: Sealed


# ---------------------------------------------------------------------- files


class HashedFile:
    """A new file that is hashed while it is written; sync makes it durable, and the end of it. Raises OSError. failure:
    of a write. Behind a URL the file is sent in parts, and is not there before sync."""

    def __init__(self, path: Path) -> None:
        self._remote = path.writer() if is_remote(path) else None
        self._file: BinaryIO | None = open(path, "wb", buffering=0) if self._remote is None else None  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._size = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``; another thread hashes it in the meantime."""
        view = memoryview(data).cast("B")
        hashing = self._hasher.submit(self._digest.update, view)
        sink = self._file or self._remote
        assert sink is not None
        try:
            written = 0
            while written < len(view):
                written += sink.write(view[written:])
        except OSError as error:
            self.failure = error  # torch.save puts another one in its place
            raise
        finally:
            hashing.result()
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def tell(self) -> int:
        return self._size

    def sync(self) -> tuple[int, str]:
        """Make the file durable; returns bytes and SHA-256."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        else:
            assert self._remote is not None
            self._remote.commit()
        return self._size, self._digest.hexdigest()

    def close(self) -> None:
        self._hasher.shutdown()
        if self._file is not None:
            self._file.close()
        if self._remote is not None:
            self._remote.discard()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_hashed(path: Path, data: bytes | memoryview) -> tuple[int, str]:
    """Write a small file durably; returns bytes and SHA-256."""
    with HashedFile(path) as file:
        file.write(data)
        return file.sync()


def write_shard(directory: Path, rank: int, pieces: Sequence[Piece]) -> WrittenShard:
    """Write the pieces of ``rank`` to its file in ``directory``, and their checksums to another; both are synced. Holds
    one piece in main memory.

    Raises OSError, and RuntimeError where torch.save fails for another reason.
    """
    if not pieces:
        return WrittenShard(None, [], {})
    name = f"__{rank}_0{SHARD}"
    written = []
    with HashedFile(directory / name) as file:
        for piece in pieces:
            start = file.tell()
            written.append(replace(_write_piece(file, piece), start=start, length=file.tell() - start))
        sealed = {name: file.sync()}
    checksums = {place.start: piece.checksum for place, piece in zip(written, pieces, strict=True)}
    beside = checksums_name(name)
    sealed[beside] = write_hashed(directory / beside, checksums_text(checksums))
    return WrittenShard(name, written, sealed)


def _write_piece(file: HashedFile, piece: Piece) -> Written:
    if isinstance(piece.data, bytes):
        file.write(piece.data)
        return Written(piece.key, (), (), (), None, 0, 0)
    data = piece.data.detach().cpu().contiguous()
    if data.untyped_storage().nbytes() != data.nbytes:
        data = data.clone()  # torch.save writes whole storages
    try:
        torch.save(data, file)  # type: ignore[arg-type]
    except RuntimeError as error:
        if file.failure is not None:
            raise file.failure from error
        raise
    return Written(piece.key, piece.offset, tuple(data.shape), piece.shape, data.dtype, 0, 0)


# ---------------------------------------------------------------------- metadata


def joined_metadata(shards: Iterable[WrittenShard], whole: bool = True) -> tuple[Metadata, int]:
    """The `.metadata` of what all ranks have written, and the bytes of tensor data.

    Raises CheckpointError naming a tensor or object that is not stored exactly once and whole. whole=False: of what one
    rank has written for itself, which need not be whole.
    """
    parts: dict[str, list[Written]] = {}
    places = {}
    # one object for equal shapes and for each offset: a fraction of the time and bytes of pickling
    shapes: dict[tuple[int, ...], torch.Size] = {}
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for shard in shards:
        for piece in shard.pieces:
            assert shard.file is not None
            stored = parts.setdefault(piece.key, [])
            if piece.dtype is None:
                index = MetadataIndex(piece.key)
            else:
                sizes = shapes.setdefault(piece.sizes, torch.Size(piece.sizes))
                chunk = ChunkStorageMetadata(torch.Size(piece.offset), sizes)
                chunks.setdefault(piece.key, []).append(chunk)
                index = MetadataIndex(piece.key, chunk.offsets, len(stored))
                object.__setattr__(index, "offset", chunk.offsets)  # a copy otherwise
            places[index] = _StorageInfo(shard.file, piece.start, piece.length)
            stored.append(piece)
    described: dict[str, Any] = {}
    tensor_bytes = 0
    for key, stored in parts.items():
        if whole:
            _check_whole(key, stored)
        first = stored[0]
        if first.dtype is None:
            described[key] = BytesStorageMetadata()
            continue
        properties = TensorProperties(dtype=first.dtype)
        described[key] = TensorStorageMetadata(properties, torch.Size(first.shape), chunks[key])
        tensor_bytes += sum(math.prod(part.sizes) for part in stored) * first.dtype.itemsize
    return Metadata(described, storage_data=places), tensor_bytes


def write_metadata(path: Path, metadata: Metadata) -> tuple[int, str]:
    """Write `.metadata` durably; returns bytes and SHA-256."""
    return write_hashed(path, pickle.dumps(metadata))


def _check_whole(key: str, parts: list[Written]) -> None:
    first = parts[0]
    if first.dtype is None:
        if len(parts) > 1:
            raise CheckpointError(f"the object {key} was not saved: {len(parts)} ranks write it; expected one")
        return
    for part in parts:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{key} was not saved: ranks disagree about it, which is {part.dtype} of shape {part.shape} and "
                f"{first.dtype} of shape {first.shape}"
            )
    stored, whole = sum(math.prod(part.sizes) for part in parts), math.prod(first.shape)
    inside = all(
        0 <= offset <= of_whole - size
        for part in parts
        for offset, size, of_whole in zip(part.offset, part.sizes, first.shape, strict=True)
    )
    if stored != whole or not inside or _overlap(parts):
        raise CheckpointError(
            f"{key} was not saved: its {len(parts)} parts hold {stored} of {whole} elements, lie on top of each other "
            "or outside; expected every element once"
        )


def _overlap(parts: list[Written]) -> bool:
    """Whether two parts have elements in common."""
    ordered = sorted(parts, key=lambda part: part.offset)
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if not one.offset or other.offset[0] >= one.offset[0] + one.sizes[0]:
                break
            if all(a < b + m and b < a + n for a, n, b, m in zip(one.offset, one.sizes, other.offset, other.sizes)):
                return True
    return False

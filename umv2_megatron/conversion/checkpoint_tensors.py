"""Tensors of a torch_dist checkpoint, read by ranges of rows and written as rectangles of rows.

A tensor is stored as rectangles, each an archive of ``torch.save`` somewhere in a shard file: a ZIP archive whose
entries are not compressed. So the bytes of any rows can be read where they lie. The pickle in each archive, which
describes the tensor, is read by an unpickler that knows a few harmless names and builds no tensor; anything else in it
is refused before it is called. No tensor is unpickled, whatever layout wrote the checkpoint.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from umv2_megatron.checkpoint.shard_writing import HashedFile
from umv2_megatron.checkpoint.torch_dist_io import METADATA_FILE, read_metadata_safely
from umv2_megatron.conversion.safetensors_files import ConversionError, TensorInfo, as_bytes, read_into
from umv2_megatron.durable_files import CheckpointError, FileWindow, fsync_path, open_to_read, write_synced
from umv2_megatron.user_paths import is_remote

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Rectangle:
    """One stored part of a tensor: where it lies in the whole, and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


class CheckpointTensors:
    """The tensors of one checkpoint directory, by key; objects (random states and the like) are left alone.

    Raises ``CheckpointError`` for damaged metadata and ``ConversionError`` naming the tensor whose rectangles do not
    cover it exactly once.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self._rectangles: dict[str, list[_Rectangle]] = {}
        self._places: dict[_Rectangle, int] = {}
        self._files: dict[str, BinaryIO] = {}
        metadata = read_metadata_safely(directory)
        for key, held in metadata.state_dict_metadata.items():
            if isinstance(held, TensorStorageMetadata):
                self.tensors[key] = TensorInfo(held.properties.dtype, tuple(held.size))
                self._rectangles[key] = []
        sizes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key in self.tensors
            for chunk in metadata.state_dict_metadata[key].chunks
        }
        for index, place in metadata.storage_data.items():
            if index.fqn not in self.tensors:
                continue
            offsets = tuple(index.offset or ())
            if (index.fqn, offsets) not in sizes:
                raise ConversionError(f"{directory}: {index.fqn} has a part at {offsets} that is not described")
            self._rectangles[index.fqn].append(
                _Rectangle(offsets, sizes[index.fqn, offsets], str(place.relative_path), place.offset, place.length)
            )

    def check_covered(self, key: str) -> None:
        """Raise ``ConversionError`` unless every element of ``key`` is stored exactly once."""
        shape, parts = self.tensors[key].shape, self._rectangles[key]
        inside = all(
            min(offset, whole - offset - size) >= 0
            for part in parts
            for offset, size, whole in zip(part.offsets, part.sizes, shape, strict=True)
        )
        held = sum(math.prod(part.sizes) for part in parts)
        if not inside or held != math.prod(shape) or _overlap(parts):
            raise ConversionError(
                f"{self.directory}: the stored parts of {key} hold {held} elements of {math.prod(shape)}, or lie "
                "on top of each other: the checkpoint is damaged"
            )

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, put together from its rectangles."""
        info = self.tensors[key]
        assert 0 <= start <= stop <= info.rows, (key, start, stop, info)
        result = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        for part in self._rectangles[key]:
            first, last = max(start, part.offsets[0]), min(stop, part.offsets[0] + part.sizes[0])
            if first >= last:
                continue
            columns = [slice(offset, offset + size) for offset, size in zip(part.offsets[1:], part.sizes[1:])]
            target = result[(slice(first - start, last - start), *columns)]
            if target.is_contiguous():
                self._read(key, part, first - part.offsets[0], target)
            else:
                read = torch.empty(target.shape, dtype=info.dtype)
                self._read(key, part, first - part.offsets[0], read)
                target.copy_(read)
        return result

    def _read(self, key: str, part: _Rectangle, row: int, target: torch.Tensor) -> None:
        """Fill ``target`` with the rectangle's rows from ``row`` on."""
        if part.file not in self._files:
            self._files[part.file] = open_to_read(self.directory / part.file)
        file = self._files[part.file]
        if part not in self._places:
            self._places[part] = _place_of_data(file, part, self.tensors[key].dtype, f"{self.directory}: {key}")
        row_bytes = math.prod(part.sizes[1:]) * target.dtype.itemsize
        read_into(file, as_bytes(target), self._places[part] + row * row_bytes, f"{self.directory}: {key}")

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _overlap(parts: list[_Rectangle]) -> bool:
    """Whether two rectangles have elements in common; those of one table are thousands at most."""
    ordered = sorted(parts, key=lambda part: part.offsets)
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            if all(a < b + m and b < a + n for a, n, b, m in zip(one.offsets, one.sizes, other.offsets, other.sizes)):
                return True
    return False


# -- the archives of torch.save ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Description:
    """What the pickle in an archive says of its tensor."""

    dtype: torch.dtype
    record: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _describe(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> _Description:
    dtype, record = storage
    return _Description(dtype, record, int(first), tuple(map(int, shape)), tuple(map(int, strides)))


class _DescriptionUnpickler(pickle.Unpickler):
    """Reads the description of one tensor; every name that it does not know is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        kind, dtype, record, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind!r} does not belong there")
        return dtype, str(record)


def _place_of_data(file: BinaryIO, part: _Rectangle, dtype: torch.dtype, what: str) -> int:
    """Where in ``file`` the elements of a rectangle begin, row-major. Raises ``ConversionError`` naming ``what``."""
    try:
        with zipfile.ZipFile(io.BufferedReader(FileWindow(file, part.offset, part.length))) as archive:
            entries = {entry.filename.split("/", 1)[-1]: entry for entry in archive.infolist()}
            described = _DescriptionUnpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ConversionError(f"{what} was written by a big-endian machine: convert it there")
            entry = entries[f"data/{described.record}"]
    except ConversionError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ConversionError(f"{what} is not a stored tensor, do not use this checkpoint: {error}") from error
    rowmajor = torch.empty(part.sizes, device="meta").stride()
    needed = (described.first + math.prod(part.sizes)) * dtype.itemsize
    if (described.dtype, described.shape) != (dtype, part.sizes):
        raise ConversionError(
            f"{what} is {described.dtype} of shape {described.shape} in {part.file}; the metadata says {dtype} of "
            f"shape {part.sizes}"
        )
    if described.strides != tuple(rowmajor) or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < needed:
        raise ConversionError(f"{what} is stored in {part.file} in another way than row by row, in full")
    header = bytearray(30)
    read_into(file, memoryview(header), part.offset + entry.header_offset, what)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return part.offset + entry.header_offset + 30 + names + described.first * dtype.itemsize


def damaged_tensors(directory: Path) -> list[str]:
    """Keys of the tensors whose stored bytes do not have their archives' checksums; [] where that shows nothing."""
    try:
        metadata = read_metadata_safely(directory)
    except CheckpointError:
        return []
    found = []
    for index, place in metadata.storage_data.items():
        try:
            with open_to_read(directory / str(place.relative_path)) as file:
                window = io.BufferedReader(FileWindow(file, place.offset, place.length))
                is_bad = zipfile.ZipFile(window).testzip() is not None
        except (OSError, ValueError, zipfile.BadZipFile):
            is_bad = True
        if is_bad:
            found.append(index.fqn)
    return sorted(set(found))


# -- writing -------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard file, a rectangle of whole rows at a time; the file appears when closed.

    ``stored`` lists (key, first row, shape, place) of everything written, for the metadata. ``seal``: bytes and SHA-256
    of a file behind a URL, once closed; others are read again for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored: list[dict[str, Any]] = []
        self.seal: tuple[int, str] | None = None
        self._unfinished = path.with_name(path.name + ".incomplete")
        remote = is_remote(path)
        self._remote = HashedFile(path) if remote else None
        self._file: Any = self._remote or open(self._unfinished, "wb")  # noqa: SIM115

    def write(self, key: str, first_row: int, rows: torch.Tensor) -> None:
        """Append ``rows``, which begin at ``first_row`` of the tensor ``key``."""
        assert rows.is_contiguous() and rows.untyped_storage().nbytes() == rows.nbytes
        offset = self._file.tell()
        torch.save(rows, self._file)
        self.stored.append(
            {
                "key": key,
                "row": first_row,
                "shape": list(rows.shape),
                "offset": offset,
                "length": self._file.tell() - offset,
            }
        )

    def close(self) -> None:
        """Sync, and give the file its name."""
        if self._remote is not None:
            self.seal = self._remote.sync()
        self._file.close()
        if self._remote is not None:
            return
        fsync_path(self._unfinished)
        self._unfinished.rename(self.path)
        fsync_path(self.path.parent)

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        if self._remote is not None:
            return
        self._unfinished.unlink(missing_ok=True)


def write_metadata(
    directory: Path, tensors: dict[str, TensorInfo], shards: Iterable[tuple[str, list[dict[str, Any]]]]
) -> None:
    """Write ``.metadata`` for ``shards``, pairs of a file's name and its ``ShardWriter.stored``."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in tensors}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, stored in shards:
        for item in stored:
            key, shape = item["key"], torch.Size(item["shape"])
            offsets = torch.Size([item["row"], *[0] * (len(shape) - 1)])
            places[MetadataIndex(key, offsets, len(chunks[key]))] = _StorageInfo(name, item["offset"], item["length"])
            chunks[key].append(ChunkStorageMetadata(offsets, shape))
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks[key])
        for key, info in tensors.items()
    }
    write_synced(directory / METADATA_FILE, pickle.dumps(Metadata(described, storage_data=places)))

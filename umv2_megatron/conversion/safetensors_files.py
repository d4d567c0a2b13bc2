"""safetensors files read and written by ranges of rows, so that a tensor of any size passes through a small buffer.

A file is 8 bytes (length of the header, little-endian), a header in JSON (name -> dtype, shape, range of bytes), and
the tensors' bytes, row-major, end to end. The safetensors package maps whole files into memory and writes whole
tensors; here bytes are read with ``pread`` and written in order, and are hashed on the way. What a file claims is
checked before a byte of a tensor is read: the ranges must cover the data exactly once and fit the shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from umv2_megatron.durable_files import fsync_path, read_at

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CRC_BYTES = 16 << 20
_LARGEST_HEADER = 100_000_000  # that of the safetensors package


class ConversionError(ValueError):
    """A checkpoint or an export cannot be converted; the message is one sentence that names the tensor or the file."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Length of the first axis."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    assert tensor.is_contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class SafetensorsFile:
    """An open file; ``tensors`` says what it holds.

    Raises ``ConversionError`` naming the file, and the tensor, where the header does not fit itself or the file's size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._start: dict[str, int] = {}
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ConversionError(f"{self.path} is no safetensors file, or its end is missing ({size} bytes)")
        try:
            header = json.loads(os.pread(self._file.fileno(), length, 8))
            header.pop("__metadata__", None)
            found = {name: _entry(entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{self.path} has a damaged header: {type(error).__name__}: {error}") from error
        position = 0
        for name, (info, begin, end) in sorted(found.items(), key=lambda item: item[1][1:]):
            if begin != position or end - begin != info.num_bytes:
                raise ConversionError(
                    f"{self.path}: {name} claims bytes {begin} to {end}; expected {info.num_bytes} from {position}"
                )
            if 8 + length + end > size:
                raise ConversionError(
                    f"{self.path} has {size} bytes, but {name} ends at {8 + length + end}: the file is truncated"
                )
            position = end
            self.tensors[name] = info
            self._start[name] = 8 + length + begin
        if 8 + length + position != size:
            raise ConversionError(f"{self.path} has {size} bytes; its tensors end at {8 + length + position}")

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in memory of its own."""
        info = self.tensors[name]
        assert 0 <= start <= stop <= info.rows, (name, start, stop, info)
        result = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        read_into(self._file, as_bytes(result), self._start[name] + start * info.row_bytes, f"{self.path}: {name}")
        return result

    def crc32(self, name: str) -> int:
        """CRC-32 of a tensor's bytes."""
        info, found = self.tensors[name], 0
        step = max(1, _CRC_BYTES // max(1, info.row_bytes))
        for start in range(0, info.rows, step):
            found = zlib.crc32(as_bytes(self.rows(name, start, min(start + step, info.rows))), found)
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_into(file: BinaryIO, view: memoryview, offset: int, what: str) -> None:
    """Fill ``view`` from ``offset`` on. Raises ``ConversionError`` naming ``what`` where the file ends before."""
    done = 0
    while done < len(view):
        count = read_at(file, view[done:], offset + done)
        if count == 0:
            raise ConversionError(f"{what} cannot be read: the file ended {len(view) - done} bytes too early")
        done += count


def _entry(entry: dict) -> tuple[TensorInfo, int, int]:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
        raise ValueError(f"{entry} holds something else than sizes")
    if not shape:
        raise ValueError(f"{entry} is a single number; every tensor of a model here has an axis")
    return TensorInfo(DTYPES[entry["dtype"]], shape), begin, end


class SafetensorsWriter:
    """Writes one file, whose tensors are known beforehand and whose bytes come in order; the file appears when closed.

    Used as a context manager; ``sha256``, ``size`` and ``crc32`` (of each tensor) are there at a successful end. Until
    then the bytes are in a file whose name ends in ``.incomplete``.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, TensorInfo]]) -> None:
        self.path = path
        self.sha256 = ""
        self.size = 0
        self.crc32 = {name: 0 for name, _ in tensors}
        self._unfinished = path.with_name(path.name + ".incomplete")
        self._left = [(name, info.num_bytes) for name, info in tensors]
        self._hash = hashlib.sha256()
        self._file = open(self._unfinished, "wb", buffering=0)  # noqa: SIM115
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, info in tensors:
            end = position + info.num_bytes
            header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # as the package pads it: tensors begin at a multiple of 8
        self._put(memoryview(struct.pack("<Q", len(text)) + text))

    def write(self, name: str, part: torch.Tensor) -> None:
        """Append the next rows of ``name``, which must be the tensor whose turn it is."""
        while self._left and self._left[0][1] == 0:
            self._left.pop(0)
        view = as_bytes(part)
        assert self._left and self._left[0][0] == name and len(view) <= self._left[0][1], (name, self._left[:1])
        self._left[0] = (name, self._left[0][1] - len(view))
        self.crc32[name] = zlib.crc32(view, self.crc32[name])
        self._put(view)

    def _put(self, view: memoryview) -> None:
        self._hash.update(view)
        self.size += len(view)
        while view:
            view = view[self._file.write(view) or 0 :]

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.close()
            self._unfinished.unlink(missing_ok=True)
            return
        assert all(left == 0 for _, left in self._left), f"not written: {self._left[:3]}"
        os.fsync(self._file.fileno())
        self._file.close()
        os.rename(self._unfinished, self.path)
        fsync_path(self.path.parent)
        self.sha256 = self._hash.hexdigest()

"""Where the rows of the memory layers' tables lie: with the model, in host memory, or in the files.

A token reads a few rows of a table that may be larger than the machine's memory. ``memory_tables`` says where it lies:

    device    parameters like all others (the default; the only form in which tables are trained and moved)
    cpu       host memory, pinned where there is CUDA; only picked rows go to the device
    mmap      the safetensors files of the model, mapped into the address space; only picked rows are ever read

The same operations work on the same numbers in all three, so that results are equal to the bit. "device-int8" and
"cpu-int8" hold rows of int8 there, made while the model is loaded (``int8_rows_umv2``). A table is held in chunks of
``config.memory_table_chunk_rows`` rows, because files have a largest size.

A safetensors file is 8 bytes (length of the header, little-endian), a header in JSON (name -> dtype, shape, range of
bytes after the header), and the tensors' bytes. Nothing in it is executed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import mmap
import os
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_umv2 import UMv2Config
from .int8_rows_umv2 import exact_rows, int8_rows
from .native_umv2 import is_plain

PLACES = ("device", "cpu", "mmap", "device-int8", "cpu-int8")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# A header is at most 100 MB in every implementation of the format.
_LARGEST_HEADER = 100_000_000
# Lookups for which rows are fetched ahead after a page had to be waited for.
_ANNOUNCED = 64


class MappedTensor:
    """A tensor of a safetensors file, mapped: ``tensor`` reads the file's bytes where they are touched.

    Args:
        path: of the file.
        name, entry: of the tensor in the file's header.
        start: bytes before the first tensor.

    Raises ``ValueError`` naming the tensor and the file when the entry does not describe bytes of the file.
    """

    def __init__(self, path: str, name: str, entry: dict[str, Any], start: int) -> None:
        dtype, shape, (first, last) = _DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        size = math.prod(shape) * (dtype.itemsize if dtype is not None else 0)
        if dtype is None or len(shape) != 2 or last - first != size or start + last > os.path.getsize(path):
            raise ValueError(
                f"{name} in {path} is {entry}; expected a matrix of {'/'.join(_DTYPES)} that lies inside the file: "
                "the file is damaged or no export of a model"
            )
        self.path = path
        self._arguments = path, name, entry, start
        aligned = (start + first) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self._shift = start + first - aligned
        self._row_bytes = shape[1] * dtype.itemsize
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file).atexit = False  # a thread may still be fetching
        self._map = mmap.mmap(self._file, self._shift + size, access=mmap.ACCESS_READ, offset=aligned)
        self._aligned, self.start = aligned, start + first
        if hasattr(self._map, "madvise"):
            # Rows are far apart: reading on after one would fetch pages that nobody asked for.
            self._map.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bytes are read-only, and nothing writes them
            flat = torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=self._shift)
        self.tensor = flat.view(shape)

    def __reduce__(self) -> tuple[type[MappedTensor], tuple[Any, ...]]:
        return MappedTensor, self._arguments

    @property
    def file(self) -> int:
        """The open file, in which the tensor is from byte ``start`` on."""
        return self._file

    def fetch(self, rows: Tensor) -> None:
        """Have the system read the pages of ``rows`` [n] int64 into its cache, all at the same time, so that who reads
        the rows does not wait for one page after another."""
        if not rows.numel():
            return
        page = mmap.PAGESIZE
        starts = rows * self._row_bytes + self._shift
        first, last = starts // page, (starts + self._row_bytes - 1) // page
        pages = first.unsqueeze(1) + torch.arange((self._row_bytes - 1) // page + 2)
        wanted = pages.minimum(last.unsqueeze(1)).unique()
        ends = (wanted.diff() > 1).nonzero().flatten()
        runs = zip([int(wanted[0]), *wanted[ends + 1].tolist()], [*wanted[ends].tolist(), int(wanted[-1])], strict=True)
        for start, end in runs:
            offset = self._aligned + start * page
            os.posix_fadvise(self._file, offset, (end - start + 1) * page, os.POSIX_FADV_WILLNEED)


class _Fetcher:
    """One thread that hands in requests to disks: that takes a while, and nobody has to wait for it."""

    def __init__(self) -> None:
        self._worker: tuple[threading.Thread, queue.SimpleQueue[tuple[UMv2Table, Tensor] | None]] | None = None
        # A thread that still computes while the interpreter is taken down can abort the process.
        atexit.register(self.stop)

    def put(self, table: UMv2Table, rows: Tensor) -> None:
        """Have the thread fetch ``rows``; it starts with the first request of a process (after a fork: anew)."""
        worker = self._worker
        if worker is None or not worker[0].is_alive():
            requests: queue.SimpleQueue[tuple[UMv2Table, Tensor] | None] = queue.SimpleQueue()
            thread = threading.Thread(target=_serve, args=(requests,), name="umv2 fetch", daemon=True)
            thread.start()
            # Without a lock, which a fork could leave locked: of first requests at the same time each starts a thread.
            worker = self._worker = (thread, requests)
        worker[1].put((table, rows))

    def stop(self) -> None:
        """End the thread: requests that it has not begun are dropped, the one in hand is waited for."""
        worker, self._worker = self._worker, None
        if worker is None or not worker[0].is_alive():
            return
        with contextlib.suppress(queue.Empty):
            while True:
                worker[1].get_nowait()
        worker[1].put(None)
        worker[0].join()


def _serve(requests: queue.SimpleQueue[tuple[UMv2Table, Tensor] | None]) -> None:
    while True:
        request = requests.get()
        if request is None:
            return
        table, rows = request
        table._fetch_now(rows)
        del request, table, rows  # a model that is dropped is not kept by the thread that waits


_FETCHER = _Fetcher()


def pick_rows(chunks: Sequence[Tensor], chunk_rows: int, rows: Tensor) -> Tensor:
    """``rows`` [n] int64 of a table in ``chunks`` of ``chunk_rows`` rows (the last may have fewer): [n, D]."""
    if len(chunks) == 1:
        return functional.embedding(rows, chunks[0])
    if torch.compiler.is_compiling():  # how many rows lie in a chunk is not known then: each chunk gives all, or zeros
        parts = []
        for index, chunk in enumerate(chunks):
            own = rows - index * chunk_rows
            inside = (own >= 0) & (own < chunk.shape[0])
            part = functional.embedding(own.clamp(0, chunk.shape[0] - 1), chunk)
            parts.append(part.masked_fill(~inside.unsqueeze(1), 0))
        return torch.stack(parts).sum(0, dtype=chunks[0].dtype)
    picked = chunks[0].new_empty(rows.shape[0], chunks[0].shape[1])
    for index, own, place in by_chunk(len(chunks), chunk_rows, rows):
        picked.index_copy_(0, place, functional.embedding(own, chunks[index]))
    return picked


def by_chunk(chunks: int, chunk_rows: int, rows: Tensor) -> Iterable[tuple[int, Tensor, Tensor]]:
    """For each chunk that is asked for: its index, the rows in it, and their places in ``rows`` [n]."""
    chunk_of = rows.div(chunk_rows, rounding_mode="floor")
    for index in range(chunks):
        (place,) = (chunk_of == index).nonzero(as_tuple=True)
        if place.numel():
            yield index, rows[place] - index * chunk_rows, place


class UMv2Rows(nn.Module):
    """Parameters ``0``, ``1``, ...: the chunks of the values or of the pre-values of a table on the device.

    Rows are picked by this module's forward, because what brings parameters to a device for a while (accelerate's
    offload, sharding) does so around the forward of the module that they belong to.

    Args:
        shapes: rows and columns of each chunk; all but the last have the same number of rows.
    """

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.chunk_rows = shapes[0][0]
        self.count = len(shapes)  # adapters move parameters
        for index, shape in enumerate(shapes):
            self.register_parameter(str(index), nn.Parameter(torch.empty(*shape)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):  # also what ends an iteration
            raise IndexError(f"chunk {index} of {len(self)}")
        return getattr(self, str(index))

    def forward(self, rows: Tensor) -> Tensor:
        """``rows`` [n] int64, on any device: [n, D]."""
        chunks = list(self)
        return pick_rows(chunks, self.chunk_rows, rows.to(chunks[0].device))


class UMv2Int8Rows(UMv2Rows):
    """Rows of int8 on the device: buffers ``0``, ``1``, ... that are moved with the model and not saved.

    Args:
        chunks: as ``int8_rows`` gives them.
    """

    def __init__(self, chunks: list[Tensor]) -> None:
        nn.Module.__init__(self)
        self.chunk_rows, self.count = chunks[0].shape[0], len(chunks)
        for index, chunk in enumerate(chunks):
            self.register_buffer(str(index), chunk, persistent=False)


class UMv2Table(nn.Module):
    """A value table: ``values.C`` and ``pre_values.C`` for chunks C = 0, 1, ..., each [rows of the chunk, Dv or Dp].

    Args:
        config: of the model.
        rows: A, of the whole table.
        value_dim: Dv, where it is not that of the configuration's memory layers; such a table has no pre-values.
        place: one of ``PLACES``. Off the device and in int8 there are no parameters; the chunks come by ``attach``.
    """

    def __init__(self, config: UMv2Config, rows: int, place: str, value_dim: int | None = None) -> None:
        super().__init__()
        self.rows = rows
        self.place, _, rounded = place.partition("-")
        self.rounded = bool(rounded)
        self.chunk_rows = min(config.memory_table_chunk_rows or rows, rows)
        widths = {"values": config.memory_value_dim, "pre_values": config.memory_pre_value_dim}
        if value_dim is not None:
            widths = {"values": value_dim}
        self.widths = {kind: width for kind, width in widths.items() if width}
        self.dtype = torch.get_default_dtype()  # that of the model, in which picked rows are given
        self._mapped: dict[str, list[MappedTensor]] = {}
        self._announcements_left, self._faults = _ANNOUNCED, 0
        for kind in self.widths:
            setattr(self, kind, UMv2Rows(self.chunk_shapes(kind)) if place == PLACES[0] else [])

    def chunk_shapes(self, kind: str) -> list[tuple[int, int]]:
        """Rows and columns of each chunk of ``kind``."""
        starts = range(0, self.rows, self.chunk_rows)
        return [(min(self.chunk_rows, self.rows - start), self.widths[kind]) for start in starts]

    def attach(self, kind: str, chunks: list[MappedTensor]) -> None:
        """Take the chunks of ``kind`` from mapped files: as they are ("mmap"), or read into memory."""
        if self.place == "mmap":
            self._mapped[kind] = chunks
            setattr(self, kind, [chunk.tensor for chunk in chunks])
            return
        pin = self.place == "cpu" and torch.cuda.is_available()
        if self.rounded:
            rounded = [int8_rows(chunk.tensor, pin) for chunk in chunks]
            setattr(self, kind, UMv2Int8Rows(rounded) if self.place == "device" else rounded)
            return
        copies = [torch.empty(chunk.tensor.shape, dtype=self.dtype, pin_memory=pin) for chunk in chunks]
        for copy, chunk in zip(copies, chunks):
            copy.copy_(chunk.tensor)
        setattr(self, kind, copies)

    def is_plain(self) -> bool:
        """Whether rows are picked as this class does it, from float numbers: nothing else has been put on it or in the
        place of its chunks."""
        if type(self) is not UMv2Table or self.rounded or not {"pick", "announce", "forward"}.isdisjoint(self.__dict__):
            return False
        return self.place != "device" or all(is_plain(getattr(self, kind), UMv2Rows) for kind in self.widths)

    def files(self) -> set[str]:
        """The files that rows are read from."""
        return {chunk.path for chunks in self._mapped.values() for chunk in chunks}

    def announce(self, rows: Tensor) -> Tensor:
        """``rows`` (any shape) will be picked soon; gives them in host memory if the table is there, for ``pick``."""
        if self.place == "device":
            return rows
        rows = rows.cpu()
        if self.place == "mmap" and not torch.compiler.is_compiling():
            self._fetch(rows.flatten())
        return rows

    def _fetch(self, rows: Tensor) -> None:
        """Fetch rows while the FFN computes, if reading them had to wait for a disk not long ago."""
        if self.waits_for_disk():
            _FETCHER.put(self, rows)

    def waits_for_disk(self) -> bool:
        """Whether rows that are about to be picked are to be fetched: reading them had to wait for a disk not long
        ago."""
        faults = _page_faults()
        if faults > self._faults:
            self._announcements_left = _ANNOUNCED
        self._faults = faults
        if not self._announcements_left or not hasattr(os, "posix_fadvise"):
            return False
        self._announcements_left -= 1
        return True

    def _fetch_now(self, rows: Tensor) -> None:
        for chunks in self._mapped.values():
            for index, own, _ in by_chunk(len(chunks), self.chunk_rows, rows):
                chunks[index].fetch(own)

    def pick(self, kind: str, rows: Tensor, device: torch.device) -> Tensor:
        """``rows`` [n], as ``announce`` gave them: [n, Dv or Dp] on ``device``, in the dtype of the model."""
        chunks = getattr(self, kind)
        if self.place == "device" and not self.rounded:
            return chunks(rows).to(device)  # called, and nothing else: adapters put modules of their own there
        if not len(chunks):
            given = f"{self.place}-int8" if self.rounded else self.place
            raise ValueError(
                f"memory_tables is {given!r}, but this model was not made by from_pretrained, which attaches the "
                "tables of the files; use it, or memory_tables='device'"
            )
        picked = chunks(rows) if self.place == "device" else pick_rows(chunks, self.chunk_rows, rows)
        if device.type == "cuda" and self.place != "device":
            picked = picked.pin_memory()
        if self.rounded:
            return exact_rows(picked.to(device, non_blocking=True), self.dtype)
        return picked.to(device=device, dtype=self.dtype, non_blocking=True)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped table is copied and pickled as the places in its files, which the copy maps again.
        return {**self.__dict__, **dict.fromkeys(self._mapped, [])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for kind, chunks in self._mapped.items():
            self.attach(kind, chunks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UMv2Table:
        # Tables off the device stay where they are; picked rows follow the model's dtype.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[return-value]


def _page_faults() -> int:
    """Page faults of this process that waited for a disk."""
    try:
        import resource
    except ImportError:  # not on this system: never announce but at the start
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def attach_tables(tables: dict[str, UMv2Table], files: dict[str, str]) -> None:
    """Give ``tables`` (by the name of the module inside UMv2Model) their chunks.

    Args:
        files: path of the safetensors file that holds each tensor, by the tensor's name.

    Raises ``ValueError`` naming the tensor that is missing or has another shape.
    """
    headers = {path: _read_header(path) for path in set(files.values())}
    for name, table in tables.items():
        for kind in table.widths:
            chunks = []
            for index, shape in enumerate(table.chunk_shapes(kind)):
                tensor = f"{name}.{kind}.{index}"
                found = f"model.{tensor}" if f"model.{tensor}" in files else tensor
                header, start = headers[files[found]] if found in files else ({}, 0)
                if found not in header:
                    raise ValueError(
                        f"{tensor} is in none of the model's safetensors files; the export is not complete"
                    )
                chunks.append(MappedTensor(files[found], found, header[found], start))
                if chunks[-1].tensor.shape != shape:
                    raise ValueError(f"{found} is {list(chunks[-1].tensor.shape)}; config.json asks for {list(shape)}")
            table.attach(kind, chunks)


def _read_header(path: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the bytes before its first tensor."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LARGEST_HEADER, os.path.getsize(path) - 8):
            raise ValueError(f"{path} starts with a length of {length} bytes; expected a safetensors file")
        try:
            return json.loads(file.read(length)), 8 + length
        except ValueError as error:
            raise ValueError(f"{path} has no readable header; expected a safetensors file ({error})") from error


def tensor_files(find: Callable[[str], str | None]) -> dict[str, str]:
    """Path of the safetensors file of each tensor of a model. ``find`` gives the path of a file of the model by its
    name, or None.

    Raises ``ValueError`` where there is no such file.
    """
    whole = find("model.safetensors")  # before the index, as transformers has it
    if whole is not None:
        return {name: whole for name in _read_header(whole)[0] if name != "__metadata__"}
    index = find("model.safetensors.index.json")
    if index is None:
        raise ValueError("memory_tables other than 'device' read model.safetensors, which is missing")
    with open(index, encoding="utf-8") as file:
        names: dict[str, str] = json.load(file)["weight_map"]
    outside = [name for name in names.values() if os.path.basename(name) != name]
    if outside:
        raise ValueError(f"{index} names the file {outside[0]!r}; expected files that lie beside it")
    paths = {name: find(name) for name in sorted(set(names.values()))}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{missing[0]}, which {index} names, is missing; the export is not complete")
    return {tensor: str(paths[name]) for tensor, name in names.items()}

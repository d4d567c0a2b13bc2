"""What a conversion will read and write, decided and checked before a byte of a tensor moves.

Both directions come from the same pairings (``hf/name_table.py``). Every tensor of the source must be one of them, with
the shape and dtype that the configuration says, and every one of them must be there; what differs is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from umv2_megatron.conversion.safetensors_files import ConversionError, TensorInfo
from umv2_megatron.hf.name_table import Pairing, Part

BLOCK_BYTES = 32 << 20
"""Bytes of a tensor that are in memory at a time (one row more, where a row is larger)."""


@dataclass(frozen=True)
class Piece:
    """Rows of the source tensor ``name``, from ``start`` to before ``stop``."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Copy:
    """A tensor to be written and the rows that make it up, in order."""

    name: str
    info: TensorInfo
    pieces: tuple[Piece, ...]

    def blocks(self, start: int = 0, stop: int | None = None, rows: int | None = None) -> Iterable[tuple[Piece, ...]]:
        """The pieces of rows [start, stop) cut into blocks of ``rows`` (or of ``BLOCK_BYTES``)."""
        size = rows or max(1, BLOCK_BYTES // max(1, self.info.row_bytes))
        stop = self.info.rows if stop is None else stop
        for first in range(start, stop, size):
            yield self._between(first, min(first + size, stop))

    def _between(self, start: int, stop: int) -> tuple[Piece, ...]:
        found, at = [], 0
        for piece in self.pieces:
            length = piece.stop - piece.start
            first, last = max(start - at, 0), min(stop - at, length)
            if first < last:
                found.append(Piece(piece.name, piece.start + first, piece.start + last))
            at += length
        return tuple(found)


def output_dtype(kind: str, stored: torch.dtype, weights: torch.dtype) -> torch.dtype:
    """The dtype that a tensor gets: that of the weights, or its own for vectors kept in float32 and for indices."""
    return weights if kind == "weights" else stored


def check_source(
    held: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[tuple[int, ...], str, bool]],
    weights: torch.dtype,
    where: str,
) -> None:
    """Compare what a source holds with what its configuration says: name -> (shape, kind of dtype, may be padded).

    Raises ``ConversionError`` naming the first tensor that is missing, extra, or of another shape or dtype.
    """
    for name in expected:
        if name not in held:
            raise ConversionError(f"{where}: {name} is missing, which its configuration asks for")
    for name in held:
        if name not in expected:
            raise ConversionError(f"{where}: {name} is extra: its configuration has no such tensor")
    kinds = {"weights": (weights,), "float32": (torch.float32,), "index": (torch.int32, torch.int64)}
    for name, (shape, kind, padded) in expected.items():
        found = held[name]
        fits = found.shape == shape
        if padded:
            fits = len(found.shape) == len(shape) and found.shape[1:] == shape[1:] and found.shape[0] >= shape[0]
        if not fits:
            raise ConversionError(f"{where}: {name} has shape {found.shape}; expected {shape}")
        if found.dtype not in kinds[kind]:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in kinds[kind])
            raise ConversionError(
                f"{where}: {name} has dtype {str(found.dtype).removeprefix('torch.')}; expected {allowed}"
            )


def part_shape(pairing: Pairing, part: Part) -> tuple[int, ...]:
    """Shape of a Hugging Face tensor."""
    return (part.rows, *pairing.shape[1:])


def copies_to_hf(pairings: Sequence[Pairing], held: Mapping[str, TensorInfo], weights: torch.dtype) -> list[Copy]:
    """Every Hugging Face tensor, in the order of the model."""
    copies = []
    for pairing in pairings:
        dtype = output_dtype(pairing.dtype, held[pairing.key].dtype, weights)
        for part in pairing.parts:
            pieces = tuple(Piece(pairing.key, start, stop) for start, stop in part.ranges)
            copies.append(Copy(part.name, TensorInfo(dtype, part_shape(pairing, part)), pieces))
    _assert_each_row_once(pairings, copies)
    return copies


def _assert_each_row_once(pairings: Sequence[Pairing], copies: Sequence[Copy]) -> None:
    """The name table takes each row of each Megatron tensor exactly once (padding of the vocabulary aside)."""
    taken: dict[str, list[tuple[int, int]]] = {pairing.key: [] for pairing in pairings}
    for copy in copies:
        for piece in copy.pieces:
            taken[piece.name].append((piece.start, piece.stop))
    for pairing in pairings:
        at = 0
        for start, stop in sorted(taken[pairing.key]):
            assert start == at, f"{pairing.key}: row {at} is taken twice or not at all"
            at = stop
        assert at == pairing.shape[0], f"{pairing.key}: rows from {at} on are not taken"
    assert len({copy.name for copy in copies}) == len(copies), "two tensors of one name"


def copies_to_megatron(pairings: Sequence[Pairing], held: Mapping[str, TensorInfo], weights: torch.dtype) -> list[Copy]:
    """Every Megatron tensor, in the order of the model: the name table read backwards."""
    copies = []
    for pairing in pairings:
        placed = []
        for part in pairing.parts:
            at = 0
            for start, stop in part.ranges:
                placed.append((start, Piece(part.name, at, at + stop - start)))
                at += stop - start
        placed.sort(key=lambda pair: pair[0])
        dtype = output_dtype(pairing.dtype, held[pairing.parts[0].name].dtype, weights)
        copy = Copy(pairing.key, TensorInfo(dtype, pairing.shape), tuple(piece for _, piece in placed))
        assert sum(piece.stop - piece.start for piece in copy.pieces) == pairing.shape[0], pairing.key
        copies.append(copy)
    return copies


def group_by_size(copies: Sequence[Copy], largest: int) -> list[list[Copy]]:
    """Copies in order, in files of at most ``largest`` bytes; one that is larger by itself gets a file of its own."""
    groups: list[list[Copy]] = []
    size = 0
    for copy in copies:
        if not groups or size + copy.info.num_bytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(copy)
        size += copy.info.num_bytes
    return groups


def parse_size(text: str) -> int:
    """``4GB``, ``500MB``, ``1GiB`` or a number of bytes. Raises ``ValueError`` naming --max-shard-size."""
    units = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    upper = text.strip().upper()
    unit = next(unit for unit in units if upper.endswith(unit))
    try:
        size = int(float(upper.removesuffix(unit)) * units[unit])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"--max-shard-size is {text!r}; expected a size such as 4GB, 500MB or 1GiB")
    return size


def assemble(rows: Callable[[str, int, int], torch.Tensor], block: Sequence[Piece], dtype: torch.dtype) -> torch.Tensor:
    """The rows of ``block``, read by ``rows(name, start, stop)``, as one contiguous tensor of ``dtype``.

    Raises ``ConversionError`` naming the tensor with a number too large for float16.
    """
    parts = []
    for piece in block:
        read = rows(piece.name, piece.start, piece.stop)
        parts.append(read.to(dtype))
        if dtype == torch.float16 and not bool(torch.equal(read.isfinite(), parts[-1].isfinite())):
            raise ConversionError(
                f"{piece.name} holds a number too large for float16; give --dtype bfloat16 or float32"
            )
    return parts[0] if len(parts) == 1 else torch.cat(parts)

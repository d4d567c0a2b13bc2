"""Files of token ids that another program made (dolma's .npy), whole or by ranges of bytes, as documents.

Such a file is a flat array of little-endian unsigned integers, and an end-of-document token ends each document. dolma
writes no header, whatever the name says; files that numpy.save wrote, with one, are read, too. A document belongs to
the range in which it begins. "Lines" are documents, counted from 1 in the file.

Sources: dolma, python/dolma/tokenizer/memmap_writer.py; OLMo-core, src/olmo_core/data/utils.py (iter_document_indices).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Optional

import numpy as np

from umv2_megatron.data.corpus import (
    EXCERPT_BYTES,
    Chunk,
    CorpusError,
    CorpusOptions,
    Record,
    Segment,
    TokenIds,
    too_long,
)

_BLOCK = 1 << 19  # ids read at once
_SAMPLE = 1 << 16  # ids by which a wrong type is noticed
_MAGIC = b"\x93NUMPY"
_MOST = (1 << 31) - 1  # tokens of a document, which an index counts in int32


@dataclass
class TokenChunk(Chunk):
    """Consecutive documents: ``tokens`` [n], the ``lengths`` [documents] of those in it, each with its end, the number
    of the ``first`` in the segment, and ``rest``, the ids of a last document that no token ends. Records are faults."""

    tokens: Optional[np.ndarray] = None
    lengths: Optional[np.ndarray] = None
    first: int = 0
    rest: Optional[np.ndarray] = None


class TokenReader:
    """Reads segments of one file of token ids; the interface of ``FileReader``."""

    def __init__(self, path: str, options: CorpusOptions) -> None:
        assert options.ids is not None
        self.path = path
        self.size = 0
        self._options = options
        self._ids = options.ids
        self._limit = options.max_line_bytes
        self._file: Optional[BinaryIO] = None
        self._dtype = np.dtype(np.uint16)
        self._header = 0
        self._begin = self._documents = 0  # of the segment that was read last: its first id, its documents

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def lines_read(self) -> int:
        return self._documents

    def lines_before(self) -> int:
        count = 0
        for at in range(0, self._begin, _BLOCK):
            count += int((self._read(at, min(_BLOCK, self._begin - at)) == self._ids.eod).sum())
        return count

    def check(self) -> None:
        """Raise ``CorpusError`` for a file that is no array of ids, or whose ids look like those of another type."""
        self._open()
        sample = self._read(0, _SAMPLE)
        halves = sample[: len(sample) // 2 * 2].reshape(-1, 2)
        vocab_size = self._ids.vocab_size
        low, high = (float((halves[:, i] <= 15).mean()) if len(halves) >= 32 else 0.0 for i in (0, 1))
        if self._dtype.itemsize == 2 and high > 0.99 and low < 0.5:
            raise CorpusError(f"{self.path}: every other id is about 0, as in uint32 ids: give --token-dtype uint32")
        if self._dtype.itemsize == 4 and len(sample) and (sample >= vocab_size).mean() > 0.5:
            raise CorpusError(
                f"{self.path}: most ids are outside of the vocabulary of {vocab_size}: give --token-dtype uint16, or "
                "the tokenizer that made the file"
            )

    def chunks(self, segment: Segment) -> Iterator[Chunk]:
        """Documents of ``segment`` in chunks; see ``FileReader.chunks``."""
        try:
            self._open()
            yield from self._chunks(segment)
        except OSError as error:
            raise CorpusError(f"{self.path}: the file cannot be read: {error.strerror}") from error

    def _chunks(self, segment: Segment) -> Iterator[Chunk]:
        total = (self.size - self._header) // self._dtype.itemsize
        end = total if segment.end is None else self._index(segment.end, total)
        at = self._begin = self._first(self._index(segment.begin, total), total)
        self._documents = 0
        rest = np.empty(0, self._dtype)  # ids of a document whose end has not been read
        skips = False  # whether the document is too long, and left out up to its end
        done = self._begin >= end
        while not done:
            block = self._read(at, _BLOCK)
            if not len(block):
                raise CorpusError(f"{self.path}: the file has become shorter: leave it as it is while it is read")
            at += len(block)
            ends = np.flatnonzero(block == self._ids.eod) + 1
            beyond = np.searchsorted(ends, end - (at - len(block)))  # the first end at or after that of the segment
            if beyond < len(ends):
                ends = ends[: beyond + 1]
                done = True
            chunk = TokenChunk(self.path, False, position=self._position(at, segment))
            if skips and len(ends):
                block, ends, skips = block[ends[0] :], ends[1:] - ends[0], False
            if len(ends):
                lengths = np.diff(ends, prepend=0)
                lengths[0] += len(rest)
                tokens = np.concatenate([rest, block[: ends[-1]]]) if len(rest) else block[: ends[-1]]
                chunk.tokens, chunk.lengths, chunk.first = tokens, lengths, self._documents + 1
                self._documents += len(lengths)
                rest = np.empty(0, self._dtype)
            if not done and not skips:
                rest = np.concatenate([rest, block[ends[-1] if len(ends) else 0 :]])
                if self._is_too_long(len(rest)):
                    chunk.records.append(self._too_long(rest))
                    rest, skips = rest[:0], True
            if at >= total and not done:
                done = True
                if len(rest):
                    self._documents += 1
                    chunk.rest = rest
                    chunk.first = chunk.first or self._documents
            if chunk.lengths is not None or chunk.records or chunk.rest is not None:
                yield chunk

    def _is_too_long(self, count: int) -> bool:
        return count * self._dtype.itemsize > self._limit or count > _MOST

    def _too_long(self, ids: np.ndarray) -> Record:
        self._documents += 1
        return Record(self._documents, excerpt_of(ids), too_long("document", self._limit))

    def _index(self, byte: int, total: int) -> int:
        """The first id that begins at or after a byte of the file."""
        return min(max(0, -(-(byte - self._header) // self._dtype.itemsize)), total)

    def _first(self, index: int, total: int) -> int:
        """The first id at or after ``index`` with which a document begins."""
        at = index - 1
        while 0 <= at < total:
            block = self._read(at, _BLOCK)
            found = np.flatnonzero(block == self._ids.eod)
            if len(found):
                return at + int(found[0]) + 1
            at += len(block)
        return 0 if index == 0 else total

    def _position(self, index: int, segment: Segment) -> int:
        return max(0, self._header + index * self._dtype.itemsize - segment.begin)

    def _read(self, index: int, count: int) -> np.ndarray:
        assert self._file is not None
        self._file.seek(self._header + index * self._dtype.itemsize)
        return np.frombuffer(self._file.read(count * self._dtype.itemsize), self._dtype)

    def _open(self) -> None:
        if self._file is not None:
            return
        self._file = open(self.path, "rb")  # noqa: SIM115  close() closes it
        self.size = os.fstat(self._file.fileno()).st_size
        self._dtype = np.dtype(self._ids.dtype).newbyteorder("<")
        if self._file.read(len(_MAGIC)) == _MAGIC:
            self._read_header(self._file)
        odd = (self.size - self._header) % self._dtype.itemsize
        if odd:
            raise CorpusError(
                f"{self.path}: {self.size - self._header} bytes are no whole number of {self._dtype.name} ids: the "
                "file is cut, or --token-dtype is another"
            )

    def _read_header(self, file: BinaryIO) -> None:
        """Of a file by numpy.save. One of ids that happens to begin with the mark has no header behind it."""
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except ValueError:
            return
        if len(shape) != 1 or dtype.kind not in "iu":
            raise CorpusError(f"{self.path}: it is an array {list(shape)} of {dtype}: expected one row of integers")
        self._header, self._dtype = file.tell(), dtype


def excerpt_of(ids: np.ndarray) -> bytes:
    """The first ids of a document, as text."""
    return " ".join(map(str, ids[:EXCERPT_BYTES].tolist())).encode()[:EXCERPT_BYTES]


def ids_by_size(dtype: str, vocab_size: int, eod: int) -> TokenIds:
    """``dtype`` "auto": uint16 where all ids fit into it, otherwise uint32, as OLMo-core chooses."""
    if dtype == "auto":
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    return TokenIds(dtype, vocab_size, eod)

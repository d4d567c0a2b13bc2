"""Text files of a corpus, whole or by ranges of bytes, as a stream of records.

A file is read front to back and never held whole, so memory does not grow with the corpus: the largest thing kept is
one record, whose size is limited. Several processes can read one file together: the file's bytes, as stored, are cut
into ranges, and a range owns the lines (with --text-split blank-line: the paragraphs) that begin in it, so every one
belongs to exactly one range, wherever the cuts fall. In a file that is not compressed a reader goes straight to its
range. A compressed file must be decompressed from its start, but only what is in the range becomes records; a line
belongs to the range in which the bytes lie that were read when its first byte came out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO, Optional

from umv2_megatron.data.compression import Damaged, Decompressed, Unsupported, opened
from umv2_megatron.data.corpus import (
    CHUNK_BYTES,
    CHUNK_RECORDS,
    DAMAGED,
    EXCERPT_BYTES,
    Chunk,
    CorpusError,
    CorpusOptions,
    Record,
    Segment,
    format_of,
    too_long,
)

_BOM = b"\xef\xbb\xbf"


class FileReader:
    """Reads segments of one file, in rising order; a compressed file stays open between them.

    ``stride``: the ends of segments of a compressed file are multiples of it.
    """

    def __init__(self, path: str, options: CorpusOptions, stride: int = 0) -> None:
        self.path = path
        self.is_json = format_of(path, options.input_format) == "jsonl"
        self.size = 0
        self._options = options
        self._stride = stride
        self._whole = not self.is_json and options.text_split == "file"
        self._paragraphs = not self.is_json and options.text_split == "blank-line"
        self._file: Optional[BinaryIO] = None
        self._lines: Optional[_Lines] = None
        self._begin_line = self._begin_offset = 0  # of the segment: lines and bytes of the content before it
        self._owns = False  # whether the segment's first line has been reached
        self._reached = 0  # where in the file the segment before this one ended,
        self._last_blank: Optional[int] = None  # and at which blank line of the content

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def chunks(self, segment: Segment) -> Iterator[Chunk]:
        """Records of ``segment`` in chunks; their lines are counted from 1 at the first that the segment owns.

        ``position`` counts the bytes of the segment that have been read. Raises ``CorpusError`` where the reader, not
        the data, is the reason, and where the system fails.
        """
        chunk, size = Chunk(self.path, self.is_json), 0
        try:
            self._open()
            assert self._file is not None
            for record in self._records(segment):
                chunk.records.append(record)
                size += len(record.data)
                if size >= CHUNK_BYTES or len(chunk.records) >= CHUNK_RECORDS:
                    chunk.position = max(0, self._file.tell() - segment.begin)
                    yield chunk
                    chunk, size = Chunk(self.path, self.is_json), 0
            chunk.position = max(0, self._file.tell() - segment.begin)
        except OSError as error:
            raise CorpusError(f"{self.path}: the file cannot be read: {error.strerror}") from error
        if chunk.records:
            yield chunk

    def lines_read(self) -> int:
        """Lines of the segment that was read last."""
        return self._lines.number - self._begin_line if self._lines is not None else 0

    def lines_before(self) -> int:
        """Lines of the file before the segment that was read last."""
        if self._lines is None or self._lines.compressed is not None:
            return self._begin_line
        left, lines = self._begin_offset, 0
        with open(self.path, "rb") as file:
            while left and (data := file.read(min(left, CHUNK_BYTES))):
                lines += data.count(b"\n")
                left -= len(data)
        return lines

    def _open(self) -> None:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115  close() closes it
            self.size = self._file.seek(0, os.SEEK_END)
            self._file.seek(0)

    def _start(self, segment: Segment) -> _Lines:
        """Lines to read the segment from: those of a compressed file go on where the segment before it ended."""
        assert self._file is not None
        lines = self._lines
        if lines is None or lines.compressed is None or segment.begin < self._reached:
            self._lines, self._reached, self._last_blank = None, 0, None
            self._file.seek(0)
            lines = self._lines = _Lines(self._file, self.path, self._options.max_line_bytes, self._stride)
        self._begin_line, self._begin_offset = lines.number, lines.offset
        return lines

    def _records(self, segment: Segment) -> Iterator[Record]:
        """Records of the segment; a stream that breaks off ends with a record that carries the fault."""
        self._owns = not segment.begin
        try:
            lines = self._start(segment)
            if self._whole:
                records = _whole_file(lines.stream, self._options.max_line_bytes)
            else:
                records = self._lines_of(lines, segment)
                if self._paragraphs:
                    records = _paragraphs(records, self._options.max_line_bytes)
            for record in records:
                if record.line == 1 and not self._begin_offset and record.data.startswith(_BOM):
                    record = record._replace(data=record.data[len(_BOM) :])
                yield record
        except Damaged as error:
            broken = self._lines
            if broken is not None:
                broken.fault = error
                if not self._whole and not self._paragraphs:
                    self._owns = broken.passed(segment.begin) and not broken.passed(segment.end)
            if self._owns:
                yield Record(self.lines_read() + 1, b"", f"{DAMAGED} ({error})")
        except Unsupported as error:
            line = self._lines.number + 1 if self._lines is not None else 1
            raise CorpusError(f"{self.path}:{line}: {error}") from None

    def _lines_of(self, lines: _Lines, segment: Segment) -> Iterator[Record]:
        """The lines that the segment owns.

        Split into paragraphs it owns those after the first blank line that begins at or after ``begin``, up to the
        first that begins at or after ``end``.
        """
        begin, end = segment.begin, segment.end
        blank_at = self._last_blank if begin and lines.passed(begin, self._last_blank) else None
        self._reached, self._last_blank = begin, None
        if begin and blank_at is None:
            if lines.compressed is None:
                lines.seek(begin)
            while not self._owns:
                start, passed = lines.offset, lines.passed(begin, look=True)
                if passed and not self._paragraphs:
                    break
                record = lines.read()
                self._begin_line, self._begin_offset = lines.number, lines.offset
                if record is None:
                    return
                if passed and _is_blank(record):
                    blank_at = start
                    break
        self._begin_line, self._begin_offset = lines.number, lines.offset
        self._owns = True
        if blank_at is None or not lines.passed(end, blank_at):
            while self._paragraphs or not lines.passed(end, look=True):
                start = lines.offset
                passed = self._paragraphs and lines.passed(end, look=True)
                record = lines.read()
                if record is None:
                    break
                yield record._replace(line=record.line - self._begin_line)
                if passed and _is_blank(record):
                    blank_at = start
                    break
        if end is not None:
            self._reached, self._last_blank = end, blank_at


class _Lines:
    """Lines without their ending (LF or CRLF); of a line longer than ``limit`` bytes only the beginning is kept.

    Attributes: ``offset`` (byte of the content at which the next line begins), ``number`` (lines read so far),
    ``fault`` (the damage that has ended the content).
    """

    def __init__(self, file: BinaryIO, path: str, limit: int, stride: int) -> None:
        self.stream: Any = opened(file, path, stride)
        raw = getattr(self.stream, "raw", None)
        self.compressed = raw if isinstance(raw, Decompressed) else None
        self.offset = self.number = 0
        self.fault: Optional[Damaged] = None
        self._limit = limit

    def seek(self, begin: int) -> None:
        """Go to the first line that begins at or after ``begin``, in a file that is not compressed."""
        self.stream.seek(begin - 1)
        while (data := self.stream.readline(CHUNK_BYTES)) and not data.endswith(b"\n"):
            pass
        self.offset = self.stream.tell()

    def passed(self, place: Optional[int], offset: Optional[int] = None, look: bool = False) -> bool:
        """Whether the line at ``offset`` (default: the next) begins at or after ``place`` of the file as stored.

        ``look``: read ahead where that is needed to know it.
        """
        if place is None or not place:
            return place is not None
        offset = self.offset if offset is None else offset
        if self.compressed is None:
            return offset >= place
        if look and self.fault is None and self.compressed.produced <= offset:
            self.stream.peek(1)
        mark = self.compressed.marks.get(place)
        return mark is not None and offset >= mark

    def read(self) -> Optional[Record]:
        """The next line; None at the end."""
        if self.fault is not None:
            raise self.fault
        limit = self._limit
        data = self.stream.readline(limit + 2)
        if not data:
            return None
        size = len(data)
        ended = data.endswith(b"\n")
        content = _without_ending(data)
        whole = len(content) <= limit
        while not whole and not ended and (rest := self.stream.readline(CHUNK_BYTES)):
            ended = rest.endswith(b"\n")
            size += len(rest)
        self.offset += size
        self.number += 1
        if whole:
            return Record(self.number, content, "")
        return Record(self.number, content[:EXCERPT_BYTES], too_long("line", limit))


def _is_blank(record: Record) -> bool:
    return not record.data.strip() and not record.fault


def _without_ending(data: bytes) -> bytes:
    if data.endswith(b"\r\n"):
        return data[:-2]
    return data[:-1] if data.endswith(b"\n") else data


def _paragraphs(lines: Iterator[Record], limit: int) -> Iterator[Record]:
    """Runs of lines between blank ones, joined by newlines; the line number is the first line's."""
    parts: list[bytes] = []
    first, size, fault = 0, 0, ""
    for record in lines:
        if not _is_blank(record):
            if not parts:
                first = record.line
            if size <= limit:
                parts.append(record.data)
                size += len(record.data) + 1
            fault = fault or record.fault or (too_long("paragraph", limit) if size > limit + 1 else "")
        elif parts:
            yield _paragraph(first, parts, fault)
            parts, size, fault = [], 0, ""
    if parts:
        yield _paragraph(first, parts, fault)


def _paragraph(first: int, parts: list[bytes], fault: str) -> Record:
    data = b"\n".join(parts)
    return Record(first, data[:EXCERPT_BYTES] if fault else data, fault)


def _whole_file(stream: BinaryIO, limit: int) -> Iterator[Record]:
    data = stream.read(limit + 1)
    if len(data) > limit:
        yield Record(1, data[:EXCERPT_BYTES], too_long("file", limit) + "; or cut it by --text-split")
    elif data:
        yield Record(1, data, "")

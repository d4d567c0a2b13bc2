"""Rows of Parquet files, whole or by ranges of bytes, as records: JSON objects that hold the columns asked for.

A row group belongs to the range in which its first byte lies. "Lines" are rows, counted from 1 in the file; those that
the filter leaves out are counted, too. Row groups do not depend on each other: damage loses the rest of one only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Optional

from umv2_megatron.data.compression import Damaged, Unsupported
from umv2_megatron.data.corpus import (
    CHUNK_BYTES,
    CHUNK_RECORDS,
    DAMAGED_ROWS,
    EXCERPT_BYTES,
    Chunk,
    CorpusError,
    CorpusOptions,
    Record,
    Segment,
    too_long,
)
from umv2_megatron.data.parquet import ParquetFile, Row, RowGroup
from umv2_megatron.data.row_filter import RowFilter, parse_filter


class ParquetReader:
    """Reads segments of one Parquet file; the interface of ``FileReader``."""

    def __init__(self, path: str, options: CorpusOptions) -> None:
        self.path = path
        self.size = 0
        self._options = options
        self._file: Optional[ParquetFile] = None
        self._filter: Optional[RowFilter] = None
        self._groups: list[RowGroup] = []  # of the segment that was read last

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def lines_read(self) -> int:
        return sum(group.rows for group in self._groups)

    def lines_before(self) -> int:
        return self._groups[0].first if self._groups else 0

    def chunks(self, segment: Segment) -> Iterator[Chunk]:
        """Rows of ``segment`` in chunks; see ``FileReader.chunks``."""
        try:
            file = self._open()
            self._groups = [
                group
                for group in file.row_groups
                if group.begin >= segment.begin and (segment.end is None or group.begin < segment.end)
            ]
            for group in self._groups:
                yield from self._chunks_of(file, group, segment)
        except OSError as error:
            raise CorpusError(f"{self.path}: the file cannot be read: {error.strerror}") from error
        except (Damaged, Unsupported, ValueError) as error:
            raise CorpusError(f"{self.path}: {error}") from None

    def _open(self) -> ParquetFile:
        if self._file is None:
            self._file = ParquetFile(self.path)
            if self._options.row_filter is not None:
                self._filter = parse_filter(self._options.row_filter)
            self.size = self._file.size
            self._file.check(self._options.columns, self._filter)
        return self._file

    def _chunks_of(self, file: ParquetFile, group: RowGroup, segment: Segment) -> Iterator[Chunk]:
        before = group.first - self._groups[0].first
        end = next((each.begin for each in file.row_groups if each.begin > group.begin), file.size)
        chunk, size, passed = Chunk(self.path, True), 0, 0

        def finished(done: int) -> Chunk:
            chunk.position = group.begin - segment.begin + (end - group.begin) * done // max(group.rows, 1)
            return chunk

        try:
            for rows in file.rows(group, self._options.columns, self._filter):
                for row in rows:
                    chunk.left_out += row.number - passed
                    passed = row.number + 1
                    record = self._record(before + row.number + 1, row)
                    chunk.records.append(record)
                    size += len(record.data)
                    if size >= CHUNK_BYTES or len(chunk.records) >= CHUNK_RECORDS:
                        yield finished(passed)
                        chunk, size = Chunk(self.path, True), 0
            chunk.left_out += group.rows - passed
        except Damaged as error:
            chunk.records.append(Record(before + passed + 1, b"", f"{DAMAGED_ROWS} ({error})"))
        if chunk.records or chunk.left_out:
            yield finished(group.rows)

    def _record(self, line: int, row: Row) -> Record:
        values: dict[str, Optional[str]] = {}
        limit = self._options.max_line_bytes
        if sum(len(value or b"") for value in row.values) > limit:
            beginning = next(value for value in row.values if value)
            return Record(line, beginning[:EXCERPT_BYTES], too_long("row", limit))
        for key, value in zip(self._options.columns, row.values):
            try:
                values[key] = None if value is None else value.decode("utf-8")
            except UnicodeDecodeError as error:
                assert value is not None
                fault = f"the value of {key!r} is not UTF-8 at byte {error.start + 1}"
                return Record(line, value[:EXCERPT_BYTES], fault)
        return Record(line, json.dumps(values, ensure_ascii=False).encode("utf-8"), "")

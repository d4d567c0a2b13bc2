"""The reader of a file by its format, and whole corpora as a stream of chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from umv2_megatron.data.compression import Damaged, Unsupported
from umv2_megatron.data.corpus import Chunk, CorpusError, CorpusOptions, Segment, format_of
from umv2_megatron.data.parquet import ParquetFile
from umv2_megatron.data.parquet_records import ParquetReader
from umv2_megatron.data.records import FileReader
from umv2_megatron.data.row_filter import parse_filter
from umv2_megatron.data.token_records import TokenReader


class Reader(Protocol):
    """Reads segments of one file, in rising order; ``records.FileReader`` says what the methods do."""

    path: str
    size: int

    def chunks(self, segment: Segment) -> Iterator[Chunk]: ...

    def lines_read(self) -> int: ...

    def lines_before(self) -> int: ...

    def close(self) -> None: ...


def reader_of(path: str, options: CorpusOptions, stride: int = 0) -> Reader:
    """``stride``: the ends of segments of a compressed file are multiples of it."""
    kind = format_of(path, options.input_format)
    if kind == "parquet":
        return ParquetReader(path, options)
    if kind == "tokens":
        if options.ids is None:
            raise CorpusError(f"{path}: it holds token ids, and text is needed here; or leave the file out of --input")
        return TokenReader(path, options)
    return FileReader(path, options, stride)


def read_chunks(paths: Sequence[str], options: CorpusOptions) -> Iterator[Chunk]:
    """All records of ``paths`` in order, in chunks of about 1 MiB that do not cross files.

    Raises ``CorpusError`` for a file that is not supported, and one that the system fails to read.
    """
    done = 0
    for path in paths:
        reader = reader_of(path, options)
        try:
            for chunk in reader.chunks(Segment(path)):
                chunk.position += done
                yield chunk
        finally:
            reader.close()
        done += reader.size


def check_files(paths: Sequence[str], options: CorpusOptions) -> None:
    """Raise ``ValueError`` for a Parquet file without the columns asked for, and a filter that does not fit.

    Raises ``CorpusError`` for a file that cannot be read, and for one of token ids that looks like another.
    """
    for path in paths:
        kind = format_of(path, options.input_format)
        if kind == "tokens" and options.ids is not None:
            with contextlib.closing(TokenReader(path, options)) as reader:
                reader.check()
        if kind != "parquet":
            if options.row_filter is not None:
                raise ValueError(f"--filter is for rows of Parquet files, and {path} is none: give one or the other")
            continue
        try:
            file = ParquetFile(path)
        except (Damaged, Unsupported) as error:
            raise CorpusError(f"{path}: {error}") from None
        row_filter = None if options.row_filter is None else parse_filter(options.row_filter)
        with contextlib.closing(file):
            try:
                file.check(options.columns, row_filter)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None

"""Raw corpora as a stream of records, with the file and line of everything that is wrong.

A corpus is a list of files. JSONL files (``.jsonl .ndjson .json``) hold one document per line; any other file is plain
text and holds one document, or one per line, or one per paragraph. Either may be compressed (``.gz``, ``.zst``).
Files are read once, front to back, and never held whole, so memory does not grow with the corpus: the largest thing
kept is one record, whose size is limited. Faults are records too: the caller decides whether one ends the run.

The reading (``read_chunks``) happens in one process and hands raw bytes on; making text of them (``texts_of``) is
meant for worker processes.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, Optional

FORMATS = ("auto", "jsonl", "text")
TEXT_SPLITS = ("file", "line", "blank-line")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
# Records travel to the workers in chunks of about this size, so that passing them on costs little beside tokenising.
_CHUNK_BYTES = 1 << 20
_CHUNK_RECORDS = 1024
_EXCERPT_BYTES = 200


class CorpusError(Exception):
    """A fault in the corpus; the message starts with ``file:line``."""


class Record(NamedTuple):
    """One document as it stands in the file.

    ``line`` counts from 1; ``fault`` says why ``data`` could not be read ("" when it could), and ``data`` is then only
    the beginning.
    """

    line: int
    data: bytes
    fault: str


@dataclass
class Chunk:
    """Consecutive records of one file. ``position`` counts the bytes read of all files so far, as stored on disk."""

    path: str
    is_json: bool
    records: list[Record] = field(default_factory=list)
    position: int = 0


@dataclass(frozen=True)
class CorpusOptions:
    """How files become records; the fields are the flags of tools/preprocess_data.py."""

    input_format: str = "auto"
    text_split: str = "file"
    max_line_bytes: int = 64 << 20


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files that the paths and globs of --input name: globs sorted, patterns in the order given.

    Raises ``ValueError`` for a pattern without a match, a directory, and a file that is named twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            raise ValueError(f"--input {pattern} is a directory: give files or a glob such as '{pattern}/*.jsonl'")
        if os.path.exists(pattern):
            matches = [pattern]
        else:
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not matches:
            raise ValueError(f"--input {pattern} names no file: check the path")
        paths += matches
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"--input names {path} twice: list every file once")
        if not os.access(path, os.R_OK):
            raise ValueError(f"--input {path} cannot be read: check its permissions")
    return paths


def is_json_file(path: str, input_format: str = "auto") -> bool:
    """Whether the lines of ``path`` are JSON objects, by --input-format or by the file's name."""
    if input_format != "auto":
        return input_format == "jsonl"
    name = path.lower()
    for suffix in (".gz", ".zst"):
        name = name[: -len(suffix)] if name.endswith(suffix) else name
    return name.endswith(_JSON_SUFFIXES)


def read_chunks(paths: Sequence[str], options: CorpusOptions) -> Iterator[Chunk]:
    """All records of ``paths`` in order, in chunks of about 1 MiB that do not cross files."""
    done = 0
    for path in paths:
        is_json = is_json_file(path, options.input_format)
        chunk, size = Chunk(path, is_json), 0
        with open(path, "rb") as file:
            for record in read_records(file, path, options):
                chunk.records.append(record)
                size += len(record.data)
                if size >= _CHUNK_BYTES or len(chunk.records) >= _CHUNK_RECORDS:
                    chunk.position = done + file.tell()
                    yield chunk
                    chunk, size = Chunk(path, is_json), 0
            done += file.tell()
        chunk.position = done
        if chunk.records:
            yield chunk


def read_records(file: BinaryIO, path: str, options: CorpusOptions) -> Iterator[Record]:
    """Records of one open file; a stream that breaks off ends with a record that carries the fault."""
    line = 0
    try:
        stream = _decompressed(file, path)
        lines = _limited_lines(stream, options.max_line_bytes)
        if is_json_file(path, options.input_format) or options.text_split == "line":
            records: Iterator[Record] = lines
        elif options.text_split == "blank-line":
            records = _paragraphs(lines, options.max_line_bytes)
        else:
            records = _whole_file(stream, options.max_line_bytes)
        for record in records:
            line = record.line
            if line == 1 and record.data.startswith(_BOM):
                record = record._replace(data=record.data[len(_BOM) :])
            yield record
    except (EOFError, zlib.error, OSError, _ZstdError) as error:
        yield Record(line + 1, b"", f"the file is truncated or damaged here ({error})")


def texts_of(record: Record, is_json: bool, keys: Sequence[str]) -> list[str]:
    """The texts of one record: those under ``keys`` of a JSON object, or the one text of a plain record.

    A text may be empty. Raises ``ValueError`` with the reason when the record is not usable: broken UTF-8 or JSON, a
    missing key, a value that is not a string, a NUL character, a lone surrogate.
    """
    if record.fault:
        raise ValueError(record.fault)
    try:
        line = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the record") from None
    if not is_json:
        texts = [line]
    elif not line.strip():
        return [""] * len(keys)
    else:
        texts = _values_of(line, keys)
    for text in texts:
        if "\x00" in text:
            raise ValueError("the text contains a NUL character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text contains a lone surrogate at character {error.start + 1}") from None
    return texts


def excerpt(record: Record) -> str:
    """The beginning of a record, printable whatever its bytes are."""
    return record.data[:_EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")


def _values_of(line: str, keys: Sequence[str]) -> list[str]:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested as deep
        raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, found {type(document).__name__}")
    for key in keys:
        if key not in document:
            raise ValueError(f"the key {key!r} is missing")
        if not isinstance(document[key], str):
            raise ValueError(f"the value of {key!r} is not a string but {type(document[key]).__name__}")
    return [document[key] for key in keys]


# -- lines, paragraphs, files -------------------------------------------------------------------------------------


def _limited_lines(stream: BinaryIO, limit: int) -> Iterator[Record]:
    """Lines without their ending (LF or CRLF); of a line longer than ``limit`` bytes only the beginning is kept."""
    number = 0
    while data := stream.readline(limit + 2):
        number += 1
        ended = data.endswith(b"\n")
        content = _without_ending(data)
        if len(content) <= limit:
            yield Record(number, content, "")
            continue
        while not ended and (rest := stream.readline(_CHUNK_BYTES)):
            ended = rest.endswith(b"\n")
        yield Record(number, content[:_EXCERPT_BYTES], _too_long("line", limit))


def _without_ending(data: bytes) -> bytes:
    if data.endswith(b"\r\n"):
        return data[:-2]
    return data[:-1] if data.endswith(b"\n") else data


def _paragraphs(lines: Iterator[Record], limit: int) -> Iterator[Record]:
    """Runs of lines between blank ones, joined by newlines; the line number is the first line's."""
    parts: list[bytes] = []
    first, size, fault = 0, 0, ""
    for record in lines:
        if record.data.strip() or record.fault:
            if not parts:
                first = record.line
            if size <= limit:
                parts.append(record.data)
                size += len(record.data) + 1
            fault = fault or record.fault or (_too_long("paragraph", limit) if size > limit + 1 else "")
        elif parts:
            yield _paragraph(first, parts, fault)
            parts, size, fault = [], 0, ""
    if parts:
        yield _paragraph(first, parts, fault)


def _paragraph(first: int, parts: list[bytes], fault: str) -> Record:
    data = b"\n".join(parts)
    return Record(first, data[:_EXCERPT_BYTES] if fault else data, fault)


def _whole_file(stream: BinaryIO, limit: int) -> Iterator[Record]:
    data = stream.read(limit + 1)
    if len(data) > limit:
        yield Record(1, data[:_EXCERPT_BYTES], _too_long("file", limit) + "; or cut it by --text-split")
    elif data:
        yield Record(1, data, "")


def _too_long(what: str, limit: int) -> str:
    return f"the {what} is longer than --max-line-mb {limit / (1 << 20):g}"


# -- compression --------------------------------------------------------------------------------------------------


class _ZstdError(Exception):
    pass


class _ZstdReader(io.RawIOBase):
    """Decompresses a stream of zstd frames. The library's own reader takes a truncated file for a complete one."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._library = zstandard
        self._frame: Optional[object] = None
        self._input = b""
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            # Small reads: what one of them decompresses to is held in memory at once.
            self._input = self._input or self._file.read(1 << 14)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("zstd data ends inside a frame")
                return 0
            self._output = self._decompress()
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> bytes:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        frame = self._frame
        try:
            output = frame.decompress(self._input)  # type: ignore[attr-defined]
        except self._library.ZstdError as error:
            raise _ZstdError(str(error)) from None
        self._input = b""
        if frame.eof:  # type: ignore[attr-defined]
            self._input, self._frame = frame.unused_data, None  # type: ignore[attr-defined]
        return output


def _decompressed(file: BinaryIO, path: str) -> BinaryIO:
    name = path.lower()
    if not name.endswith((".gz", ".zst")):
        return file
    if os.fstat(file.fileno()).st_size == 0:
        raise EOFError("an empty file is not compressed data")
    raw = gzip.GzipFile(fileobj=file, mode="rb") if name.endswith(".gz") else _ZstdReader(file)
    return io.BufferedReader(raw, 1 << 18)  # type: ignore[return-value, arg-type]

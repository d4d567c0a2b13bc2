"""Raw corpora as a stream of records, with the file and line of everything that is wrong.

A corpus is a list of files. JSONL files (``.jsonl .ndjson .json``) hold one document per line; any other file is plain
text and holds one document, or one per line, or one per paragraph. Either may be compressed (``compression.py``).
Files are read once, front to back, and never held whole, so memory does not grow with the corpus: the largest thing
kept is one record, whose size is limited. Faults are records too: the caller decides whether one ends the run. A file
that this reader cannot read at all is no fault of a record, and always ends the run.

The reading (``read_chunks``) happens in one process and hands raw bytes on; making text of them (``texts_of``) is
meant for worker processes.
"""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, TextIO

from umv2_megatron.data.compression import Damaged, Unsupported, opened, without_suffix

FORMATS = ("auto", "jsonl", "text")
TEXT_SPLITS = ("file", "line", "blank-line")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
# Records travel to the workers in chunks of about this size, so that passing them on costs little beside tokenising.
_CHUNK_BYTES = 1 << 20
_CHUNK_RECORDS = 1024
_EXCERPT_BYTES = 200
_DAMAGED = "the file is truncated or damaged here"


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

    Raises ``ValueError`` for a pattern without a match, a directory or pipe, and a file that is named twice; and
    ``CorpusError`` for a file whose beginning cannot be read, which whatever is done with bad records would lose whole.
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
    seen: set[str] = set()
    for path in paths:
        if (place := os.path.abspath(path)) in seen:
            raise ValueError(f"--input names {path} twice: list every file once")
        seen.add(place)
        if not os.access(path, os.R_OK):
            raise ValueError(f"--input {path} cannot be read: check its permissions")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"--input {path} is not a regular file: expected a file on a disk, write the data to one")
    for path in paths:
        _check_beginning(path)
    return paths


def _check_beginning(path: str) -> None:
    try:
        with open(path, "rb") as file:
            opened(file, path).read(1)
    except (Damaged, Unsupported) as error:
        raise CorpusError(f"{path}: {error}; or leave the file out of --input") from None
    except OSError as error:
        raise CorpusError(f"{path}: the file cannot be read: {error.strerror}") from error


def is_json_file(path: str, input_format: str = "auto") -> bool:
    """Whether the lines of ``path`` are JSON objects, by --input-format or by the file's name."""
    if input_format != "auto":
        return input_format == "jsonl"
    return without_suffix(path).endswith(_JSON_SUFFIXES)


def read_chunks(paths: Sequence[str], options: CorpusOptions) -> Iterator[Chunk]:
    """All records of ``paths`` in order, in chunks of about 1 MiB that do not cross files.

    Raises ``CorpusError`` for a file that is not supported, and one that the system fails to read.
    """
    done = 0
    for path in paths:
        is_json = is_json_file(path, options.input_format)
        chunk, size = Chunk(path, is_json), 0
        try:
            with open(path, "rb") as file:
                for record in read_records(file, path, options):
                    chunk.records.append(record)
                    size += len(record.data)
                    if size >= _CHUNK_BYTES or len(chunk.records) >= _CHUNK_RECORDS:
                        chunk.position = done + file.tell()
                        yield chunk
                        chunk, size = Chunk(path, is_json), 0
                done += file.tell()
        except OSError as error:
            raise CorpusError(f"{path}: the file cannot be read: {error.strerror}") from error
        chunk.position = done
        if chunk.records:
            yield chunk


def read_records(file: BinaryIO, path: str, options: CorpusOptions) -> Iterator[Record]:
    """Records of one open file; a stream that breaks off ends with a record that carries the fault.

    Raises ``CorpusError`` where the reader, not the data, is the reason, and ``OSError`` where the system fails.
    """
    line = 0
    try:
        stream = opened(file, path)
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
    except Damaged as error:
        yield Record(line + 1, b"", f"{_DAMAGED} ({error})")
    except Unsupported as error:
        raise CorpusError(f"{path}:{line + 1}: {error}") from None


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
        document = _json_of(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("its brackets are nested more deeply than this reader follows (some hundreds)") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, found {type(document).__name__}")
    for key in keys:
        if key not in document:
            raise ValueError(f"the key {key!r} is missing")
        if not isinstance(document[key], str):
            raise ValueError(f"the value of {key!r} is not a string but {type(document[key]).__name__}")
    return [document[key] for key in keys]


def _json_of(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python converts no integer of thousands of digits, and none of them is a text
        return json.loads(line, parse_int=float)


class LeftOut:
    """Tells, where bad records are left out, of files that lose more than single ones: their end, or all they hold."""

    def __init__(self, log: TextIO) -> None:
        self.files = 0
        self._log = log
        self._path = ""
        self._kept = 0
        self._bad = 0
        self._first = ""

    def add(self, path: str, kept: int, bad: Sequence[tuple[int, str]]) -> None:
        """The next records of ``path``: how many give text, and line and reason of the bad ones."""
        if path != self._path:
            self.finish()
            self._path = path
        self._kept += kept
        self._bad += len(bad)
        for line, reason in bad:
            self._first = self._first or f"line {line}: {reason}"
            if reason.startswith(_DAMAGED):
                print(f"error: {path}:{line}: {reason}; the rest of the file is lost", file=self._log, flush=True)

    def finish(self) -> None:
        """The last file has been added."""
        if self._bad and not self._kept:
            what = f"nothing of the file is used: all its {self._bad} records are bad (the first, {self._first})"
            print(f"error: {self._path}: {what}", file=self._log, flush=True)
            self.files += 1
        self._path, self._kept, self._bad, self._first = "", 0, 0, ""


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

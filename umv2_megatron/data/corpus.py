"""Raw corpora: which files belong to one, what a record of a file is, and which text a record holds.

A corpus is a list of files. JSONL files (``.jsonl .ndjson .json``) hold one document per line, Parquet files
(``.parquet``) one per row, files of token ids (``.npy``) one after another; any other file is plain text and holds one
document, or one per line, or one per paragraph. Text and JSONL may be compressed (``compression.py``). ``readers.py``
reads the files; this one makes text of what it read. Faults are records too: the caller decides whether one ends the
run. A file that cannot be read at all is no fault of a record, and always ends the run.
"""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional, TextIO

from umv2_megatron.data.compression import Damaged, Unsupported, opened, without_suffix
from umv2_megatron.data.parquet import ParquetFile

FORMATS = ("auto", "jsonl", "text", "parquet", "tokens")
TOKEN_DTYPES = ("auto", "uint16", "uint32")
TEXT_SPLITS = ("file", "line", "blank-line")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
EXCERPT_BYTES = 200
CHUNK_BYTES = 1 << 20
CHUNK_RECORDS = 1024
DAMAGED = "the file is truncated or damaged here"
DAMAGED_ROWS = "the row group is damaged here"
_LOST = {DAMAGED: "file", DAMAGED_ROWS: "row group"}


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


class Segment(NamedTuple):
    """The bytes ``begin`` to ``end`` (None: the rest) of a file as stored on disk."""

    path: str
    begin: int = 0
    end: Optional[int] = None


@dataclass
class Chunk:
    """Consecutive records of one file. ``position`` counts the bytes read of all files so far, as stored on disk;
    ``left_out`` the rows among them that --filter leaves out."""

    path: str
    is_json: bool
    records: list[Record] = field(default_factory=list)
    position: int = 0
    left_out: int = 0


class TokenIds(NamedTuple):
    """How files of token ids are read: the type of an id, and the vocabulary that they belong to."""

    dtype: str
    vocab_size: int
    eod: int


@dataclass(frozen=True)
class CorpusOptions:
    """How files become records; the fields are the flags of tools/preprocess_data.py.

    ``columns``: what is read of a Parquet file (--json-keys); ``row_filter``: of which of its rows (--filter);
    ``ids``: how token ids are read.
    """

    input_format: str = "auto"
    text_split: str = "file"
    max_line_bytes: int = 64 << 20
    columns: tuple[str, ...] = ("text",)
    row_filter: Optional[str] = None
    ids: Optional[TokenIds] = None


def expand_inputs(patterns: Sequence[str], input_format: str = "auto") -> list[str]:
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
        _check_beginning(path, input_format)
    return paths


def _check_beginning(path: str, input_format: str) -> None:
    try:
        kind = format_of(path, input_format)
        if kind == "parquet":
            return ParquetFile(path).close()
        if kind == "tokens":
            return open(path, "rb").close()
        with open(path, "rb") as file:
            opened(file, path).read(1)
    except (Damaged, Unsupported) as error:
        raise CorpusError(f"{path}: {error}; or leave the file out of --input") from None
    except OSError as error:
        raise CorpusError(f"{path}: the file cannot be read: {error.strerror}") from error


def format_of(path: str, input_format: str = "auto") -> str:
    """"jsonl", "parquet", "tokens" or "text", by --input-format or by the file's name."""
    if input_format != "auto":
        return input_format
    for suffix, name in ((".parquet", "parquet"), (".npy", "tokens")):
        if path.lower().endswith(suffix):
            return name
    return "jsonl" if without_suffix(path).endswith(_JSON_SUFFIXES) else "text"


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


def too_long(what: str, limit: int) -> str:
    """The fault of a record that is longer than ``limit`` bytes."""
    return f"the {what} is longer than --max-line-mb {limit / (1 << 20):g}"


def excerpt(record: Record) -> str:
    """The beginning of a record, printable whatever its bytes are."""
    return record.data[:EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")


def _values_of(line: str, keys: Sequence[str]) -> list[str]:
    try:
        document = _json_of(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("its brackets are nested more deeply than this reader follows (some hundreds)") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, found {type(document).__name__}")
    return [_string_of(document, key) for key in keys]


def _string_of(document: dict[str, Any], key: str) -> str:
    value = _value_of(document, key)
    if not isinstance(value, str):
        raise ValueError(f"the value of {key!r} is not a string but {type(value).__name__}")
    return value


def _value_of(document: dict[str, Any], key: str) -> Any:
    """The value under ``key``. One that is no key itself is a path: in ``a.b``, the key b of the object under a.

    Of the ways to read a path the one with the longest first key is taken, so that a key with dots in it is found
    wherever it stands.
    """
    within: Any = document
    rest = key
    while rest not in within:
        ends = [end for end, letter in enumerate(rest) if letter == "." and isinstance(within.get(rest[:end]), dict)]
        if not ends:
            there = f": {key[: -len(rest) - 1]!r} holds no {rest!r}" if rest != key else ""
            raise ValueError(f"the key {key!r} is missing{there}")
        within, rest = within[rest[: ends[-1]]], rest[ends[-1] + 1 :]
    return within[rest]


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
            for beginning, lost in _LOST.items():
                if reason.startswith(beginning):
                    print(f"error: {path}:{line}: {reason}; the rest of the {lost} is lost", file=self._log, flush=True)

    def finish(self) -> None:
        """The last file has been added."""
        if self._bad and not self._kept:
            what = f"nothing of the file is used: all its {self._bad} records are bad (the first, {self._first})"
            print(f"error: {self._path}: {what}", file=self._log, flush=True)
            self.files += 1
        self._path, self._kept, self._bad, self._first = "", 0, 0, ""

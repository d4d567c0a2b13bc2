"""Compressed corpora: which compression a file has, and its content as a stream.

gzip, bzip2, xz (and .lzma), zstd and lz4 are told by their first bytes, whatever the file's name. Three things are kept
apart, because they ask different things of a user:

- ``Damaged``: the data themselves are wrong, or end too early;
- ``Unsupported``: the file may be sound, but this reader cannot read it (another compression, an archive, a dictionary
  that is not here, a window beyond the limit);
- ``OSError``: the disk or the network failed.

The decompressors are used frame by frame rather than through the libraries' file classes: those take a file that ends
inside a zstd frame for a whole one, and pass silently over what follows a bzip2 or xz stream.
"""

from __future__ import annotations

import io
import re
import zlib
from typing import Any, BinaryIO

INSTALL = "pip install -r requirements-inputs.txt, or umv2_megatron[inputs]"
LARGEST_WINDOW = 1 << 31
"""Bytes of the largest zstd window that is read, that of ``zstd --ultra --long=31``; the library's limit."""

_SUFFIXES = {
    "gzip": (".gz", ".gzip", ".bgz"),
    "bzip2": (".bz2", ".bzip2"),
    "xz": (".xz", ".lzma"),
    "zstd": (".zst", ".zstd"),
    "lz4": (".lz4",),
}
# zstd frames may follow a frame that is to be skipped (pzstd begins with one); lz4 frames may, too.
_SKIPPED = rb"[\x50-\x5f]\x2a\x4d\x18"
_BEGINNINGS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|" + _SKIPPED),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
# Beginnings that no text has, and what they are; the tar mark stands 257 bytes after the beginning.
_OTHERS = (
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive", "unpack it first"),
    (re.compile(rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07"), "a zip, 7z or rar archive", "unpack it first"),
    (re.compile(rb"\x02\x21\x4c\x18"), "compressed by lz4 in its old format (lz4 -l)", "recompress it without -l"),
    (re.compile(rb"\xff\x06\x00\x00sNaPpY"), "compressed by snappy", "recompress it"),
    (re.compile(rb"LZIP[\x00\x01]|\x89LZO\x00|\x1f[\x9d\xa0]"), "compressed by lzip, lzop or compress",
     "recompress it"),
    (re.compile(rb"PAR1[\x00-\x1f]"), "a Parquet file", "name it .parquet, or give --input-format parquet"),
    (re.compile(rb"ARROW1\x00|Obj\x01|\x89HDF\r\n"), "an Arrow, Avro or HDF5 file", "convert it to JSONL or Parquet"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "text in UTF-16 or UTF-32", "convert it to UTF-8 with iconv"),
)  # fmt: skip
_INPUT_BYTES = 1 << 14
_OUTPUT_BYTES = 1 << 18
_LONGEST_HEADER = 18


class Damaged(Exception):
    """Compressed data that are wrong or end too early; the message says how."""


class Unsupported(Exception):
    """A file that may be sound but cannot be read here; the message says why, and what to do."""


def without_suffix(path: str) -> str:
    """``path`` in lower case without the suffix of a compression."""
    name = path.lower()
    for suffix in (suffix for each in _SUFFIXES.values() for suffix in each):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def opened(file: BinaryIO, path: str, stride: int = 0) -> BinaryIO:
    """The content of ``file``, open at its start, decompressed where it is compressed.

    A compressed file marks its content at every ``stride`` bytes of the file (0: nowhere): see ``Decompressed``.
    Raises ``Damaged`` or ``Unsupported``; reading the result may do so, too.
    """
    start = file.read(512)
    file.seek(0)
    kind = _kind(start, path)
    content: BinaryIO = file
    if kind:
        raw = Decompressed(file, kind, stride)
        content = io.BufferedReader(raw, _OUTPUT_BYTES)  # type: ignore[assignment, arg-type]
        start = content.peek(512)[:512]  # type: ignore[attr-defined]
    for beginning, what, advice in _OTHERS:
        if beginning.match(start):
            where = "the content of the file" if kind else "the file"
            raise Unsupported(f"{where} is {what}, which is not supported as it is: {advice}")
    return content


def _kind(start: bytes, path: str) -> str:
    """The compression of a file that begins with ``start``; "" for none."""
    name = path.lower()
    if name.endswith(_SUFFIXES["lz4"]) and re.match(_SKIPPED, start):
        return "lz4"
    for kind, beginning in _BEGINNINGS.items():
        if beginning.match(start):
            return kind
    if name.endswith(".lzma") and start[:1] == b"\x5d":
        return "xz"  # the old format has no mark; the decompressor knows both
    if name.endswith(".br"):
        raise Unsupported("the name says brotli, which is not supported: recompress the file")
    for kind, suffixes in _SUFFIXES.items():
        if name.endswith(suffixes) and not any(beginning.match(start) for beginning, _, _ in _OTHERS):
            found = f"does not begin as {kind} data" if start else "is empty, which compressed data never is"
            raise Damaged(f"the name says {kind}, but the file {found}")
    return ""


class Decompressed(io.RawIOBase):
    """The content of a file of one or more frames (gzip members, bzip2 and xz streams) of one compression.

    Attributes: ``produced`` (bytes of content decompressed so far), ``marks`` (for each multiple p of ``stride`` below
    the file's size that has been reached, the bytes of content produced before the file was read up to p). Who reads
    the file in parts cuts the content there: the marks are the same whoever reads, and known once they are passed.
    """

    def __init__(self, file: BinaryIO, kind: str, stride: int = 0) -> None:
        try:
            self._start, self._errors = _library(kind)
        except ImportError as error:
            module = str(error.name).partition(".")[0]
            advice = f": {INSTALL}" if kind == "lz4" else ""
            raise Unsupported(f"reading {kind} needs the module {module}, which is not installed{advice}") from error
        self._file = file
        self._kind = kind
        # bzip2 and xz expand without bound, so their output is asked for in pieces; the others cannot give pieces.
        self._limit = (_OUTPUT_BYTES,) if kind in ("bzip2", "xz") else ()
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")
        self.produced = 0
        self.marks: dict[int, int] = {}
        self._stride = stride

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if self._frame is None and not self._next_frame():
                return 0
            self._output = memoryview(self._step())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _next_frame(self) -> bool:
        """Start the next frame; False where the file has no more."""
        while len(self._input) < _LONGEST_HEADER and (more := self._read()):
            self._input += more
            if self._kind in ("gzip", "xz"):  # which allow zeros after a frame
                self._input = self._input.lstrip(b"\x00")
        if not self._input:
            return False
        try:
            self._frame = self._start(self._input)
        except self._errors as error:
            raise self._fault(error) from None
        return True

    def _read(self) -> bytes:
        data = self._file.read(_INPUT_BYTES)
        if self._stride:
            position = self._file.tell()
            reached = (position - len(data)) // self._stride * self._stride + self._stride
            for mark in range(reached, position + 1, self._stride):
                self.marks[mark] = self.produced
        return data

    def _step(self) -> bytes:
        frame = self._frame
        if not self._input and getattr(frame, "needs_input", True):
            # Small reads: what one of them decompresses to may be held in memory at once.
            self._input = self._read()
            if not self._input:
                raise Damaged(f"{self._kind} data ends inside a frame")
        try:
            output = frame.decompress(self._input, *self._limit)
        except self._errors as error:
            raise self._fault(error) from None
        self.produced += len(output)
        self._input = b""
        if frame.eof:
            self._input, self._frame = frame.unused_data or b"", None
            if self._kind in ("gzip", "xz"):
                self._input = self._input.lstrip(b"\x00")
        return output

    def _fault(self, error: Exception) -> Exception:
        """What an error of the libraries means; the words are theirs."""
        words = str(error)
        if "Allocation error" in words:
            return Unsupported(f"decompressing it needs more memory than there is ({words})")
        if "requires too much memory" in words:
            limit = f"{LARGEST_WINDOW >> 20} MiB, the largest supported"
            return Unsupported(f"its zstd window is larger than {limit}: recompress it with --long=31 or less")
        if "nsupported" in words:
            return Unsupported(f"it is compressed in a way that the library here cannot read ({words})")
        return Damaged(words)


def _library(kind: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """A function that starts a frame, given the first bytes of it, and the errors of the library."""
    if kind == "gzip":
        return lambda start: zlib.decompressobj(16 + zlib.MAX_WBITS), (zlib.error,)
    if kind == "bzip2":
        import bz2

        return lambda start: bz2.BZ2Decompressor(), (OSError, ValueError)
    if kind == "xz":
        import lzma

        return lambda start: lzma.LZMADecompressor(), (lzma.LZMAError,)
    if kind == "lz4":
        import lz4.frame

        def start_lz4(start: bytes) -> Any:
            if _BEGINNINGS["lz4"].match(start) and start[4:5] and start[4] & 1:
                raise Unsupported("it was compressed with an lz4 dictionary: recompress it without one")
            return lz4.frame.LZ4FrameDecompressor()

        return start_lz4, (RuntimeError,)
    import zstandard

    def start_zstd(start: bytes) -> Any:
        header = zstandard.get_frame_parameters(start[:_LONGEST_HEADER])
        if header.dict_id:
            raise Unsupported(f"it was compressed with the zstd dictionary {header.dict_id}: recompress it without one")
        # The library's own limit is 128 MiB, which `zstd --long=28` exceeds.
        return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()

    return start_zstd, (zstandard.ZstdError,)


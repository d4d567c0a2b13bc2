"""Token files on disk: writing, reading and checking mcore's IndexedDataset format, without loading mcore.

A corpus ``p`` is three files. ``p.bin`` holds the token ids of all documents one after another. ``p.idx`` says where
each document lies: 9 bytes ``MMIDIDX\\0\\0``, version (u64, 1), type code (u8), sequences S (u64), documents + 1 = D
(u64), then lengths in tokens (i32 x S), byte offsets (i64 x S), and the sequence with which each document starts
(i64 x D; here every document is one sequence). ``p.meta.json`` is ours: which tokenizer made the corpus, and totals.

mcore's IndexedDatasetBuilder writes the same bytes (a test compares them) but keeps every length and offset in Python
lists, some 100 bytes a document; here lengths are spooled to disk, so memory does not grow with the corpus.

Publication is atomic: everything is written under temporary names in the same directory, flushed to disk, and renamed,
the ``.idx`` last. A corpus without ``.idx`` is not complete; one with ``.idx`` is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

import numpy as np

from umv2_megatron.config.data_config import read_sidecar
from umv2_megatron.durable_files import fsync_path

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_BLOCK = 1 << 20  # entries handled at once while an index is written or checked
_TEMPORARY = ".incomplete"
META_VERSION = 1


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Type in which ids below ``vocab_size`` are stored; the rule of mcore's ``DType.optimal_dtype``."""
    return np.uint16 if vocab_size < 65500 else np.int32


class Index(NamedTuple):
    """What a ``.idx`` file says; the arrays are memory maps.

    dtype: type of the token ids; lengths: tokens of each sequence, [S] int32; offsets: first byte of each sequence in
    the ``.bin`` file, [S] int64; documents: first sequence of each document and S at the end, [D] int64.
    """

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


# -- writing ------------------------------------------------------------------------------------------------------


class IndexWriter:
    """Writes one corpus and publishes it, or leaves nothing.

    Creating it takes a lock on the temporary file, so a second writer of the same prefix is refused with
    ``ValueError``. Leftovers of a writer that was killed are overwritten.
    """

    def __init__(self, prefix: str, dtype: type[np.integer]) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.tokens = 0
        self._digest = hashlib.sha256()
        self._bin = _open_locked(prefix + ".bin" + _TEMPORARY, prefix)
        self._lengths = open(prefix + ".lengths" + _TEMPORARY, "w+b")  # noqa: SIM115  close() closes it

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Append documents: their token ids as bytes of ``dtype``, and the tokens of each, [n] int32."""
        assert lengths.dtype == np.int32 and len(tokens) == int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        self._bin.write(tokens)
        self._digest.update(tokens)
        self._lengths.write(lengths.tobytes())
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def add_piece(self, tokens: Path, lengths: Path) -> None:
        """Append the documents of two files: token ids of ``dtype``, and the tokens of each document, int32."""
        before = self.tokens
        with open(lengths, "rb") as file:
            while data := file.read(4 * _BLOCK):
                self._lengths.write(data)
                self.documents += len(data) // 4
                self.tokens += int(np.frombuffer(data, dtype=np.int32).sum(dtype=np.int64))
        size = 0
        with open(tokens, "rb") as file:
            while data := file.read(4 * _BLOCK):
                self._bin.write(data)
                self._digest.update(data)
                size += len(data)
        assert size == (self.tokens - before) * self.dtype.itemsize

    def publish(self, meta: dict[str, Any]) -> None:
        """Make the corpus visible; ``meta`` is extended by the totals and saved beside it."""
        index_path = self.prefix + ".idx" + _TEMPORARY
        with open(index_path, "wb") as file:
            index_digest = self._write_index(file)
            _flush(file)
        _flush(self._bin)
        meta = {
            "version": META_VERSION,
            **meta,
            "dtype": self.dtype.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "bin_bytes": self.tokens * self.dtype.itemsize,
            "bin_sha256": self._digest.hexdigest(),
            "idx_sha256": index_digest,
        }
        meta_path = self.prefix + ".meta.json" + _TEMPORARY
        with open(meta_path, "w", encoding="utf-8") as text:
            json.dump(meta, text, indent=2)
            text.write("\n")
            _flush(text)
        directory = Path(self.prefix).parent
        # The old index goes first: it must never be seen beside the new tokens.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        fsync_path(directory)
        os.replace(self.prefix + ".bin" + _TEMPORARY, self.prefix + ".bin")
        os.replace(meta_path, self.prefix + ".meta.json")
        fsync_path(directory)
        os.replace(index_path, self.prefix + ".idx")
        fsync_path(directory)
        self.close()

    def close(self) -> None:
        """Remove whatever was not published."""
        self._lengths.close()
        for part in (".lengths", ".idx", ".meta.json", ".bin"):  # .bin last: it carries the lock
            Path(self.prefix + part + _TEMPORARY).unlink(missing_ok=True)
        self._bin.close()

    def _write_index(self, file: BinaryIO) -> str:
        digest = hashlib.sha256()

        def write(data: bytes) -> None:
            file.write(data)
            digest.update(data)

        code = next(code for code, dtype in _DTYPES.items() if dtype == self.dtype)
        write(_HEADER.pack(_MAGIC, 1, code, self.documents, self.documents + 1))
        for lengths in self._spooled():
            write(lengths.tobytes())
        offset = 0
        for lengths in self._spooled():
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
            offset = int(ends[-1])
        for first in range(0, self.documents + 1, _BLOCK):
            write(np.arange(first, min(first + _BLOCK, self.documents + 1), dtype=np.int64).tobytes())
        return digest.hexdigest()

    def _spooled(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while data := self._lengths.read(4 * _BLOCK):
            yield np.frombuffer(data, dtype=np.int32)


def _open_locked(path: str, prefix: str) -> BinaryIO:
    try:
        file = open(path, "ab")  # noqa: SIM115  IndexWriter.close closes it
    except OSError as error:
        raise ValueError(f"--output-prefix {prefix} cannot be written ({error.strerror}): choose another") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"--output-prefix {prefix} is being written by another process: choose another") from None
    file.truncate(0)
    return file


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


# -- reading and checking -----------------------------------------------------------------------------------------


def read_index(prefix: str) -> Index:
    """Open ``prefix.idx``. Raises ``ValueError`` naming the file when it is missing or not a complete index."""
    path = Path(prefix + ".idx")
    for needed in (path, Path(prefix + ".bin")):
        if not needed.is_file():
            raise ValueError(f"{needed} does not exist: give the path of a preprocessed corpus without extension")
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{path} is not an index (it does not start with MMIDIDX): preprocess the corpus again")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES or not np.issubdtype(_DTYPES[code], np.integer):
        raise ValueError(f"{path} has version {version} and type code {code}: expected version 1 and integers")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if size != expected:
        raise ValueError(f"{path} has {size} bytes where its header asks for {expected}: preprocess the corpus again")
    if sequences == 0:
        raise ValueError(f"{path} holds no documents: preprocess a corpus that has some")
    data = np.memmap(path, mode="r")
    begin, middle, end = _HEADER.size, _HEADER.size + 4 * sequences, _HEADER.size + 12 * sequences
    return Index(
        np.dtype(_DTYPES[code]),
        data[begin:middle].view(np.int32),
        data[middle:end].view(np.int64),
        data[end:].view(np.int64),
    )


def read_tokens(prefix: str, index: Optional[Index] = None) -> np.ndarray:
    """All token ids of a corpus, a memory map of shape [tokens]."""
    index = index or read_index(prefix)
    return np.memmap(prefix + ".bin", dtype=index.dtype, mode="r")


def read_meta(prefix: str) -> Optional[dict[str, Any]]:
    """The sidecar of a corpus, or None when it has none (a corpus made by Megatron-LM) or one of other tokens.

    Raises ``ValueError`` naming the file when it is about these tokens, but its entries are not what was written.
    """
    meta = read_sidecar(prefix)
    size = os.path.getsize(prefix + ".bin") if os.path.exists(prefix + ".bin") else -1
    if meta is None or meta.get("bin_bytes") != size:
        return None
    for key, kind, missing in (("tokenizer", dict, {}), ("max_token_id", int, 0)):
        if not isinstance(meta.get(key, missing), kind):
            raise ValueError(
                f"{prefix}.meta.json has {key} {meta[key]!r}: it is damaged; preprocess the corpus again, or delete it"
            )
    return meta


def check_corpus(prefix: str, vocab_size: int, tokenizer_sha256: Optional[str] = None) -> Index:
    """Make sure that training can read a corpus, before it starts.

    Every offset is checked against the size of ``.bin``. Token ids are checked against ``vocab_size`` by the sidecar's
    largest id, or by a sample of blocks when there is no sidecar. A sidecar that names another tokenizer is refused.
    Raises ``ValueError`` with one sentence that names the file.
    """
    index = read_index(prefix)
    check_offsets(prefix, index)
    meta = read_meta(prefix)
    if meta is not None and tokenizer_sha256 is not None:
        made_by = meta.get("tokenizer", {})
        if made_by.get("sha256") != tokenizer_sha256:
            made_by = f"{made_by.get('type')} {str(made_by.get('sha256'))[:12]}"
            raise ValueError(
                f"{prefix} was made by another tokenizer ({made_by}, the run's is {tokenizer_sha256[:12]}): pass that "
                "--tokenizer-model or preprocess the corpus again"
            )
    # The sample is taken even with a sidecar: it costs milliseconds, and sees a .bin that was damaged later.
    largest = max(_sampled_maximum(read_tokens(prefix, index)), (meta or {}).get("max_token_id", 0))
    if largest >= vocab_size:
        raise ValueError(
            f"{prefix}.bin holds the token id {largest} but the vocabulary has {vocab_size} ids: use the tokenizer "
            "that made the corpus"
        )
    return index


def ends_with(prefix: str, index: Index, token: int, sample: int = 256) -> bool:
    """Whether any of ``sample`` documents, spread over the corpus, ends with ``token``."""
    tokens = read_tokens(prefix, index)
    chosen = np.unique(np.linspace(0, len(index.lengths) - 1, sample).astype(np.int64))
    chosen = chosen[index.lengths[chosen] > 0]
    ends = index.offsets[chosen] // index.dtype.itemsize + index.lengths[chosen] - 1
    return bool((tokens[ends] == token).any())


def check_offsets(prefix: str, index: Index) -> None:
    """Raise ``ValueError`` naming the file where an index does not describe the ``.bin`` file beside it."""
    size = os.path.getsize(prefix + ".bin")
    end = 0
    for first in range(0, len(index.lengths), _BLOCK):
        lengths = index.lengths[first : first + _BLOCK].astype(np.int64)
        offsets = index.offsets[first : first + _BLOCK]
        ends = offsets + lengths * index.dtype.itemsize
        if (lengths < 0).any() or (offsets < 0).any() or (ends > size).any():
            at = first + int(np.argmax((lengths < 0) | (offsets < 0) | (ends > size)))
            raise ValueError(
                f"{prefix}.idx places document {at} outside of {prefix}.bin ({size} bytes): preprocess the corpus again"
            )
        end = max(end, int(ends.max()))
    if end != size:
        raise ValueError(
            f"{prefix}.bin has {size} bytes where {prefix}.idx describes {end}: preprocess the corpus again"
        )
    documents = index.documents
    if not len(documents) or documents[0] != 0 or documents[-1] != len(index.lengths):
        raise ValueError(f"{prefix}.idx does not cover its sequences with documents: preprocess the corpus again")


def _sampled_maximum(tokens: np.ndarray, blocks: int = 64, block: int = 1 << 14) -> int:
    """Largest (or a negative) id in evenly spaced blocks that include both ends."""
    if len(tokens) <= blocks * block:
        sample = [tokens]
    else:
        starts = np.linspace(0, len(tokens) - block, blocks).astype(np.int64)
        sample = [tokens[start : start + block] for start in starts]
    if min(int(part.min()) for part in sample) < 0:
        return 1 << 31  # a negative id is outside of any vocabulary
    return max(int(part.max()) for part in sample)


def fingerprint(prefix: str) -> str:
    """A hash that changes when a corpus does: sizes, both ends of both files, and the sidecar's hash of all tokens."""
    digest = hashlib.sha256()
    for path in (prefix + ".idx", prefix + ".bin"):
        size = os.path.getsize(path)
        digest.update(struct.pack("<Q", size))
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    meta = read_meta(prefix)
    digest.update(str((meta or {}).get("bin_sha256")).encode())
    return digest.hexdigest()

"""Text to token ids: what one worker does with a part of the corpus."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

import numpy as np

from umv2_megatron.data.corpus import Chunk, CorpusError, CorpusOptions, excerpt, texts_of, too_long
from umv2_megatron.data.indexing import token_dtype
from umv2_megatron.data.parts import Part, PartsDirectory, PartWriter
from umv2_megatron.data.readers import Reader, reader_of
from umv2_megatron.data.tiktoken_files import NO_SETTINGS, TikTokenSettings
from umv2_megatron.data.token_records import TokenChunk, excerpt_of, ids_by_size
from umv2_megatron.data.tokenizers import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Job:
    """What one run of tools/preprocess_data.py does; the fields are its flags."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: Optional[str] = None
    vocab_size: Optional[int] = None
    tiktoken: TikTokenSettings = NO_SETTINGS
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    on_bad_line: str = "fail"
    log_interval: int = 1000
    corpus: CorpusOptions = CorpusOptions()
    token_dtype: str = "auto"
    part_bytes: Optional[int] = None
    rank_timeout: float = 300.0

    def read_options(self) -> CorpusOptions:
        """How files are read: ``corpus`` with the columns that hold the texts, and what token ids are."""
        tokenizer = self.tokenizer()
        ids = ids_by_size(self.token_dtype, tokenizer.vocab_size, tokenizer.eod)
        return replace(self.corpus, columns=self.json_keys, ids=ids)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this job; loaded once per process."""
        return _load_tokenizer(self.tokenizer_type, self.tokenizer_model, self.vocab_size, self.tiktoken)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(
    tokenizer_type: str, tokenizer_model: Optional[str], vocab_size: Optional[int], tiktoken: TikTokenSettings
) -> Tokenizer:
    return build_tokenizer(tokenizer_type, tokenizer_model, vocab_size, tiktoken)


class Work(NamedTuple):
    """What came to be done since the last report: documents, bytes of text, and bytes of input as stored."""

    documents: int
    text_bytes: int
    position: int


class Encoder:
    """Makes parts. ``stride``: bytes of a range of a file."""

    def __init__(self, job: Job, directory: PartsDirectory, stride: int, sizes: dict[str, int]) -> None:
        self._job = job
        self._directory = directory
        self._stride = stride
        self._sizes = sizes
        self._reader: Optional[Reader] = None

    def make(self, part: Part) -> Iterator[Work]:
        """Tokenize a part and publish it in the directory; yields what was done since the last time.

        Raises ``CorpusError`` (file:line) for a bad record when ``on_bad_line`` is "fail"; nothing is published then.
        """
        reached = 0  # bytes of the part in the segments before
        try:
            with PartWriter(self._directory, part) as writer:
                for number, segment in enumerate(part.segments):
                    reader = self._reader_of(segment.path)
                    kept = bad = before = 0
                    for chunk in reader.chunks(segment):
                        encoded = encode_chunk(self._job, chunk)
                        if encoded.bad and self._job.on_bad_line == "fail":
                            line, reason, _ = encoded.bad[0]
                            raise CorpusError(f"{segment.path}:{reader.lines_before() + line}: {reason}")
                        for line, reason, beginning in encoded.bad:
                            writer.add_bad(number, line, reason, beginning)
                        for i, texts in enumerate(encoded.keys):
                            writer.add(i, texts.tokens, texts.lengths, texts.text_bytes, texts.largest)
                        kept += sum(len(texts.lengths) for texts in encoded.keys)
                        bad += len(encoded.bad)
                        writer.record.empty += encoded.empty
                        writer.record.left_out += chunk.left_out
                        position = min(chunk.position, part.size - reached)
                        text_bytes = sum(texts.text_bytes for texts in encoded.keys)
                        yield Work(len(encoded.keys[0].lengths), text_bytes, position - before)
                        before = position
                    if reader.size != self._sizes[segment.path]:
                        raise CorpusError(
                            f"{segment.path}: the file had {self._sizes[segment.path]} bytes at the start and has "
                            f"{reader.size} now: leave it as it is while it is read"
                        )
                    writer.record.segments.append((kept, reader.lines_read(), bad))
                    reached += before
                writer.finish()
                yield Work(0, 0, part.size - reached)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _reader_of(self, path: str) -> Reader:
        if self._reader is None or self._reader.path != path:
            self.close()
            self._reader = reader_of(path, self._job.read_options(), self._stride)
        return self._reader


class Texts(NamedTuple):
    """Tokenized documents of one JSON key: ids as bytes, tokens of each document, bytes of UTF-8 text, largest id."""

    tokens: bytes
    lengths: np.ndarray
    text_bytes: int
    largest: int


class Encoded(NamedTuple):
    """One chunk after tokenizing. ``bad`` holds line, reason and excerpt of records that cannot be used."""

    keys: list[Texts]
    empty: int
    bad: list[tuple[int, str, str]]


def encode_chunk(job: Job, chunk: Chunk) -> Encoded:
    """Tokenize the records of one chunk. A record with a fault under any key is left out under all of them."""
    if isinstance(chunk, TokenChunk):
        return _checked(job, chunk)
    tokenizer = job.tokenizer()
    dtype = token_dtype(tokenizer.vocab_size)
    documents: list[list[np.ndarray]] = [[] for _ in job.json_keys]
    text_bytes = [0] * len(job.json_keys)
    bad: list[tuple[int, str, str]] = []
    empty = 0
    for record in chunk.records:
        try:
            texts = texts_of(record, chunk.is_json, job.json_keys)
            ids = [_encode(tokenizer, text, job.append_eod) for text in texts]
        except ValueError as error:
            bad.append((record.line, str(error), excerpt(record)))
            continue
        empty += sum(not document.size for document in ids)
        for i, document in enumerate(ids):
            if document.size:
                documents[i].append(document)
                text_bytes[i] += len(texts[i].encode("utf-8"))
    keys = [_join(parts, dtype, size) for parts, size in zip(documents, text_bytes)]
    return Encoded(keys, empty, bad)


def _checked(job: Job, chunk: TokenChunk) -> Encoded:
    """Documents that are token ids already. What is left out: those that are empty but for their end, and bad ones."""
    tokenizer = job.tokenizer()
    limit = job.corpus.max_line_bytes
    bad = [(record.line, record.fault, record.data.decode()) for record in chunk.records]
    documents: list[np.ndarray] = []
    empty = 0
    if chunk.tokens is not None and chunk.lengths is not None:
        ends = np.cumsum(chunk.lengths)
        starts = ends - chunk.lengths
        largest = np.maximum.reduceat(chunk.tokens, starts)
        smallest = np.minimum.reduceat(chunk.tokens, starts)
        wrong = (largest >= tokenizer.vocab_size) | (smallest < 0)
        wrong |= chunk.lengths * chunk.tokens.itemsize > limit
        empty = int((chunk.lengths == 1).sum())
        for i in np.flatnonzero(wrong):
            ids = chunk.tokens[starts[i] : ends[i]]
            bad.append((chunk.first + int(i), _fault_of(ids, tokenizer, limit), excerpt_of(ids).decode()))
        kept = ~wrong & (chunk.lengths > 1)
        lengths = chunk.lengths[kept]
        documents.append(chunk.tokens if kept.all() else chunk.tokens[np.repeat(kept, chunk.lengths)])
    else:
        lengths = np.empty(0, np.int64)
    if chunk.rest is not None:
        line = chunk.first + (0 if chunk.lengths is None else len(chunk.lengths))
        fault = _fault_of(chunk.rest, tokenizer, limit)
        if not fault and not job.append_eod:
            fault = f"the last document does not end with the end-of-document token {tokenizer.eod}: is the file whole?"
        if fault:
            bad.append((line, fault, excerpt_of(chunk.rest).decode()))
        else:
            documents += [chunk.rest, np.array([tokenizer.eod])]
            lengths = np.append(lengths, len(chunk.rest) + 1)
    if not len(lengths):
        texts = Texts(b"", np.empty(0, np.int32), 0, 0)
    else:
        tokens = documents[0] if len(documents) == 1 else np.concatenate(documents)
        tokens = tokens.astype(token_dtype(tokenizer.vocab_size))
        texts = Texts(tokens.tobytes(), lengths.astype(np.int32), 0, int(tokens.max()))
    return Encoded([texts], empty, sorted(bad))


def _fault_of(ids: np.ndarray, tokenizer: Tokenizer, limit: int) -> str:
    if ids.nbytes > limit:
        return too_long("document", limit)
    for extreme in (int(ids.max()), int(ids.min())):
        if not 0 <= extreme < tokenizer.vocab_size:
            return f"the token id {extreme} is outside of the vocabulary of {tokenizer.vocab_size} ids"
    return ""


def _encode(tokenizer: Tokenizer, text: str, append_eod: bool) -> np.ndarray:
    """Ids of one document; none at all for an empty text. Raises ``ValueError`` for ids outside of the vocabulary."""
    try:
        ids = np.array(tokenizer.tokenize(text), dtype=np.int64)
    except OverflowError:
        raise ValueError(f"a token id does not fit into 64 bits (the vocabulary has {tokenizer.vocab_size})") from None
    if not ids.size:
        return ids
    for extreme in (int(ids.max()), int(ids.min())):
        if not 0 <= extreme < tokenizer.vocab_size:
            raise ValueError(f"the token id {extreme} is outside of the vocabulary of {tokenizer.vocab_size} ids")
    return np.append(ids, tokenizer.eod) if append_eod else ids


def _join(documents: list[np.ndarray], dtype: type[np.integer], text_bytes: int) -> Texts:
    lengths = np.array([document.size for document in documents], dtype=np.int32)
    if not documents:
        return Texts(b"", lengths, 0, 0)
    tokens = np.concatenate(documents)
    return Texts(tokens.astype(dtype).tobytes(), lengths, text_bytes, int(tokens.max()))

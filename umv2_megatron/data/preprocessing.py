"""Raw corpus in, token files out: one reader, several tokenizing processes, one writer.

The reading process cuts the corpus into chunks of about 1 MiB, workers turn chunks into token ids, and the results are
written in the order of the chunks, so the files do not depend on the number of workers. At most a few chunks per worker
are under way at any time: the reader waits for the writer, and memory stays the same whatever the size of the corpus.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Optional, TextIO

import numpy as np

from umv2_megatron.data.corpus import (
    Chunk,
    CorpusError,
    CorpusOptions,
    LeftOut,
    excerpt,
    expand_inputs,
    is_json_file,
    read_chunks,
    texts_of,
)
from umv2_megatron.data.indexing import IndexWriter, token_dtype
from umv2_megatron.data.tokenizers import Tokenizer, build_tokenizer

_CHUNKS_PER_WORKER = 3


@dataclass(frozen=True)
class Job:
    """What one run of tools/preprocess_data.py does; the fields are its flags."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: Optional[str] = None
    vocab_size: Optional[int] = None
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    on_bad_line: str = "fail"
    log_interval: int = 1000
    corpus: CorpusOptions = CorpusOptions()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this job; loaded once per process."""
        return _load_tokenizer(self.tokenizer_type, self.tokenizer_model, self.vocab_size)


@dataclass
class Texts:
    """Tokenized documents of one JSON key: ids as bytes, tokens of each document, bytes of UTF-8 text, largest id."""

    tokens: bytes
    lengths: np.ndarray
    text_bytes: int
    largest: int


@dataclass
class Encoded:
    """One chunk after tokenizing. ``bad`` holds line, reason and excerpt of records that cannot be used."""

    path: str
    position: int
    keys: list[Texts]
    empty: int
    bad: list[tuple[int, str, str]]


@dataclass
class Summary:
    """What a run did."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    bad: int = 0
    files_left_out: int = 0
    seconds: float = 0.0
    prefixes: list[str] = field(default_factory=list)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(tokenizer_type: str, tokenizer_model: Optional[str], vocab_size: Optional[int]) -> Tokenizer:
    return build_tokenizer(tokenizer_type, tokenizer_model, vocab_size)


# -- in the workers -----------------------------------------------------------------------------------------------


def encode_chunk(job: Job, chunk: Chunk) -> Encoded:
    """Tokenize the records of one chunk. A record with a fault under any key is left out under all of them."""
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
    return Encoded(chunk.path, chunk.position, keys, empty, bad)


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


def _start_worker(parent: int) -> None:
    """Leave signals to the parent, and end with it: a killed parent cannot tell its workers to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# -- in the parent ------------------------------------------------------------------------------------------------


def preprocess(job: Job, log: TextIO = sys.stderr) -> Summary:
    """Tokenize the corpus of ``job`` and publish ``<output-prefix>_<key>_document`` for every JSON key.

    Raises ``ValueError`` for wrong options and ``CorpusError`` (file:line) for the first bad record when
    ``on_bad_line`` is "fail"; nothing is published then.
    """
    started = time.monotonic()
    tokenizer = job.tokenizer()
    paths = expand_inputs(job.inputs)
    _refuse_impossible(job, paths)
    progress = Progress(sum(os.path.getsize(path) for path in paths), job.log_interval, log)
    pool = _start_pool(job)  # before the writers open their files, so that no worker holds their locks
    writers: list[IndexWriter] = []
    quarantine: Optional[Quarantine] = None
    summary = Summary()
    left_out = LeftOut(log)
    try:
        for key in job.json_keys:
            writers.append(IndexWriter(f"{job.output_prefix}_{key}_document", token_dtype(tokenizer.vocab_size)))
        if job.on_bad_line == "quarantine":
            quarantine = Quarantine(job.output_prefix + "_quarantine.jsonl")
        text_bytes, largest = [0] * len(writers), [0] * len(writers)
        for encoded in _encode_in_order(job, pool, read_chunks(paths, job.corpus)):
            _deal_with_bad(encoded, quarantine)
            kept = sum(len(texts.lengths) for texts in encoded.keys)
            left_out.add(encoded.path, kept, [(line, reason) for line, reason, _ in encoded.bad])
            for i, texts in enumerate(encoded.keys):
                writers[i].add(texts.tokens, texts.lengths)
                text_bytes[i] += texts.text_bytes
                largest[i] = max(largest[i], texts.largest)
            summary.empty += encoded.empty
            summary.bad += len(encoded.bad)
            progress.update(writers[0].documents, sum(text_bytes), encoded.position)
        left_out.finish()
        summary.files_left_out = left_out.files
        for writer, key in zip(writers, job.json_keys):
            if not writer.documents:
                raise CorpusError(f"{paths[0]}: no usable document with the key {key!r} in {len(paths)} file(s)")
        for i, writer in enumerate(writers):
            writer.publish(_meta(job, tokenizer, job.json_keys[i], text_bytes[i], largest[i]))
            summary.prefixes.append(writer.prefix)
        if quarantine is not None:
            quarantine.publish()
    except BrokenProcessPool:
        raise CorpusError("a worker process died (out of memory?): use fewer --workers or less --max-line-mb") from None
    except OSError as error:
        raise CorpusError(f"{job.output_prefix}: cannot write the output: {error.strerror}") from error
    finally:
        for writer in writers:
            writer.close()
        if quarantine is not None:
            quarantine.close()
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    summary.documents = sum(writer.documents for writer in writers)
    summary.tokens = sum(writer.tokens for writer in writers)
    summary.text_bytes = sum(text_bytes)
    summary.seconds = time.monotonic() - started
    return summary


def _refuse_impossible(job: Job, paths: list[str]) -> None:
    quarantined = job.output_prefix + "_quarantine.jsonl"
    if any(os.path.abspath(path) == os.path.abspath(quarantined) for path in paths):
        raise ValueError(f"--input names {quarantined}, the bad lines of an earlier run: narrow the glob or remove it")
    if len(set(job.json_keys)) < len(job.json_keys):
        raise ValueError(f"--json-keys {' '.join(job.json_keys)} names a key twice: list every key once")
    for key in job.json_keys:
        if not key or "/" in key or "\x00" in key:
            raise ValueError(f"--json-keys {key!r} cannot be part of a file name: expected a key without '/'")
    if len(job.json_keys) > 1:
        for path in paths:
            if not is_json_file(path, job.corpus.input_format):
                raise ValueError(f"--json-keys has {len(job.json_keys)} keys but {path} is plain text: give one key")


def _meta(job: Job, tokenizer: Tokenizer, key: str, text_bytes: int, largest: int) -> dict:
    return {
        "tokenizer": {
            "type": job.tokenizer_type,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "json_key": key,
        "append_eod": job.append_eod,
        "text_bytes": text_bytes,
        "max_token_id": largest,
    }


def _deal_with_bad(encoded: Encoded, quarantine: Optional[Quarantine]) -> None:
    for line, reason, beginning in encoded.bad:
        if quarantine is None:
            raise CorpusError(f"{encoded.path}:{line}: {reason}")
        quarantine.add(encoded.path, line, reason, beginning)


def _start_pool(job: Job) -> Optional[ProcessPoolExecutor]:
    """Worker processes, already running; None when one worker means this process."""
    if job.workers == 1:
        return None
    # Forked workers start in milliseconds; torch, whose threads forking would not survive, is not loaded here.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(job.workers, context, initializer=_start_worker, initargs=(os.getpid(),))
    pool.submit(int).result()
    return pool


def _encode_in_order(job: Job, pool: Optional[ProcessPoolExecutor], chunks: Iterator[Chunk]) -> Iterator[Encoded]:
    if pool is None:
        for chunk in chunks:
            yield encode_chunk(job, chunk)
        return
    under_way: deque[Future[Encoded]] = deque()
    for chunk in chunks:
        under_way.append(pool.submit(encode_chunk, job, chunk))
        if len(under_way) >= _CHUNKS_PER_WORKER * job.workers:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


class Quarantine:
    """Bad records with file, line, reason and their beginning, one JSON object a line; published like the corpus."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path + ".incomplete", "w", encoding="utf-8")  # noqa: SIM115  close() closes it

    def add(self, path: str, line: int, reason: str, beginning: str) -> None:
        json.dump({"file": path, "line": line, "reason": reason, "beginning": beginning}, self._file)
        self._file.write("\n")

    def publish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.path + ".incomplete", self.path)

    def close(self) -> None:
        """Remove what was not published."""
        self._file.close()
        if os.path.exists(self.path + ".incomplete"):
            os.unlink(self.path + ".incomplete")


class Progress:
    """A line on ``log`` every ``interval`` documents, at most two a second: documents/s, MB/s of text, time left."""

    def __init__(self, total_bytes: int, interval: int, log: TextIO) -> None:
        self._total = total_bytes
        self._interval = interval
        self._log = log
        self._started = self._last_time = time.monotonic()
        self._last_documents = 0

    def update(self, documents: int, text_bytes: int, position: int) -> None:
        """``position``: bytes of the input files read so far, as stored on disk."""
        now = time.monotonic()
        if documents - self._last_documents < self._interval or now - self._last_time < 0.5:
            return
        self._last_time, self._last_documents = now, documents
        seconds = now - self._started
        left = seconds / max(position, 1) * (self._total - position)
        print(
            f"documents: {documents} | {documents / seconds:.1f} documents/s | {text_bytes / 1e6 / seconds:.2f} MB/s | "
            f"{100 * position / max(self._total, 1):.1f}% | ETA {left:.0f} s",
            file=self._log,
            flush=True,
        )

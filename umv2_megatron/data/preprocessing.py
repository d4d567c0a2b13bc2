"""Raw corpus in, token files out: the corpus in parts, several processes on one or many hosts, one file at the end.

The corpus is cut into parts (``parts.py``). The parts are divided among the ranks that a launcher started
(``meeting.py``) and among the workers of each rank (``workers.py``). A worker tokenizes its parts into files of their
own, each with a record of completion (``encoding.py``). When all parts are there, rank 0 joins them in the order of the
corpus, so the result does not depend on ranks and workers. A call that follows an interrupted one makes only the parts
that are missing. Processes exchange nothing but files, on a disk that all hosts share.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional, TextIO

from umv2_megatron.data.corpus import CorpusError, LeftOut, expand_inputs, format_of
from umv2_megatron.data.encoding import Encoder, Job
from umv2_megatron.data.indexing import IndexWriter, token_dtype
from umv2_megatron.data.meeting import Meeting
from umv2_megatron.data.parts import PLAN_VERSION, Input, Part, PartsDirectory, cut, default_part_bytes, shares
from umv2_megatron.data.parts import Record as PartRecord
from umv2_megatron.data.readers import check_files
from umv2_megatron.data.tokenizers import Tokenizer
from umv2_megatron.data.workers import Workers
from umv2_megatron.parallel.launch import rank_and_size, start_of_slurm

__all__ = ["Job", "Summary", "preprocess"]
_NAMED_PARTS = 5


@dataclass
class Summary:
    """What a run did. On other ranks than 0 only ``parts`` (made by this rank) and ``seconds``."""

    rank: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    bad: int = 0
    rows_left_out: int = 0
    files_left_out: int = 0
    parts: int = 0
    parts_before: int = 0
    seconds: float = 0.0
    prefixes: list[str] = field(default_factory=list)


class Plan(NamedTuple):
    """The corpus of a job, and how it is cut."""

    inputs: list[Input]
    part_bytes: int
    options: dict[str, Any]

    @property
    def parts(self) -> list[Part]:
        return cut(self.inputs, self.part_bytes)

    def encoder(self, job: Job, directory: PartsDirectory) -> Encoder:
        return Encoder(job, directory, self.part_bytes, {file.path: file.size for file in self.inputs})

    def as_json(self) -> dict[str, Any]:
        inputs = [list(each) for each in self.inputs]
        return {**self.options, "--part-mb": self.part_bytes / (1 << 20), "inputs": inputs}


def preprocess(job: Job, log: TextIO = sys.stderr) -> Summary:
    """Tokenize the corpus of ``job`` and publish ``<output-prefix>_<key>_document`` for every JSON key.

    Every rank of a launcher makes this call. Raises ``ValueError`` for wrong options, and for those of an earlier call
    that it cannot go on with; ``CorpusError`` (file:line) for a bad record when ``on_bad_line`` is "fail", and for
    ranks that fail or do not come. Nothing is published then; finished parts are kept for the next call.
    """
    started = time.monotonic()
    rank, size = rank_and_size()
    job.tokenizer()
    directory = PartsDirectory(job.output_prefix, len(job.json_keys))
    summary = Summary(rank)
    try:
        with Workers(job.workers) as workers:
            meeting = Meeting(directory.path, rank, size, job.rank_timeout, start_of_slurm())
            if rank:
                _take_part(job, directory, workers, meeting, log, summary)
            else:
                _lead(job, directory, workers, meeting, log, summary)
    except OSError as error:
        where = error.filename or job.output_prefix
        raise CorpusError(f"{where}: cannot write the output: {error.strerror}") from error
    summary.seconds = time.monotonic() - started
    return summary


def _lead(
    job: Job, directory: PartsDirectory, workers: Workers, meeting: Meeting, log: TextIO, summary: Summary
) -> None:
    """Rank 0: plans, makes its share, waits for the others, and joins all parts."""
    with _locked(directory, job.output_prefix, meeting.refuse):
        _lead_meeting(job, directory, workers, meeting, log, summary)
        directory.remove()


def _lead_meeting(
    job: Job, directory: PartsDirectory, workers: Workers, meeting: Meeting, log: TextIO, summary: Summary
) -> None:
    with meeting:
        meeting.call()
        plan = _plan(job)
        directory.begin(plan.as_json())
        directory.clear_temporary()
        parts = plan.parts
        missing = [part for part in parts if not _is_made(directory.read(part), job)]
        summary.parts_before = len(parts) - len(missing)
        if summary.parts_before:
            told = f"{directory.path} holds {summary.parts_before} of {len(parts)} parts of an earlier call"
            print(f"{told}: going on with the others", file=log, flush=True)
        work = shares(missing, meeting.size)
        meeting.share([[part.number for part in share] for share in work])

        def unfinished(rank: int) -> str:
            left = [part for part in work[rank] if directory.read(part) is None]
            named = ", ".join(map(str, left[:_NAMED_PARTS])) + (", ..." if len(left) > _NAMED_PARTS else "")
            missing = f"{len(left)} of its {len(work[rank])} parts are missing: {named}"
            return f"; {missing}; the same command goes on with them" if left else ""

        _make(job, workers, plan.encoder(job, directory), work[0], meeting, log, unfinished)
        summary.parts = len(missing)
        meeting.wait(unfinished)
        _join(job, directory, plan, log, summary)


def _take_part(
    job: Job, directory: PartsDirectory, workers: Workers, meeting: Meeting, log: TextIO, summary: Summary
) -> None:
    """Another rank: makes its share."""
    with meeting:
        numbers = meeting.join()
        found = directory.read_plan()
        inputs = [Input(*each) for each in found["inputs"]]
        plan = Plan(inputs, int(found["--part-mb"] * (1 << 20)), _options(job))
        if plan.as_json() != found:
            raise ValueError(f"rank {meeting.rank} was started with other options than rank 0: start all ranks alike")
        directory.use(found)
        parts = plan.parts
        _make(job, workers, plan.encoder(job, directory), [parts[i] for i in numbers], meeting, log)
        summary.parts = len(numbers)


def _make(
    job: Job, workers: Workers, encoder: Encoder, parts: list[Part], meeting: Meeting, log: TextIO, describe: Any = None
) -> None:
    start = f"rank {meeting.rank} | " if meeting.size > 1 else ""
    progress = Progress(sum(part.size for part in parts), job.log_interval, log, start)
    documents = text_bytes = position = 0
    for work in workers.make(parts, encoder):
        if work is not None:
            documents += work.documents
            text_bytes += work.text_bytes
            position += work.position
            progress.update(documents, text_bytes, position)
        meeting.check(describe or (lambda rank: ""))


@contextlib.contextmanager
def _locked(directory: PartsDirectory, output_prefix: str, refuse: Callable[[str], None]) -> Iterator[None]:
    """The directory of parts, for one job at a time; removed at the end unless it holds finished parts.

    Where another job has it, ``refuse`` is told why, and ``ValueError`` raised.
    """
    lock = directory.path / "lock"
    named = f"--output-prefix {output_prefix}"
    while True:
        try:
            directory.path.mkdir(exist_ok=True)
            file = open(lock, "ab")  # noqa: SIM115  closed below
        except OSError as error:
            raise ValueError(f"{named} cannot be written ({error.strerror}): choose another") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            refuse(message := f"{named} is being written by another process: choose another")
            raise ValueError(message) from None
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            break
        file.close()  # of a job that has just ended and removed it
    try:
        yield
    finally:
        if directory.path.is_dir() and not directory.has_records():
            directory.remove()
        file.close()


def _plan(job: Job) -> Plan:
    paths = expand_inputs(job.inputs, job.corpus.input_format)
    _refuse_impossible(job, paths)
    inputs = []
    for path in paths:
        found = os.stat(path)
        divisible = format_of(path, job.corpus.input_format) != "text" or job.corpus.text_split != "file"
        inputs.append(Input(path, found.st_size, found.st_mtime_ns, divisible))
    part_bytes = job.part_bytes or default_part_bytes(sum(file.size for file in inputs))
    return Plan(inputs, part_bytes, _options(job))


def _options(job: Job) -> dict[str, Any]:
    """What decides the content of parts beside the inputs, by the names of flags."""
    tokenizer = job.tokenizer()
    filtered = {} if job.corpus.row_filter is None else {"--filter": job.corpus.row_filter}
    if job.token_dtype != "auto":
        filtered["--token-dtype"] = job.token_dtype
    return {
        "version": PLAN_VERSION,
        "--tokenizer-type": job.tokenizer_type,
        "SHA-256 of the tokenizer": tokenizer.sha256,
        "--vocab-size": tokenizer.vocab_size,
        "end-of-document token": tokenizer.eod,
        "--append-eod": job.append_eod,
        "--json-keys": list(job.json_keys),
        "--input-format": job.corpus.input_format,
        "--text-split": job.corpus.text_split,
        "--max-line-mb": job.corpus.max_line_bytes / (1 << 20),
        **filtered,
    }


def _is_made(record: Optional[PartRecord], job: Job) -> bool:
    """Whether a part needs no work. One with bad records, left out by an earlier call, does where they are to fail."""
    return record is not None and not (record.bad and job.on_bad_line == "fail")


def _refuse_impossible(job: Job, paths: list[str]) -> None:
    quarantined = job.output_prefix + "_quarantine.jsonl"
    if any(os.path.abspath(path) == os.path.abspath(quarantined) for path in paths):
        raise ValueError(f"--input names {quarantined}, the bad lines of an earlier run: narrow the glob or remove it")
    if len(set(job.json_keys)) < len(job.json_keys):
        raise ValueError(f"--json-keys {' '.join(job.json_keys)} names a key twice: list every key once")
    for key in job.json_keys:
        if not key or "/" in key or "\x00" in key:
            raise ValueError(f"--json-keys {key!r} cannot be part of a file name: expected a key without '/'")
    kinds = {format_of(path, job.corpus.input_format): path for path in reversed(paths)}
    for kind, what in (("text", "plain text"), ("tokens", "a file of token ids")):
        if len(job.json_keys) > 1 and kind in kinds:
            raise ValueError(f"--json-keys has {len(job.json_keys)} keys but {kinds[kind]} is {what}: give one key")
    if "tokens" in kinds and len(kinds) > 1:
        other = next(path for kind, path in kinds.items() if kind != "tokens")
        raise ValueError(f"--input names token ids ({kinds['tokens']}) and text ({other}): make a data set of each")
    check_files(paths, job.read_options())


# -- joining the parts ------------------------------------------------------------------------------------------------


def _join(job: Job, directory: PartsDirectory, plan: Plan, log: TextIO, summary: Summary) -> None:
    """Append all parts to the token files and publish these; a part that is damaged is made again first."""
    tokenizer = job.tokenizer()
    encoder = plan.encoder(job, directory)
    left_out = LeftOut(log)
    text_bytes, largest = [0] * len(job.json_keys), [0] * len(job.json_keys)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(contextlib.closing(IndexWriter(f"{job.output_prefix}_{key}_document", dtype)))
            for key, dtype in ((key, token_dtype(tokenizer.vocab_size)) for key in job.json_keys)
        ]
        quarantine: Optional[Quarantine] = None
        if job.on_bad_line == "quarantine":
            quarantine = stack.enter_context(contextlib.closing(Quarantine(job.output_prefix + "_quarantine.jsonl")))
        lines: Counter[str] = Counter()
        for part in plan.parts:
            record = _intact(job, directory, part, encoder, log)
            for i, key in enumerate(record.keys):
                tokens, lengths = (directory.piece(part.number, f"{i}.{end}") for end in ("bin", "lengths"))
                writers[i].add_piece(tokens, lengths)
                text_bytes[i] += key.text_bytes
                largest[i] = max(largest[i], key.largest)
            summary.empty += record.empty
            summary.bad += record.bad
            summary.rows_left_out += record.left_out
            _tell_of_bad(directory, part, record, lines, quarantine, left_out)
        left_out.finish()
        summary.files_left_out = left_out.files
        for writer, name in zip(writers, job.json_keys):
            if not writer.documents:
                directory.remove()
                where = f"{plan.inputs[0].path}: no usable document with the key {name!r}"
                raise CorpusError(f"{where} in {len(plan.inputs)} file(s)")
        for i, writer in enumerate(writers):
            of_ids = format_of(plan.inputs[0].path, job.corpus.input_format) == "tokens"
            writer.publish(_meta(job, tokenizer, job.json_keys[i], None if of_ids else text_bytes[i], largest[i]))
            summary.prefixes.append(writer.prefix)
        if quarantine is not None:
            quarantine.publish()
        summary.documents = sum(writer.documents for writer in writers)
        summary.tokens = sum(writer.tokens for writer in writers)
        summary.text_bytes = sum(text_bytes)


def _intact(job: Job, directory: PartsDirectory, part: Part, encoder: Encoder, log: TextIO) -> PartRecord:
    """The record of a part whose files are as they were written.

    Raises ``CorpusError`` where bad records were left out though they are to fail: a rank of the same call was started
    with another --on-bad-line, or a process of an earlier one has ended late.
    """
    for attempt in range(2):
        record = directory.read(part)
        made = _is_made(record, job)
        if record is not None and made and directory.is_intact(part, record):
            return record
        if attempt == 0:
            what = "is damaged" if record is None or made else "was made with bad records left out"
            print(f"warning: {part} in {directory.path} {what}: it is made again", file=log, flush=True)
            directory.forget(part)
            for _ in encoder.make(part):
                pass
            encoder.close()
    raise CorpusError(f"{directory.path}: {part} does not read as it was just written: check the disk")


def _tell_of_bad(
    directory: PartsDirectory,
    part: Part,
    record: PartRecord,
    lines: Counter[str],
    quarantine: Optional[Quarantine],
    left_out: LeftOut,
) -> None:
    """Bad records of a part with their lines in the file; ``lines`` counts those of each file before this part."""
    bad: Iterator[dict[str, Any]] = directory.bad_records(part, record)
    for segment, (kept, read, count) in zip(part.segments, record.segments):
        left_out.add(segment.path, kept, [])
        for _ in range(count):
            entry = next(bad)
            line = entry["line"] + lines[segment.path]
            left_out.add(segment.path, 0, [(line, entry["reason"])])
            if quarantine is not None:
                quarantine.add(segment.path, line, entry["reason"], entry["beginning"])
        lines[segment.path] += read


def _meta(job: Job, tokenizer: Tokenizer, key: str, text_bytes: Optional[int], largest: int) -> dict:
    """``text_bytes``: None where token ids were read, all of whose documents end with the end-of-document token."""
    return {
        "tokenizer": {
            "type": job.tokenizer_type,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "json_key": key,
        "append_eod": job.append_eod or text_bytes is None,
        "text_bytes": text_bytes,
        "max_token_id": largest,
    }


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

    def __init__(self, total_bytes: int, interval: int, log: TextIO, start: str = "") -> None:
        self._total = total_bytes
        self._start = start
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
            f"{self._start}documents: {documents} | {documents / seconds:.1f} documents/s | "
            f"{text_bytes / 1e6 / seconds:.2f} MB/s | "
            f"{100 * position / max(self._total, 1):.1f}% | ETA {left:.0f} s",
            file=self._log,
            flush=True,
        )

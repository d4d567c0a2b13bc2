"""A corpus cut into parts, and the directory in which finished parts wait to be merged.

A part is a run of small files or a range of one file. How a corpus is cut follows from its files' sizes alone, not from
ranks or workers, so a later call with others of those goes on with what is there. ``<output-prefix>.parts/`` holds

- ``plan.json``: inputs (path, size, time of change) and options by which the parts were made;
- ``<part>.<key>.bin`` and ``.lengths``: token ids of the part's documents, and the tokens of each (int32);
- ``<part>.bad.jsonl``: bad records, with lines counted from the part's first line of the file;
- ``<part>.json``: the record of completion, written last: counts, sizes and SHA-256 of the other files.

A part without a valid record is made again. Files appear under their names by a rename. They are not forced to the
disk: what a power failure tears no longer has its size or hash, which is noticed before the part is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

import numpy as np

from umv2_megatron.data.corpus import Segment
from umv2_megatron.durable_files import sha256_of

PLAN_VERSION = 1
_LEAST_BYTES, _MOST_BYTES = 256 << 10, 128 << 20
_PARTS_OF_A_CORPUS = 64
_FILES_OF_A_PART = 1024
_TEMPORARY = ".incomplete"


class Input(NamedTuple):
    """A file of the corpus; ``changed`` is its time of change (ns), ``divisible`` whether ranges of it can be read."""

    path: str
    size: int
    changed: int
    divisible: bool


class Part(NamedTuple):
    """Consecutive segments of the corpus; ``size`` in bytes as stored."""

    number: int
    segments: tuple[Segment, ...]
    size: int

    def __str__(self) -> str:
        first, last = self.segments[0], self.segments[-1]
        if len(self.segments) > 1:
            return f"part {self.number} ({first.path} to {last.path})"
        if not first.begin and first.end is None:
            return f"part {self.number} ({first.path})"
        return f"part {self.number} ({first.path} from byte {first.begin})"


def default_part_bytes(total: int) -> int:
    """Bytes of input for one part: a 64th of the corpus, within 256 KiB and 128 MiB."""
    return min(max(total // _PARTS_OF_A_CORPUS, _LEAST_BYTES), _MOST_BYTES)


def cut(inputs: Sequence[Input], part_bytes: int) -> list[Part]:
    """The corpus as parts of about ``part_bytes``; ends of ranges are multiples of it."""
    parts: list[Part] = []
    together: list[Segment] = []
    size = 0

    def close() -> None:
        nonlocal together, size
        if together:
            parts.append(Part(len(parts), tuple(together), size))
        together, size = [], 0

    for file in inputs:
        if file.divisible and file.size > part_bytes:
            close()
            for begin in range(0, file.size, part_bytes):
                end = begin + part_bytes if begin + part_bytes < file.size else None
                parts.append(Part(len(parts), (Segment(file.path, begin, end),), min(part_bytes, file.size - begin)))
            continue
        if size and size + file.size > part_bytes or len(together) == _FILES_OF_A_PART:
            close()
        together.append(Segment(file.path))
        size += file.size
    close()
    return parts


def shares(parts: Sequence[Part], count: int) -> list[list[Part]]:
    """``parts`` divided into ``count`` runs of about equal bytes."""
    found: list[list[Part]] = [[] for _ in range(count)]
    total = sum(part.size + 1 for part in parts)
    before = 0
    for part in parts:
        found[min((before + part.size // 2) * count // total, count - 1)].append(part)
        before += part.size + 1
    return found


@dataclass
class KeyRecord:
    """Totals of one JSON key of a part."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    largest: int = 0


@dataclass
class Record:
    """What a finished part holds. ``left_out``: rows that --filter left out; ``segments``: documents kept, lines read
    and bad records of each of its segments."""

    keys: list[KeyRecord]
    empty: int = 0
    bad: int = 0
    left_out: int = 0
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)


class PartsDirectory:
    """``<output-prefix>.parts``: plan, pieces and records. ``keys``: the number of JSON keys."""

    def __init__(self, output_prefix: str, keys: int) -> None:
        self.path = Path(output_prefix + ".parts")
        self.keys = keys
        self.plan_id = ""

    # -- the plan -----------------------------------------------------------------------------------------------------

    def begin(self, plan: dict[str, Any]) -> None:
        """Go on by ``plan``, or start by it. Raises ``ValueError`` where finished parts were made by another one."""
        path = self.path / "plan.json"
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            old = None
        if old != plan:
            if isinstance(old, dict) and self.has_records():
                raise ValueError(
                    f"{self.path} holds finished parts of an earlier call, but {_difference(old, plan)}: repeat that "
                    "call as it was, or remove the directory to start over"
                )
            self.clear()
            write_whole(path, json.dumps(plan).encode())
        self.use(plan)

    def use(self, plan: dict[str, Any]) -> None:
        self.plan_id = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def read_plan(self) -> dict[str, Any]:
        return json.loads((self.path / "plan.json").read_text(encoding="utf-8"))

    def has_records(self) -> bool:
        return any(name.name[:-5].isdigit() for name in self.path.glob("*.json"))

    def clear(self) -> None:
        """Remove all but the lock and the notes of ranks."""
        for file in self.path.iterdir():
            if file.name[:1].isdigit() or file.name.startswith("plan.json"):
                file.unlink(missing_ok=True)

    def clear_temporary(self) -> None:
        """Remove what processes that were killed left unfinished."""
        for file in self.path.glob(f"[0-9]*{_TEMPORARY}*"):
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        for _ in range(3):  # another rank's last sign may come in between
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                return

    # -- pieces and records -------------------------------------------------------------------------------------------

    def piece(self, number: int, end: str) -> Path:
        return self.path / f"{number:06d}.{end}"

    def read(self, part: Part) -> Optional[Record]:
        """The record of a part whose files have their sizes; None where the part must be made."""
        try:
            found = json.loads(self.piece(part.number, "json").read_text(encoding="utf-8"))
            digest = found.pop("sha256")
            if digest != _digest_of(found) or found.pop("plan") != self.plan_id:
                return None
            for end, (size, _) in found["files"].items():
                if self.piece(part.number, end).stat().st_size != size:
                    return None
            keys = [KeyRecord(**key) for key in found.pop("keys")]
            return Record(keys, **found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def is_intact(self, part: Part, record: Record) -> bool:
        """Whether the files of a part hold the bytes that its record names."""
        try:
            return all(sha256_of(self.piece(part.number, end)) == sha for end, (_, sha) in record.files.items())
        except OSError:
            return False

    def forget(self, part: Part) -> None:
        self.piece(part.number, "json").unlink(missing_ok=True)

    def bad_records(self, part: Part, record: Record) -> Iterator[dict[str, Any]]:
        if record.bad:
            with open(self.piece(part.number, "bad.jsonl"), encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)


class PartWriter:
    """Writes the pieces of one part, and at the end its record. Use as a context: what is unfinished is removed."""

    def __init__(self, directory: PartsDirectory, part: Part) -> None:
        self._directory = directory
        self._part = part
        # Two processes may make one part, when those of a call that was killed have not all ended.
        self._suffix = f"{_TEMPORARY}-{socket.gethostname()}-{os.getpid()}"
        self._files: dict[str, _Hashed] = {}
        self.record = Record([KeyRecord() for _ in range(directory.keys)])
        for i in range(directory.keys):
            self._file(f"{i}.bin"), self._file(f"{i}.lengths")

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for end, file in self._files.items():
            file.stream.close()
            self._temporary(end).unlink(missing_ok=True)

    def add(self, key: int, tokens: bytes, lengths: np.ndarray, text_bytes: int, largest: int) -> None:
        """Documents of one key: their token ids, the tokens of each [n] int32, bytes of text, largest id."""
        self._file(f"{key}.bin").write(tokens)
        self._file(f"{key}.lengths").write(lengths.tobytes())
        total = self.record.keys[key]
        total.documents += len(lengths)
        total.tokens += int(lengths.sum(dtype=np.int64))
        total.text_bytes += text_bytes
        total.largest = max(total.largest, largest)

    def add_bad(self, segment: int, line: int, reason: str, beginning: str) -> None:
        entry = {"segment": segment, "line": line, "reason": reason, "beginning": beginning}
        self._file("bad.jsonl").write(json.dumps(entry).encode() + b"\n")
        self.record.bad += 1

    def finish(self) -> Record:
        """Publish the pieces, and the record last."""
        for end, file in self._files.items():
            file.stream.close()
            self.record.files[end] = (file.size, file.digest.hexdigest())
            os.replace(self._temporary(end), self._directory.piece(self._part.number, end))
        found = {"plan": self._directory.plan_id, **asdict(self.record)}
        found = json.loads(json.dumps(found))
        data = json.dumps({**found, "sha256": _digest_of(found)}).encode()
        write_whole(self._directory.piece(self._part.number, "json"), data, self._suffix)
        return self.record

    def _temporary(self, end: str) -> Path:
        return self._directory.piece(self._part.number, end + self._suffix)

    def _file(self, end: str) -> _Hashed:
        if end not in self._files:
            self._files[end] = _Hashed(open(self._temporary(end), "wb"))  # noqa: SIM115  __exit__ closes it
        return self._files[end]


class _Hashed:
    """A file that is written, with its size and hash."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.digest.update(data)
        self.size += len(data)


def write_whole(path: Path, data: bytes, suffix: str = _TEMPORARY) -> None:
    """Write a small file so that readers see the old content or the new."""
    temporary = path.with_name(path.name + suffix)
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _digest_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing in which two plans differ, with both values."""
    for name in new:
        if name != "inputs" and old.get(name) != new[name]:
            return f"{name} was {_shown(old.get(name))} and is {_shown(new[name])} now"
    before = {path: (size, changed) for path, size, changed, _ in old.get("inputs", [])}
    after = {path: (size, changed) for path, size, changed, _ in new["inputs"]}
    for path in before:
        if path not in after:
            return f"--input named {path} then and does not now"
    for path, (size, changed) in after.items():
        if path not in before:
            return f"--input names {path} now and did not then"
        if before[path] != (size, changed):
            then, now = _moment(before[path][1]), _moment(changed)
            return f"{path} has changed: it had {before[path][0]} bytes of {then}, and has {size} of {now}"
    return "--input named the files in another order"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _moment(nanoseconds: int) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(nanoseconds / 1e9).isoformat(sep=" ", timespec="microseconds")

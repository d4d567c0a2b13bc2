"""What a conversion has finished, written down file by file, so that one that was killed goes on where it stopped.

    journal = Journal(path, job)        # path lies beside the files or in their directory
    if not journal.has(file): ...write it...; journal.add(file, size, sha256)

``job`` says everything that decides the files' content; the notes of another job are not used. A file counts as
finished only while it still has the size and hash that were noted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from umv2_megatron.checkpoint.save_lock import locked
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.durable_files import fsync_path, sha256_of, write_synced
from umv2_megatron.user_paths import is_remote


def digest_of(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write plain data, at once and durably."""
    data = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
    at_once = is_remote(path)
    if at_once:
        write_synced(path, data)
        return
    unfinished = path.with_name(path.name + ".incomplete")
    write_synced(unfinished, data)
    os.replace(unfinished, path)
    fsync_path(path.parent)


def check_space(directory: Path, needed: int) -> None:
    """Raise ``ConversionError`` where the disk has less than ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConversionError(
            f"{directory} needs {needed:,} more bytes, but its disk has {free:,} free; make room there"
        )


@contextlib.contextmanager
def sole_user(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory, which ends with the process and leaves no file in it.

    Raises ``ConversionError`` where another conversion has it, or where the file system cannot lock.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            free = locked(descriptor)
        except OSError as error:
            raise ConversionError(f"{directory} cannot be locked ({error.strerror}); write to another disk") from error
        if not free:
            raise ConversionError(f"{directory} is being written by another conversion; wait for it")
        yield
    finally:
        os.close(descriptor)


class Journal:
    """Notes of one job at ``path``; ``files`` maps names to {"size", "sha256"} and whatever else was noted."""

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self._job = digest_of(job)
        self.files: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["job"] == self._job:
                self.files = {str(name): dict(note) for name, note in content["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no notes, or none that can be read: begin anew

    def has(self, file: Path) -> bool:
        """Whether ``file`` was finished by this job and is still as it was noted."""
        note = self.files.get(file.name)
        if note is None or not file.is_file() or file.stat().st_size != note["size"]:
            return False
        return sha256_of(file) == note["sha256"]

    def add(self, name: str, size: int, sha256: str, **more: Any) -> None:
        """Note a finished file."""
        self.files[name] = {"size": size, "sha256": sha256, **more}
        write_json(self.path, {"job": self._job, "files": self.files})

"""What differs between the storages a directory of checkpoints can be on, behind one interface.

A POSIX disk has locks, atomic renames and free space (`posix_storage.py`). An object store behind a URL has none of
them, but a file there appears whole or not at all (`object_storage.py`). Everything else of `store.py` is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from umv2_megatron.checkpoint.object_storage import ObjectStorage
from umv2_megatron.checkpoint.posix_storage import PosixStorage
from umv2_megatron.user_paths import is_remote


class Lock(Protocol):
    """A directory that belongs to this job until ``release()`` or the end of a ``with`` block."""

    def release(self) -> None: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc_info: object) -> None: ...


class Storage(Protocol):
    """One directory of checkpoints. Raises OSError where the disk or store fails.

    Published is a checkpoint that ``iterations`` lists. A save is ``begin``, files below ``working_path``, the manifest
    (`manifest.write_manifest`, which calls ``confirm`` before its last file), ``publish``, ``replace`` of the tracker;
    or ``discard``. Killed anywhere in between, what was published before is still there, and ``clean_up`` of the next
    owner removes the rest.
    """

    def own(self, timeout_s: float, flag: str) -> Lock:
        """Become the only job that saves here; ``flag`` names the directory in messages.

        Raises CheckpointError naming the owner where there is one.
        """

    def clean_up(self) -> None:
        """Remove, or put back, what a killed owner has left."""

    def iterations(self) -> list[int]:
        """Iterations of the published checkpoints, in rising order."""

    def working_path(self, iteration: int) -> Path:
        """Where the files of a checkpoint are written before it is published."""

    def begin(self, iteration: int, bytes_needed: int | None) -> None:
        """Make ``working_path`` empty. Raises OSError (ENOSPC) where there is no room for the bytes."""

    def discard(self, iteration: int) -> None:
        """Remove what was begun; what is published stays."""

    def confirm(self) -> None:
        """Raise CheckpointError where this job is not the owner any more."""

    def publish(self, iteration: int) -> None:
        """Turn ``working_path``, whose manifest is complete, into the published checkpoint."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a small file beside the checkpoints, which has its old or its new content at any time."""

    def remove(self, iteration: int) -> None:
        """Remove a published checkpoint; half removed, it is none."""

    def free_bytes(self) -> int | None:
        """Free space; None where there is no such number."""


def storage_of(root: Path, stage: Callable[[str], None], warn: Callable[[str], None]) -> Storage:
    """The storage that ``root`` is on. stage: called with the name of every step just after it is done."""
    return ObjectStorage(root, stage, warn) if is_remote(root) else PosixStorage(root, stage, warn)

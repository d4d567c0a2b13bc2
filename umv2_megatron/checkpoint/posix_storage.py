"""A directory of checkpoints on a POSIX file system: written in a hidden directory, renamed when complete.

    <root>/.lock                 owner of the directory while a job saves into it
    <root>/.tmp_iter_0001000/    being written; removed when the next owner starts
    <root>/iter_0001000/         published
    <root>/.old_iter_0001000/    being replaced; comes back when its job is killed before the new one has its name

Everything is synced before the name that makes it count.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from umv2_megatron.checkpoint.iteration_names import iteration_name, iteration_of
from umv2_megatron.checkpoint.save_lock import SaveLock
from umv2_megatron.durable_files import fsync_path, remove_path, write_synced


class PosixStorage:
    """See `storage.Storage`. stage: called with the name of every step just after it is done."""

    def __init__(self, root: Path, stage: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self.root = root
        self._stage = stage
        self._warn = warn

    def own(self, timeout_s: float, flag: str) -> SaveLock:
        self.root.mkdir(parents=True, exist_ok=True)
        return SaveLock(self.root / ".lock", timeout_s, flag)

    def clean_up(self) -> None:
        for entry in sorted(self.root.iterdir()):
            if entry.name.startswith(".old_iter_"):
                # Killed between the two renames that replace a checkpoint of the same iteration: the old one returns.
                target = self.root / entry.name.removeprefix(".old_")
                if not target.exists():
                    os.rename(entry, target)
                    fsync_path(self.root)
                    self._warn(f"{target} was being replaced when its job was killed: the old content is back")
                    continue
            if entry.name.startswith((".tmp_", ".old_iter_")):
                remove_path(entry)

    def iterations(self) -> list[int]:
        """Those with a directory of a published checkpoint's name, valid or not."""
        if not self.root.is_dir():
            return []
        found = (iteration_of(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted(each for each in found if each is not None)

    def working_path(self, iteration: int) -> Path:
        return self.root / f".tmp_{iteration_name(iteration)}"

    def begin(self, iteration: int, bytes_needed: int | None) -> None:
        tmp = self.working_path(iteration)
        self.root.mkdir(parents=True, exist_ok=True)
        remove_path(tmp)
        free = shutil.disk_usage(self.root).free
        if bytes_needed is not None and free < bytes_needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tmp.mkdir()

    def discard(self, iteration: int) -> None:
        remove_path(self.working_path(iteration))

    def confirm(self) -> None:
        """Nothing to ask: the kernel keeps the lock as long as this process lives."""

    def publish(self, iteration: int) -> None:
        tmp, final = self.working_path(iteration), self.root / iteration_name(iteration)
        old = self.root / f".old_{final.name}"
        remove_path(old)
        replaced = final.exists()
        if replaced:
            # Training went back to an older checkpoint and reached this iteration again. rename() cannot replace a
            # directory that has content; `clean_up` undoes this step when the next one never happens.
            os.rename(final, old)
            self._stage("old-set-aside")
        os.rename(tmp, final)
        self._stage("renamed")
        fsync_path(self.root)
        self._stage("rename-synced")
        if replaced:
            remove_path(old)
            self._stage("old-removed")

    def replace(self, name: str, data: bytes) -> None:
        tmp = self.root / f".tmp_{name}"
        write_synced(tmp, data)
        self._stage("tracker-written")
        os.replace(tmp, self.root / name)
        self._stage("tracker-replaced")
        fsync_path(self.root)
        self._stage("tracker-synced")

    def remove(self, iteration: int) -> None:
        # Renamed first: a half-removed directory must not carry a checkpoint's name.
        doomed = self.root / f".tmp_prune_{iteration_name(iteration)}"
        os.rename(self.root / iteration_name(iteration), doomed)
        self._stage("prune-renamed")
        remove_path(doomed)
        self._stage("pruned")

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.root if self.root.exists() else self.root.parent).free

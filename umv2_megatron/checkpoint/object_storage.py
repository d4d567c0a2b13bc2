"""A directory of checkpoints in an object store: written under its own name, published by its last file.

    <root>/.lock                       lease of the job that saves here (`lease.py`)
    <root>/.unfinished_iter_0001000    iter_0001000 is being written or removed; the next owner clears it
    <root>/iter_0001000/...            the files; a checkpoint as soon as manifest.sha256 is there

A store has no rename, and a file there appears whole or not at all, so manifest.sha256, which is written last and
removed first, makes the checkpoint. What has none is not listed. The mark beside it tells a save that was killed from
files that somebody is copying there: only what is marked is ever removed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from umv2_megatron.checkpoint.iteration_names import iteration_name, iteration_of
from umv2_megatron.checkpoint.lease import Lease
from umv2_megatron.checkpoint.manifest import MANIFEST_HASH

if TYPE_CHECKING:
    from umv2_megatron.remote_path import RemotePath

_MARK = ".unfinished_"


class ObjectStorage:
    """See `storage.Storage`. stage: called with the name of every step just after it is done."""

    def __init__(self, root: RemotePath, stage: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self.root = root
        self._stage = stage
        self._warn = warn
        self._lease: Lease | None = None

    def own(self, timeout_s: float, flag: str) -> Lease:
        self._lease = Lease(self.root / ".lock", self._warn, flag)
        return self._lease

    def clean_up(self) -> None:
        for entry in self.root.iterdir():
            if not entry.name.startswith(_MARK):
                continue
            name = entry.name.removeprefix(_MARK)
            # with its last file it is whole: published just before the mark was to go, or not yet begun to be removed
            if iteration_of(name) is not None and not (self.root / name / MANIFEST_HASH).exists():
                (self.root / name).remove_tree()
            entry.unlink(missing_ok=True)

    def iterations(self) -> list[int]:
        found = {entry: iteration_of(entry.name) for entry in self.root.iterdir()}
        return sorted(
            each for entry, each in found.items() if each is not None and (entry / MANIFEST_HASH).exists()
        )

    def working_path(self, iteration: int) -> Path:
        return self._final(iteration)  # type: ignore[return-value]

    def begin(self, iteration: int, bytes_needed: int | None) -> None:
        self.confirm()
        self._mark(iteration).write_bytes(b"")
        self._clear(iteration)

    def discard(self, iteration: int) -> None:
        # The mark stays for the next owner: an upload of another rank may end after this.
        if self._mark(iteration).exists() and not (self._final(iteration) / MANIFEST_HASH).exists():
            self._final(iteration).remove_tree()

    def confirm(self) -> None:
        if self._lease is not None:
            self._lease.confirm()

    def publish(self, iteration: int) -> None:
        self._stage("published")  # by the manifest
        self._mark(iteration).unlink(missing_ok=True)
        self._stage("unmarked")

    def replace(self, name: str, data: bytes) -> None:
        (self.root / name).write_bytes(data)
        self._stage("tracker-written")

    def remove(self, iteration: int) -> None:
        self._mark(iteration).write_bytes(b"")
        self._stage("prune-marked")
        self._clear(iteration)
        self._mark(iteration).unlink(missing_ok=True)
        self._stage("pruned")

    def free_bytes(self) -> int | None:
        return None

    def _clear(self, iteration: int) -> None:
        final = self._final(iteration)
        (final / MANIFEST_HASH).unlink(missing_ok=True)
        self._stage("manifest-removed")
        final.remove_tree()

    def _final(self, iteration: int) -> RemotePath:
        return self.root / iteration_name(iteration)

    def _mark(self, iteration: int) -> RemotePath:
        return self.root / f"{_MARK}{iteration_name(iteration)}"

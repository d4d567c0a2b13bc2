"""The directory of checkpoints as files: publish one so that a crash at any moment loses nothing, and find a good one.

The worst checkpoint is the one that looks saved. So a checkpoint becomes visible only as a whole and only with the
hashes that prove it (``manifest.py``):

    <root>/iter_0001000/manifest.json          size and SHA-256 of every file, number of keys, tensor bytes
    <root>/iter_0001000/manifest.sha256        SHA-256 of manifest.json itself
    <root>/latest_checkpointed_iteration.txt   plain number, as Megatron-LM writes it

Order of a save: write -> sync files -> manifest -> publish -> tracker -> prune. Killed anywhere, the directory still
holds the old or the new checkpoint. Loading verifies every byte before anyone reads it, and falls back, loudly, to the
older valid checkpoint. What "publish" means is the storage's (`storage.py`): a rename on a disk, the manifest's last
file in an object store.

Only files here: no torch, no process group. `save_load.py` decides which rank calls what.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from umv2_megatron.checkpoint.iteration_names import iteration_name
from umv2_megatron.checkpoint.manifest import Manifest, check_files, write_manifest
from umv2_megatron.checkpoint.storage import Lock, storage_of
from umv2_megatron.durable_files import CheckpointError, NoCheckpointError, UnreachableError, open_to_read, sizes_below
from umv2_megatron.user_paths import user_path

__all__ = ["CheckpointError", "CheckpointStore", "NoCheckpointError"]

TRACKER = "latest_checkpointed_iteration.txt"
METADATA_FILE = ".metadata"  # of torch's distributed checkpoints, in every checkpoint of ours


def _print_warning(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def _no_stage(name: str) -> None:
    del name


class CheckpointStore:
    """Publishes checkpoints under `root` and finds the newest valid one.

    keep: how many of the newest valid checkpoints survive pruning (at least 1; 2 by default, so that one bad disk
    block never costs the run). retain_interval: iterations that are a multiple of it are never pruned
    (`--save-retain-interval`). warn: receives each warning line. stages: called with the name of every step of a
    save just after the step is done; the tests kill the process there. flag: names the directory in messages.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep: int = 2,
        retain_interval: int | None = None,
        warn: Callable[[str], None] = _print_warning,
        stages: Callable[[str], None] = _no_stage,
        hash_threads: int = 4,
        flag: str = "--save",
    ) -> None:
        assert keep >= 1 and hash_threads >= 1
        assert retain_interval is None or retain_interval > 0
        self.root = user_path(root)
        self.keep = keep
        self.retain_interval = retain_interval
        self.warn = warn
        self._stage = stages
        self._storage = storage_of(self.root, stages, lambda message: self.warn(message))
        self._hash_threads = hash_threads
        self._flag = flag

    # ------------------------------------------------------------------ names

    def path(self, iteration: int) -> Path:
        """Directory of a published checkpoint."""
        return self.root / iteration_name(iteration)

    def temporary_path(self, iteration: int) -> Path:
        """Directory in which a checkpoint is written before it is published; in an object store that is ``path``."""
        return self._storage.working_path(iteration)

    def iterations(self) -> list[int]:
        """Iterations with a published directory, valid or not, in rising order. Raises OSError."""
        return self._storage.iterations()

    # ------------------------------------------------------------------ owning

    def lock(self, timeout_s: float = 5.0) -> Lock:
        """Become the only job that saves here, and clear what a killed owner left behind.

        Returns the lock; keep it until the job ends (`release()` or as a context manager). It ends with the process,
        in an object store some time after it. Raises CheckpointError naming the owner after `timeout_s` seconds, in an
        object store once that is known to live.
        """
        with self._named_errors("create", self.root, None):
            lock = self._storage.own(timeout_s, self._flag)
        try:
            with self._named_errors("clean up", self.root, None):
                self._storage.clean_up()
        except BaseException:
            lock.release()
            raise
        return lock

    # ------------------------------------------------------------------ saving

    def begin(self, iteration: int, bytes_needed: int | None = None) -> Path:
        """Make an empty temporary directory for `iteration` and return it.

        bytes_needed: about how much will be written; when the disk has less free, fails before a byte is written.
        Raises CheckpointError (disk full, read-only, no permission).
        """
        assert iteration >= 0
        tmp = self.temporary_path(iteration)
        with self._named_errors("start", tmp, bytes_needed):
            self._storage.begin(iteration, bytes_needed)
        self._stage("begun")
        return tmp

    def discard(self, iteration: int) -> None:
        """Remove the temporary directory of a save that failed; published checkpoints stay as they are."""
        with contextlib.suppress(OSError):
            self._storage.discard(iteration)

    def publish(
        self,
        iteration: int,
        *,
        num_keys: int,
        tensor_bytes: int,
        count: Callable[[Path], tuple[int, int]] | None = None,
        sealed: Mapping[str, tuple[int, str]] | None = None,
        prune: bool = True,
    ) -> Path:
        """Turn the temporary directory of `iteration` into a published checkpoint; prune old ones last, if asked to.

        num_keys, tensor_bytes: what the model meant to save. count: reads the written directory and returns the
        number of keys and tensor bytes actually there; a difference refuses publication. Without it only a total
        smaller than `tensor_bytes` is refused. sealed: (bytes, SHA-256) by name of files that were synced, and hashed
        while they were written; the others are read and hashed here. Returns the published directory. Raises
        CheckpointError; whatever was published before is then untouched and the temporary directory is gone.
        """
        tmp = self.temporary_path(iteration)
        final = self.path(iteration)
        try:
            with self._named_errors("publish", final, tensor_bytes):
                self._check_counts(tmp, num_keys, tensor_bytes, count)
                write_manifest(
                    tmp, iteration, num_keys, tensor_bytes,
                    sealed=sealed or {}, threads=self._hash_threads, stage=self._stage, confirm=self._storage.confirm,
                )  # fmt: skip
                self._storage.publish(iteration)
                self._storage.replace(TRACKER, str(iteration).encode())
        except BaseException:
            self.discard(iteration)
            raise
        if prune:
            self.prune(iteration)
        return final

    def _check_counts(
        self, tmp: Path, num_keys: int, tensor_bytes: int, count: Callable[[Path], tuple[int, int]] | None
    ) -> None:
        files = sizes_below(tmp)
        if count is not None:
            found_keys, found_bytes = count(tmp)
            if (found_keys, found_bytes) != (num_keys, tensor_bytes):
                raise CheckpointError(
                    f"{tmp} was not published: the model has {num_keys} keys and {tensor_bytes} tensor bytes, "
                    f"but {found_keys} keys and {found_bytes} bytes were written; save again"
                )
        on_disk = sum(files.values())
        if on_disk < tensor_bytes:
            raise CheckpointError(
                f"{tmp} was not published: the model has {tensor_bytes} tensor bytes, but its {len(files)} files hold "
                f"only {on_disk} bytes; save again"
            )

    def prune(self, published: int) -> None:
        """Remove what is older than the newest `keep` valid checkpoints up to `published`; failures are only told.

        Iterations after `published` belong to a run that was rewound; they are only named, never removed.
        Validity here means sizes, not hashes: re-reading terabytes at every save would cost more than it protects.
        """
        try:
            self._prune(published)
        except OSError as error:
            # The checkpoint is safe from here on: a failure to delete old ones must not fail the save.
            self.warn(f"old checkpoints in {self.root} could not be removed: {error}")

    def _prune(self, published: int) -> None:
        newer = [i for i in self.iterations() if i > published]
        if newer:
            self.warn(f"{self.root} also holds checkpoints newer than the one just saved ({published}): {newer}")
        kept = 0
        for iteration in sorted((i for i in self.iterations() if i <= published), reverse=True):
            if kept < self.keep:
                try:
                    self.verify(iteration, hashes=False)
                    kept += 1
                except CheckpointError as error:
                    self.warn(str(error))
                continue
            if self.retain_interval and iteration % self.retain_interval == 0:
                continue
            self._storage.remove(iteration)

    def remove(self, iteration: int) -> None:
        """Remove a published checkpoint, if it is there. Raises CheckpointError."""
        with self._named_errors("remove", self.path(iteration), None):
            if self.path(iteration).exists():
                self._storage.remove(iteration)

    # ------------------------------------------------------------------ loading

    def read_tracker(self) -> int | None:
        """The iteration in the tracker file; None when the file is missing, empty or not a plain number."""
        try:
            with open_to_read(self.root / TRACKER) as stream:
                text = stream.read(64).decode("ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None

    def verify(self, iteration: int, *, hashes: bool = True) -> Manifest:
        """Check a published checkpoint file by file against its manifest and return the manifest.

        hashes=False compares names and sizes only; files that this process has hashed and nobody has touched since are
        not read again. Raises CheckpointError naming the bad file with expected and
        actual size or SHA-256; also for a missing or extra file, a symlink, or a path that leaves the directory.
        """
        return check_files(self.path(iteration), iteration, hashes=hashes, threads=self._hash_threads)

    def candidates(self) -> list[int]:
        """Iterations to load, best first: the tracker's, older ones, then newer ones. Nothing is verified.

        Warns of a tracker that is missing or damaged. Raises NoCheckpointError when nothing was ever published.
        """
        tracked = self.read_tracker()
        candidates = sorted(self.iterations(), reverse=True)
        tracker = self.root / TRACKER
        if tracked is None:
            if not candidates and not tracker.exists():
                raise NoCheckpointError(f"{self.root} holds no checkpoint: check --load")
            state = "is not a plain iteration number" if tracker.exists() else "is missing"
            self.warn(f"{tracker} {state}: looking for the newest valid checkpoint among {candidates}")
        else:
            older = [i for i in candidates if i < tracked]
            candidates = [tracked, *older, *(i for i in candidates if i > tracked)]
        return candidates

    def nothing_valid(self, problems: list[str]) -> CheckpointError:
        """The error for a directory none of whose checkpoints can be used; problems: what is wrong with each."""
        detail = problems[0] if problems else f"{self.root / TRACKER} is unreadable and there are no iter_* directories"
        return CheckpointError(f"{self.root} has no valid checkpoint to load: {detail}")

    def resolve(self, ckpt_step: int | None = None) -> int:
        """The iteration to load, every byte of it verified by this process.

        With `ckpt_step` exactly that one. Otherwise the tracker's, else the newest older valid one, else any valid
        one, with a warning line that names the bad file. Raises NoCheckpointError when nothing was ever published,
        CheckpointError when there is nothing valid.
        """
        if ckpt_step is not None:
            self.verify(ckpt_step)
            return ckpt_step
        candidates = self.candidates()
        problems: list[str] = []
        for iteration in candidates:
            try:
                self.verify(iteration)
            except UnreachableError:
                raise
            except CheckpointError as error:
                problems.append(str(error))
                self.warn(f"checkpoint {iteration} cannot be used: {error}")
                continue
            if problems:
                self.warn(f"falling back to checkpoint {iteration}")
            return iteration
        raise self.nothing_valid(problems)

    @contextlib.contextmanager
    def _named_errors(self, action: str, path: Path, bytes_needed: int | None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.explain(error, f"could not {action} {path}", bytes_needed) from error

    def explain(self, error: OSError, what: str, bytes_needed: int | None = None) -> CheckpointError:
        """A one-sentence CheckpointError for a failed write, with the bytes needed and free on the disk."""
        where = f" ({error.filename})" if error.filename else ""
        space = ""
        with contextlib.suppress(OSError):
            free = self._storage.free_bytes()
            needed = "unknown" if bytes_needed is None else bytes_needed
            space = "" if free is None else f", bytes needed: {needed}, bytes free: {free}"
        return CheckpointError(
            f"{what}: {error.strerror or error}{where}{space}; published checkpoints in {self.root} are untouched"
        )

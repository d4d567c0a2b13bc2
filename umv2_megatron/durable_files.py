"""Small file operations whose result must still be there after a power cut, and the error they end in.

Paths are of this machine or behind a URL (`user_paths.py`). What a store behind a URL has taken is durable, so there is
nothing to sync there.
"""

import hashlib
import io
import os
import shutil
import stat
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from umv2_megatron.user_paths import is_remote

_READ_BYTES = 4 << 20
_SETTLED_NS = 2_000_000_000


class CheckpointError(ValueError):
    """A checkpoint, or the directory that holds it, cannot be used; the message is one sentence for the user.

    A ValueError, because it ends a command the same way as any other wrong input: one line, no traceback.
    """


class DamageError(CheckpointError):
    """A checkpoint is not what was saved: files or values of it are missing or changed. An older one may be good."""


class NotSavedError(CheckpointError):
    """A checkpoint that a run can do without could not be written; what was there before is as it was."""


class NoCheckpointError(CheckpointError):
    """The directory holds no checkpoint at all: nothing was ever published there."""


class UnreachableError(CheckpointError):
    """A store cannot be asked, or refuses: that says nothing of the checkpoint there, so an older one is no way out."""


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What a file of a checkpoint that cannot be read means: damage, or a store that fails."""
    text = f"{error.filename or path} cannot be read: {error.strerror}"
    failed = is_remote(path) and not isinstance(error, FileNotFoundError)
    return UnreachableError(text) if failed else DamageError(text)


def check_relative_path(name: str, listed_in: Path) -> None:
    """Refuse a file name that would leave its directory. Raises CheckpointError naming the list it came from."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{listed_in} lists the path {name!r}: paths must stay inside the checkpoint's directory")


def sizes_below(directory: Path) -> dict[str, int]:
    """Bytes of all files below `directory` by relative POSIX path; symlinks and special files are refused."""
    if is_remote(directory):
        return directory.sizes_below()
    found = {}
    for entry in sorted(directory.rglob("*")):
        status = entry.lstat()
        mode = status.st_mode
        if stat.S_ISLNK(mode) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(f"{entry} is a symlink or special file: checkpoints must be plain files")
        if stat.S_ISREG(mode):
            found[entry.relative_to(directory).as_posix()] = status.st_size
    return found


def files_below(directory: Path) -> list[str]:
    """Relative POSIX paths of all files below `directory`; symlinks and special files are refused."""
    return list(sizes_below(directory))


class FilesNow:
    """Files of a directory as they are now, so that this process need not hash again what it found good before."""

    _good: dict[Path, list[tuple]] = {}

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        self._directory = directory.absolute()
        self._settled = False
        if is_remote(directory):
            self._files: list[tuple] = []
            return  # nothing there says whether a file was touched
        found = [(name, (directory / name).stat()) for name in names]
        self._files = [(name, it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns) for name, it in found]
        # A change within the tick of the file system's clock cannot be seen: only files at rest can be remembered.
        self._settled = all(it.st_ctime_ns < time.time_ns() - _SETTLED_NS for _, it in found)

    def were_good(self) -> bool:
        """Whether nobody has touched them since `are_good`."""
        return bool(self._files) and self._good.get(self._directory) == self._files

    def are_good(self) -> None:
        """Remember them as they were when this object was made."""
        if self._settled:
            self._good[self._directory] = self._files


class FileWindow(io.RawIOBase):
    """A part of an open file as a file of its own, which ends where the part or the file ends. failure: of a read."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0
        self.failure: OSError | None = None

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the part goes; returns the bytes read."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._position))
        done = 0
        while done < wanted:
            try:
                count = read_at(self._file, view[done:wanted], self._start + self._position + done)
            except OSError as error:
                self.failure = error  # torch.load puts another one in its place
                raise
            if not count:
                break
            done += count
        self._position += done
        return done


def open_to_read(path: Path) -> BinaryIO:
    """The file at ``path``, unbuffered, for `read_at` and `FileWindow`. Raises OSError."""
    if is_remote(path):
        return path.reader()  # type: ignore[return-value]
    return open(path, "rb", buffering=0)  # type: ignore[return-value]


def read_at(file: BinaryIO, view: memoryview, offset: int) -> int:
    """Fill ``view`` from ``offset`` of a file of `open_to_read`, as far as one read goes; returns the bytes read."""
    if isinstance(file, io.FileIO):
        return os.preadv(file.fileno(), [view], offset)
    file.seek(offset)
    return file.readinto(view)  # type: ignore[attr-defined]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    with open_to_read(path) as stream:
        while count := stream.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    if is_remote(path):
        path.write_bytes(data)
        return
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_synced(path: Path, data: bytes) -> None:
    """Write a small file so that a reader, at any time, finds the old or the new content."""
    if is_remote(path):
        path.write_bytes(data)
        return
    unfinished = path.with_name(f".{path.name}.tmp")
    write_synced(unfinished, data)
    os.replace(unfinished, path)


def fsync_path(path: Path) -> None:
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_path(path: Path) -> None:
    if is_remote(path):
        path.remove_tree()
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

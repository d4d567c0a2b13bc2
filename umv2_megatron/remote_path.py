"""Paths behind a URL of fsspec, with the methods of ``pathlib.Path`` that this package uses, and errors that are told.

`universal_pathlib` makes the names; what goes over the network is here, because three things matter there: every
failure must be an OSError with a number, words and the URL (libraries of stores raise errors of their own), a store
that cannot be asked must never look like one that holds nothing, and the number of requests must be known.

An object store has files and no directories: ``mkdir`` does nothing, and a directory exists while a file is below it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from upath.extensions import ProxyUPath

PART_BYTES = 64 << 20
"""Bytes of a part of an upload, which is kept in memory until it is sent. S3 takes 10,000 parts: 640 GiB for a file."""
BLOCK_BYTES = 16 << 20
"""Bytes of a request when reading: pieces of a shard that lie side by side come with one."""
_BLOCKS = 4

_NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, FileExistsError: errno.EEXIST}


@contextlib.contextmanager
def told(path: RemotePath) -> Iterator[None]:
    """Any failure inside becomes an OSError with the number, words and name of ``path``."""
    try:
        yield
    except OSError as error:
        number = error.errno or next((_NUMBERS[kind] for kind in _NUMBERS if isinstance(error, kind)), errno.EIO)
        words = error.strerror or " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError) and error.__cause__ is None:
            words = os.strerror(errno.ENOENT)  # fsspec's own, whose words are the path
        raise OSError(number, words, str(path)) from error
    except Exception as error:  # of botocore, aiohttp and whatever else a store is reached through
        words = " ".join(str(error).split())
        raise OSError(errno.EIO, f"{type(error).__name__}: {words}", str(path)) from error


class RemotePath(ProxyUPath):
    """A path behind a URL. Methods raise OSError alone."""

    __slots__ = ()

    def _info(self) -> dict[str, Any] | None:
        """What the store says of it; None where nothing is there."""
        with told(self):
            try:
                return self.fs.info(self.path)
            except FileNotFoundError:
                return None

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        info = self._info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        info = self._info()
        return info is not None and info["type"] == "directory"

    def is_symlink(self) -> bool:
        return False

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """With ``st_size`` alone."""
        with told(self):
            return SimpleNamespace(st_size=self.fs.info(self.path)["size"])

    def iterdir(self) -> Iterator[RemotePath]:
        """What is directly below; nothing where nothing is there. A bucket that is missing is an error."""
        with told(self):
            try:
                names = self.fs.ls(self.path, detail=False)
            except FileNotFoundError as error:
                if error.__cause__ is not None:  # the store's own answer, not fsspec's to an empty list
                    raise
                names = []
        for name in sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in names}):
            if name and name != self.name:
                yield self / name

    def sizes_below(self) -> dict[str, int]:
        """Bytes of every file below by relative POSIX path, from one listing.

        Some programs leave an empty object with the name of a directory, which is no file.
        """
        with told(self):
            found = self.fs.find(self.path, detail=True)
        start = len(self.path.rstrip("/")) + 1
        files = {name[start:]: entry["size"] for name, entry in sorted(found.items()) if entry["type"] == "file"}
        return {name: size for name, size in files.items() if name and not name.endswith("/")}

    def modified(self) -> float:
        """When the file was last written, by the store's clock, in seconds since 1970."""
        with told(self):
            return self.fs.modified(self.path).timestamp()

    def read_bytes(self) -> bytes:
        with told(self):
            return self.fs.cat_file(self.path)

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        """At once: a reader sees the old or the new content."""
        with told(self):
            self.fs.pipe_file(self.path, bytes(data))
        return len(data)

    def create(self, data: bytes) -> bool:
        """Write a file that is not there; False where it is. Exclusive where the store is (S3: If-None-Match)."""
        with told(self):
            try:
                self.fs.pipe_file(self.path, bytes(data), mode="create")
            except FileExistsError:
                return False
        return True

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: fsspec would make a bucket that is missing."""

    def unlink(self, missing_ok: bool = False) -> None:
        with told(self):
            try:
                self.fs.rm_file(self.path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_tree(self) -> None:
        """Everything below; nothing where nothing is there."""
        with told(self), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path, recursive=True)

    def absolute(self) -> RemotePath:
        return self

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def reader(self) -> RemoteReader:
        """The file, open for reading at any position."""
        return RemoteReader(self)

    def writer(self) -> RemoteWriter:
        """A new file, which is there once committed."""
        return RemoteWriter(self)


class RemoteReader(io.RawIOBase):
    """A file that is read by ranges, in blocks of BLOCK_BYTES of which the last few are kept."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        with told(path):
            self._file = path.fs.open(
                path.path, "rb", block_size=BLOCK_BYTES, cache_type="blockcache", cache_options={"maxblocks": _BLOCKS}
            )
        self.size: int = self._file.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        with told(self._path):
            data = self._file.read(min(len(view), BLOCK_BYTES))  # no more than a block in memory twice
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class RemoteWriter:
    """A new file, sent in parts of PART_BYTES while it is written; nothing is there until ``commit``."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        with told(path):
            self._file: Any = path.fs.open(path.path, "wb", block_size=PART_BYTES)

    def write(self, view: memoryview) -> int:
        """Take up to a part; returns the bytes taken."""
        with told(self._path):
            return self._file.write(view[:PART_BYTES])

    def commit(self) -> None:
        """Send the rest, and let the file be there."""
        file, self._file = self._file, None
        try:
            with told(self._path):
                file.close()
        except OSError:
            _discard(file)
            raise

    def discard(self) -> None:
        """Without ``commit``: leave nothing behind."""
        file, self._file = self._file, None
        if file is not None:
            _discard(file)


def _discard(file: Any) -> None:
    """Give up an unfinished upload; a store that cannot be reached keeps its parts."""
    with contextlib.suppress(Exception):
        file.discard()
    file.closed = True  # or the end of the object would send what is left

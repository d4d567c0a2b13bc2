"""Where a path that a user gives lies: on this machine's file systems, or behind a URL of fsspec (``s3://bucket/run``).

Local text becomes a ``pathlib.Path``, and nothing else is imported for it. Text with ``://`` becomes a ``RemotePath``
(`remote_path.py`), which has the methods of a ``Path`` that this package uses, so that most code takes either. Callers
name the type ``Path`` for both. What does not take a URL (``open``, ``os.path``) fails on it instead of making a local
directory of that name: a ``RemotePath`` has no ``__fspath__``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from umv2_megatron.remote_path import RemotePath

SEPARATOR = "://"


class UserPathError(ValueError):
    """A URL cannot be used on this machine; the message is one sentence for the user."""


def is_url(where: str | os.PathLike[str]) -> bool:
    """Whether a path as the user gave it is a URL."""
    return SEPARATOR in str(where)


def is_remote(path: Path) -> TypeGuard[RemotePath]:
    """Whether a path of ``user_path`` is a URL's."""
    return not isinstance(path, Path)


def user_path(where: str | os.PathLike[str], flag: str = "the path") -> Path:
    """The path that ``where`` means; a path is its own.

    flag: the setting it comes from, for the message. Raises UserPathError for a URL whose packages are not installed,
    or whose protocol fsspec does not know.
    """
    if not isinstance(where, str):
        return where if not hasattr(where, "__fspath__") else Path(where)  # type: ignore[return-value]
    if not is_url(where):
        return Path(where)
    protocol = where.split(SEPARATOR, 1)[0]
    try:
        from umv2_megatron.remote_path import RemotePath

        made = RemotePath(where, protocol=None, **_options(protocol))
        made.fs  # noqa: B018 - makes the file system, which imports what the protocol needs
    except ImportError as error:
        raise UserPathError(
            f"{flag} is {where}, but a package for {protocol}{SEPARATOR} is not installed ({error}); pip install "
            "-r requirements-storage.txt, or umv2_megatron[storage], and the protocol's own package where it is not s3"
        ) from error
    except ValueError as error:
        raise UserPathError(f"{flag} is {where}; expected a directory, or a URL that fsspec knows: {error}") from error
    return made  # type: ignore[return-value]


def local_folder(where: str | os.PathLike[str] | None) -> Path:
    """``where``, or the working directory where that is a URL or nothing: for what only a local disk can take."""
    return Path(".") if where is None or is_url(where) else Path(where)


def same_directory(one: str, other: str) -> bool:
    """Whether two paths as the user gave them are the same directory."""
    if is_url(one) or is_url(other):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)


def _options(protocol: str) -> dict[str, bool]:
    # other processes write there, too: a remembered listing would be wrong
    options = {"use_listings_cache": False}
    return {**options, "auto_mkdir": True} if protocol in ("file", "local") else options

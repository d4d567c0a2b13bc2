"""The text of ``--help``, kept between calls: its flags come from mcore's dataclasses, which take seconds to load.

Kept in ``$UMV2_CACHE_DIR`` (default ``~/.cache/umv2_megatron``) under a digest of what it depends on: the versions
of mcore and Python, the sources of this room, the program's name and the terminal's width.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached_help(program: str, description: str, make: Callable[[], str]) -> str:
    """The help text of ``program``: that of an earlier call, else that of ``make``, which is then kept.

    A directory that cannot be written to, or a file that cannot be read, costs time and nothing else.
    """
    path = _directory() / f"help-{_digest(program, description)}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    text = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    return text


def _directory() -> Path:
    named = os.environ.get("UMV2_CACHE_DIR")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umv2_megatron"


def _digest(*words: str) -> str:
    facts = [importlib.metadata.version("megatron-core"), sys.version, str(shutil.get_terminal_size().columns), *words]
    digest = hashlib.sha256("\0".join(facts).encode())
    for source in sorted(Path(__file__).parent.rglob("*.*")):
        if source.suffix in (".py", ".yaml"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:24]

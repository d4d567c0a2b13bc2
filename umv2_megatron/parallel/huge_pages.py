"""Huge pages for tensors on CPUs, where the system gives them on request.

Random rows of a large table miss the address cache with pages of 4 KB in almost every access; with pages of 2 MB they
seldom do, and lookups take down to a third of the time (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Let torch ask for them, unless the user has set THP_MEM_ALLOC_ENABLE (0 keeps torch from it).

    Call it before the first large tensor is made: that is when torch reads the variable.
    """
    with contextlib.suppress(OSError):
        if any(f"[{mode}]" in SYSTEM.read_text() for mode in ("madvise", "always")):
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

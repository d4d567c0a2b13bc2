"""Making hundreds of thousands of small objects, as a large checkpoint has to describe it, without the collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def many_objects() -> Iterator[None]:
    """Python's garbage collector rests: it would look at all objects again and again while they become more, and takes
    half of the time. None of these are garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

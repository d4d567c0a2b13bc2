"""A progress bar in bytes on a terminal; nothing where the output is a file."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts bytes of ``total``; a context manager."""

    def __init__(self, what: str, total: int) -> None:
        # disable=None: only where stderr is a terminal
        self._bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None)

    def add(self, count: int) -> None:
        """``count`` more bytes are done."""
        self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

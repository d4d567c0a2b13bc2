"""Where the time of training steps goes, by name: ``Ranges`` collects, ``table`` shows.

A range is opened and closed around a piece of work, on the device's own clock: times are taken on the stream of the
work (``cpu_platform.mark``) and subtracted after the device has been waited for at the end, so nothing waits during a
step. While it is open, a range is also named to torch.profiler or, under nsys, to NVTX. ``model_ranges.py`` opens them
around the parts of a model; the training step opens the others. ``NO_RANGES`` takes the place of a collector in a run
that is not profiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from umv2_megatron.parallel import cpu_platform

Path = tuple[str, ...]
ORDER = ("data", "forward", "recompute", "backward", "gradient reduce", "optimizer")
"""Parts of a step, in the order in which they are shown; others follow."""
REST = "rest"
"""Of a range, what its parts do not cover."""


class NoRanges:
    """What a run that is not profiled calls."""

    def __call__(self, name: str) -> contextlib.AbstractContextManager:
        """A context that does nothing."""
        return contextlib.nullcontext()


NO_RANGES = NoRanges()


@dataclasses.dataclass(eq=False)
class OpenRange:
    """A range that has been opened. ``until_next``: nothing tells when it ends; the next range, or its end, does."""

    path: Path
    begin: Any
    close_annotation: Callable[[], None]
    until_next: bool


@dataclasses.dataclass(frozen=True)
class Spent:
    """Milliseconds and calls of one path, over all profiled steps."""

    milliseconds: float
    calls: int


class Ranges(NoRanges):
    """Collects ranges from its creation until ``stop``.

    Args:
        annotate: opens a range of this name in another profiler and returns what closes it.
    """

    def __init__(self, annotate: Callable[[str], Callable[[], None]]) -> None:
        self._annotate = annotate
        self._stack: list[OpenRange] = []
        self._closed: list[tuple[Path, Any, Any]] = []
        self._begin = cpu_platform.mark()

    @contextlib.contextmanager
    def __call__(self, name: str, section: str | None = None) -> Iterator[None]:
        """A range around what is done inside; see ``open`` for ``section``."""
        opened = self.open(name, section)
        try:
            yield
        finally:
            self.close(opened)

    def open(self, name: str, section: str | None = None, until_next: bool = False) -> OpenRange:
        """Open a range: a part of the innermost open one, or, outside of all, of ``section``."""
        self._close_endless()
        above = self._stack[-1].path if self._stack else (section,) if section else ()
        path = (*above, name)
        # a range that ends elsewhere may end on another thread, which the other profilers do not take
        close_annotation = (lambda: None) if until_next else self._annotate(": ".join(path))
        self._stack.append(OpenRange(path, cpu_platform.mark(), close_annotation, until_next))
        return self._stack[-1]

    def close(self, opened: OpenRange) -> None:
        """Close a range, and with it what was opened inside and is still open; nothing if it is closed."""
        if opened not in self._stack:
            return
        now = cpu_platform.mark()
        while True:
            last = self._stack.pop()
            last.close_annotation()
            self._closed.append((last.path, last.begin, now))
            if last is opened:
                break
        self._close_endless()

    def _close_endless(self) -> None:
        if self._stack and self._stack[-1].until_next:
            last = self._stack.pop()
            self._closed.append((last.path, last.begin, cpu_platform.mark()))

    def stop(self) -> tuple[float, dict[Path, Spent]]:
        """Milliseconds since the creation, and what was spent by path; waits for the device."""
        end = cpu_platform.mark()
        cpu_platform.synchronize()
        totals: dict[Path, Spent] = {}
        for path, begin, until in self._closed:
            before = totals.get(path, Spent(0.0, 0))
            spent = before.milliseconds + cpu_platform.milliseconds(begin, until)
            totals[path] = Spent(spent, before.calls + 1)
        return cpu_platform.milliseconds(self._begin, end), totals


def rows_of(whole: float, spent: dict[Path, Spent], steps: int) -> list[dict[str, Any]]:
    """One row per path, a whole before its parts, per step: ``path``, ``ms``, ``share`` of a step, ``calls``.

    ``whole`` is the time of all ``steps`` steps in milliseconds. Sections (forward, backward) are the sum of their
    parts. The last row, "other", is what no range covers.
    """
    known = dict(spent)
    for path, each in spent.items():
        if len(path) > 1 and path[:1] not in spent and (len(path) == 2 or path[:2] not in spent):
            before = known.get(path[:1], Spent(0.0, 0))
            known[path[:1]] = Spent(before.milliseconds + each.milliseconds, 0)
    for path, each in list(known.items()):
        parts = sum(inner.milliseconds for other, inner in known.items() if other[:-1] == path)
        if path in spent and parts:
            known[(*path, REST)] = Spent(max(0.0, each.milliseconds - parts), 0)
    covered = sum(each.milliseconds for path, each in known.items() if len(path) == 1)
    rows = [_row(path, known[path], whole, steps) for path in _in_order(known)]
    return [*rows, _row(("other",), Spent(max(0.0, whole - covered), 0), whole, steps)]


def _row(path: Path, spent: Spent, whole: float, steps: int) -> dict[str, Any]:
    share = spent.milliseconds / whole if whole else 0.0
    return {"path": list(path), "ms": spent.milliseconds / steps, "share": share, "calls": spent.calls / steps}


def _in_order(known: dict[Path, Spent]) -> list[Path]:
    """Steps' parts in the order of a step; what is inside them by time, the longest first."""

    def place(path: Path) -> tuple:
        first = ORDER.index(path[0]) if path[0] in ORDER else len(ORDER)
        inside = [
            (path[depth] == REST, -known.get(path[: depth + 1], Spent(0.0, 0)).milliseconds, path[depth])
            for depth in range(1, len(path))
        ]
        return (first, path[0], *inside)

    return sorted(known, key=place)


def table(rows: list[dict[str, Any]], title: str) -> str:
    """The rows as text: part, milliseconds per step, share of the step, calls per step."""
    lines = [f" {title}", f" {'part':<42}{'ms/step':>10}{'share':>8}{'calls':>8}"]
    for row in rows:
        name = "  " * (len(row["path"]) - 1) + row["path"][-1]
        calls = f"{row['calls']:g}" if row["calls"] else ""
        lines.append(f" {name:<42}{row['ms']:>10.2f}{row['share']:>8.1%}{calls:>8}")
    return "\n".join(lines)

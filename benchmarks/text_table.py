"""A table as text for a terminal and as Markdown; needs nothing but Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Table:
    """Rows of text under a sentence; the first column is a name, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """For a terminal."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        return "\n".join([self.title, *("  ".join(cells) for cells in padded)])

    def markdown(self) -> str:
        """For a document."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join([self.title, "", *("| " + " | ".join(line) + " |" for line in lines)])

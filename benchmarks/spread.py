"""Median, lowest and highest of measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some numbers."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Of at least one number."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def text(self, digits: int = 1, factor: float = 1.0) -> str:
        """As "median (lowest-highest)", each times ``factor``."""
        median, lowest, highest = (f"{each * factor:,.{digits}f}" for each in (self.median, self.lowest, self.highest))
        return f"{median} ({lowest}-{highest})"


def ratio(upper: Sequence[float], lower: Sequence[float], factor: float = 1.0) -> Spread:
    """Of the rounds' ratios upper / lower, times ``factor``."""
    return Spread.of([factor * above / below for above, below in zip(upper, lower)])

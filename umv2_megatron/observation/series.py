"""The numbers of one name over the steps of a run, and few of them that stand for all.

A page of a run must not grow with the run: ``thinned`` keeps at most as many points as a screen shows, each with the
mean, the least and the largest of the numbers that it stands for, so that a single spike remains visible.
"""

from __future__ import annotations

import bisect
import dataclasses
import math

POINTS = 400


@dataclasses.dataclass(frozen=True)
class Point:
    """Numbers of neighbouring steps: the last of their iterations, their mean, least and largest; None where every one
    of them was not finite."""

    iteration: int
    mean: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass
class Series:
    """Numbers by iteration, rising; each iteration once. None is a number that was not finite."""

    iterations: list[int] = dataclasses.field(default_factory=list)
    values: list[float | None] = dataclasses.field(default_factory=list)

    def add(self, iteration: int, value: float | None) -> None:
        """Take in a record in the order of the file. One that goes back takes the place of all from there on: a restart
        has repeated these steps."""
        self.cut(iteration)
        self.iterations.append(iteration)
        self.values.append(value if value is None or math.isfinite(value) else None)

    def cut(self, iteration: int) -> None:
        """Forget all from ``iteration`` on."""
        if self.iterations and iteration <= self.iterations[-1]:
            place = bisect.bisect_left(self.iterations, iteration)
            del self.iterations[place:], self.values[place:]

    def from_iteration(self, first: int) -> Series:
        """The part from ``first`` on."""
        place = bisect.bisect_left(self.iterations, first)
        return Series(self.iterations[place:], self.values[place:])

    def thinned(self, points: int = POINTS) -> list[Point]:
        """At most ``points`` points, whose iterations are spread evenly."""
        if len(self.iterations) <= points:
            return [Point(step, value, value, value) for step, value in zip(self.iterations, self.values)]
        first, last = self.iterations[0], self.iterations[-1]
        width = (last - first + 1) / points
        found: list[Point] = []
        group: list[float | None] = []
        for place, step in enumerate(self.iterations):
            group.append(self.values[place])
            ends = place + 1 == len(self.iterations) or int((self.iterations[place + 1] - first) / width) != int(
                (step - first) / width
            )
            if ends:
                known = [value for value in group if value is not None]
                mean = sum(known) / len(known) if known else None
                found.append(Point(step, mean, min(known, default=None), max(known, default=None)))
                group = []
        return found

"""Line charts as inline SVG whose lines stretch with the page while their labels, which are HTML, keep their size.

A chart is a box of ``WIDTH`` x ``HEIGHT`` units without an aspect ratio of its own; labels stand at percentages of it.
So one drawing is readable on a phone and on a wide screen. The numbers under the pointer come from a JSON beside it,
which page.js reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from umv2_megatron.observation.html import Html, joined, tag
from umv2_megatron.observation.series import Point, Series

WIDTH, HEIGHT = 1000, 300
_FEW = 40
"""Up to this many points of a series are also drawn as dots."""


@dataclass(frozen=True)
class Line:
    """One series of a chart: its label, its numbers, and which of the page's colours (1 to 4) it has."""

    label: str
    series: Series
    colour: int


@dataclass(frozen=True)
class Mark:
    """A vertical line at an iteration: "restart", "fault" or "blend"."""

    iteration: int
    kind: str


@dataclass(frozen=True)
class _Scale:
    """Numbers of ``low`` to ``high`` on a length of 0 to 1, by their logarithm if ``log``."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str, unit: str, lines: Sequence[Line], marks: Sequence[Mark] = (), *, from_zero: bool = True
) -> Html | None:
    """A chart of ``lines``, each thinned to what a screen shows, with a band from the least to the largest; None where
    there is not one number. The scale is logarithmic where positive numbers spread over a factor of 50, and may begin
    at 0 if ``from_zero``."""
    drawn = [(line, line.series.thinned()) for line in lines]
    drawn = [(line, points) for line, points in drawn if any(point.mean is not None for point in points)]
    if not drawn:
        return None
    steps = [point.iteration for _, points in drawn for point in points]
    across = _Scale(min(steps), max(steps)) if min(steps) < max(steps) else _Scale(min(steps) - 1, min(steps) + 1)
    up = _vertical([point for _, points in drawn for point in points], from_zero)
    ticks = [(value, up.at(value)) for value in _ticks(up)]
    shapes = [
        tag("line", class_="grid", x1=0, x2=WIDTH, y1=_y(place), y2=_y(place)) for _, place in ticks
    ]
    for mark in marks:
        if across.low <= mark.iteration <= across.high:
            x = _short(WIDTH * across.at(mark.iteration))
            shapes.append(tag("line", class_=f"mark {mark.kind}", x1=x, x2=x, y1=0, y2=HEIGHT))
    for line, points in drawn:
        shapes += _curve(points, line.colour, across, up)
    svg = tag("svg", *shapes, viewBox=f"0 0 {WIDTH} {HEIGHT}", preserveAspectRatio="none", role="img",
              aria_label=f"{title}, {unit}")  # fmt: skip
    labels = [tag("span", number(value), class_="y", style=f"bottom:{100 * place:.2f}%") for value, place in ticks]
    labels += _iteration_labels(across)
    legend = [tag("span", tag("i", class_=f"c{line.colour}"), line.label) for line, _ in drawn if len(drawn) > 1]
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("small", unit), tag("span", *legend, class_="legend")),
        tag("div", svg, *labels, tag("div", class_="cursor"), tag("output"), class_="plot"),
        _data(drawn, across),
        class_="chart",
    )


def number(value: float) -> str:
    """A number for a reader, with four digits."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _vertical(points: list[Point], from_zero: bool) -> _Scale:
    low = min(point.low for point in points if point.low is not None)
    high = max(point.high for point in points if point.high is not None)
    if low > 0 and high / low > 50:
        return _Scale(low / 1.1, high * 1.1, log=True)
    if low == high:
        room = abs(low) * 0.1 or 1.0
    else:
        room = (high - low) * 0.05
    return _Scale(0.0 if from_zero and 0 <= low < high * 0.3 else low - room, high + room)


def _ticks(scale: _Scale) -> list[float]:
    """Three to seven round numbers inside a scale."""
    if scale.log:
        first, last = math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high))
        stride = max(1, math.ceil((last - first + 1) / 6))
        tens = [10.0**power for power in range(first, last + 1, stride)]
        if len(tens) >= 3:
            return tens
        finer = [digit * 10.0**power for power in range(first - 1, last + 1) for digit in (1, 2, 5)]
        return [value for value in finer if scale.low <= value <= scale.high]
    rough = (scale.high - scale.low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    first = math.ceil(scale.low / step)
    return [round(place * step, 12) for place in range(first, math.floor(scale.high / step) + 1)]


def _iteration_labels(across: _Scale) -> list[Html]:
    """Labels of the horizontal axis; the outer ones are kept inside the chart."""
    found = []
    for value in _ticks(across):
        if value == int(value) and value >= 0:
            place = across.at(value)
            side = "left" if place < 0.06 else "right" if place > 0.94 else "middle"
            found.append(tag("span", f"{int(value):,}", class_=f"x {side}", style=f"left:{100 * place:.2f}%"))
    return found


def _curve(points: list[Point], colour: int, across: _Scale, up: _Scale) -> list[Html]:
    """Band, line and, for few points, dots."""
    places: list[tuple[float, float, float, float] | None] = [
        None if point.mean is None or point.low is None or point.high is None
        else (WIDTH * across.at(point.iteration), _y(up.at(point.mean)), _y(up.at(point.low)), _y(up.at(point.high)))
        for point in points
    ]  # fmt: skip
    shapes = []
    for stretch in _stretches(places):
        if any(low != high for _, _, low, high in stretch):
            there = [f"{_short(x)} {high}" for x, _, _, high in stretch]
            back = [f"{_short(x)} {low}" for x, _, low, _ in reversed(stretch)]
            shapes.append(tag("path", class_=f"band c{colour}", d="M" + "L".join(there + back) + "Z"))
        path = "M" + "L".join(f"{_short(x)} {y}" for x, y, _, _ in stretch)
        shapes.append(tag("path", class_=f"line c{colour}", d=path))
    known = [place for place in places if place is not None]
    if len(known) <= _FEW:
        dots = "".join(f"M{_short(x)} {y}h0" for x, y, _, _ in known)
        shapes.append(tag("path", class_=f"dots c{colour}", d=dots))
    return shapes


def _stretches(
    places: list[tuple[float, float, float, float] | None],
) -> list[list[tuple[float, float, float, float]]]:
    """The parts between gaps."""
    found: list[list[tuple[float, float, float, float]]] = [[]]
    for place in places:
        if place is not None:
            found[-1].append(place)
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _data(drawn: list[tuple[Line, list[Point]]], across: _Scale) -> Html:
    """What page.js shows under the pointer."""
    lines = [
        {
            "label": line.label,
            "colour": line.colour,
            "x": [point.iteration for point in points],
            "y": [None if point.mean is None else float(f"{point.mean:.5g}") for point in points],
        }
        for line, points in drawn
    ]
    return script_json({"low": across.low, "high": across.high, "lines": lines})


def script_json(value: object) -> Html:
    """A JSON for the page's script; no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return joined([Html('<script type="application/json">'), Html(text), Html("</script>")])


def _y(place: float) -> float:
    return float(_short(HEIGHT * (1 - place)))


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

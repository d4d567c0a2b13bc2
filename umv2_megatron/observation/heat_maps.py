"""Heat maps of one number for each layer over the steps of a run, as small PNGs inside the page."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np

from umv2_megatron.observation.charts import number
from umv2_megatron.observation.html import Html, joined, tag
from umv2_megatron.observation.series import Series

COLUMNS = 120
"""At most this many intervals of steps beside each other."""
_LAYERED = re.compile(r"(?P<name>.+)/layer_(?P<layer>\d+)")


def layered(series: dict[str, Series]) -> dict[str, dict[int, Series]]:
    """Of the names ``<name>/layer_000``: name -> layer -> its numbers, in the order of first appearance."""
    found: dict[str, dict[int, Series]] = {}
    for full, numbers in series.items():
        match = _LAYERED.fullmatch(full)
        if match:
            found.setdefault(match["name"], {})[int(match["layer"])] = numbers
    return {name: dict(sorted(layers.items())) for name, layers in found.items()}


def heat_map(title: str, meaning: str, layers: dict[int, Series]) -> Html | None:
    """A row for each layer, a column for each interval of steps; None where there is not one number."""
    grid, first, last = _grid(layers)
    if not np.isfinite(grid).any():
        return None
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    picture = tag("img", src=f"data:image/png;base64,{_png(grid, low, high)}", alt=f"{title} by layer and iteration")
    shown = list(layers)
    stride = max(1, math.ceil(len(shown) / 12))
    labels = [
        tag("span", f"layer {layer}", style=f"top:{100 * (place + 0.5) / len(shown):.2f}%")
        for place, layer in enumerate(shown)
        if place % stride == 0
    ]
    scale = [tag("span", number(low)), tag("i", class_="viridis"), tag("span", number(high))]
    height = min(300, max(24 * len(shown), 60))
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("small", meaning), tag("span", *scale, class_="scale")),
        tag("div", tag("div", *labels, class_="layers"), picture, class_="heat", style=f"height:{height}px"),
        tag("div", tag("span", f"{first:,}"), tag("span", "iteration"), tag("span", f"{last:,}"), class_="steps"),
        class_="map",
    )


def latest_table(found: dict[str, dict[int, Series]], names: dict[str, str]) -> Html:
    """The newest number of every layer: a row for each layer, a column for each of ``names`` (name -> heading)."""
    rows = [tag("tr", tag("th", "layer"), *(tag("th", heading) for heading in names.values()))]
    for layer in sorted({layer for layers in found.values() for layer in layers}):
        cells = []
        for name in names:
            values = found.get(name, {}).get(layer, Series()).values
            known = values[-1] if values else None
            cells.append(tag("td", "-" if known is None else number(known)))
        rows.append(tag("tr", tag("th", str(layer)), *cells))
    return tag("div", tag("table", joined(rows)), class_="wide")


def _grid(layers: dict[int, Series]) -> tuple[np.ndarray, int, int]:
    """[layers, columns] means, nan where there is none; first and last iteration."""
    steps = sorted({step for series in layers.values() for step in series.iterations})
    first, last = (steps[0], steps[-1]) if steps else (0, 0)
    columns = min(COLUMNS, len(steps))
    sums, counts = np.zeros((len(layers), max(1, columns))), np.zeros((len(layers), max(1, columns)))
    width = (last - first + 1) / max(1, columns)
    for row, series in enumerate(layers.values()):
        for step, value in zip(series.iterations, series.values):
            if value is not None:
                column = min(int((step - first) / width), columns - 1)
                sums[row, column] += value
                counts[row, column] += 1
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan), first, last


def _png(grid: np.ndarray, low: float, high: float) -> str:
    """``grid`` in the colours of viridis, one pixel for each cell, gaps transparent; base64."""
    import matplotlib
    from matplotlib import image

    share = (grid - low) / (high - low) if high > low else np.where(np.isnan(grid), np.nan, 0.5)
    colours = matplotlib.colormaps["viridis"](np.ma.masked_invalid(share), bytes=True)
    colours[np.isnan(grid), 3] = 0
    file = io.BytesIO()
    image.imsave(file, colours, format="png")
    return base64.b64encode(file.getvalue()).decode("ascii")

"""How the differences from the baseline change as training goes on, and where they would end.

Over a factor of a few in tokens the difference of two losses, each a constant plus a power of the number of tokens, is
close to a straight line in the logarithm of the tokens: d(n) = d(last) + slope log2(n / last). The slope is what each
doubling of the tokens adds. It is fitted for every seed by itself (least squares), and its interval is that over
seeds: the points of one curve share their weights and their validation text, so that their scatter about the line says
too little of how another run would turn out.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from umv2_megatron.evaluation.ablation.comparison import Results, curve_differences
from umv2_megatron.evaluation.ablation.paired import half_width, shown
from umv2_megatron.evaluation.ablation.plan import Plan

FURTHEST = 10
"""No crossing is told beyond so many times the last iteration of the fit; a line in the logarithm holds over a few."""


@dataclass(frozen=True)
class Line:
    """d(n) = ``last`` + ``slope`` log2(n / ``iteration``), in nats per token."""

    iteration: int
    """Where the fit ends."""
    last: float
    slope: float
    scatter: float
    """Root of the mean squared distance of the points from the line."""


def fit(points: list[tuple[int, float]]) -> Line | None:
    """Least squares through (iteration, difference), all of them finite; None for fewer than three points."""
    if len(points) < 3:
        return None
    end = points[-1][0]
    at = [math.log2(iteration / end) for iteration, _ in points]
    values = [value for _, value in points]
    slope, last = statistics.linear_regression(at, values)
    scatter = math.sqrt(statistics.fmean((value - last - slope * x) ** 2 for x, value in zip(at, values)))
    return Line(end, last, slope, scatter)


def outlook(lines: list[Line]) -> str:
    """Whether the mean line of the seeds is ahead of the baseline (below 0) or behind, and where it is to meet it."""
    last, slope = (statistics.fmean(getattr(line, name) for line in lines) for name in ("last", "slope"))
    of_last, of_slope = (half_width([getattr(line, name) for line in lines]) for name in ("last", "slope"))
    steady = of_slope is not None and abs(slope) <= of_slope
    if of_last is not None and abs(last) <= of_last:
        return "level within the interval" + ("" if steady else "; falls" if slope < 0 else "; rises")
    side = "ahead" if last < 0 else "behind"
    if steady:
        return f"{side}; grows or shrinks, the interval says neither"
    if last * slope >= 0:
        return f"{side}, grows"
    end, doublings = lines[0].iteration, -last / slope
    if doublings > math.log2(FURTHEST):
        return f"{side}, shrinks; level beyond iteration {FURTHEST * end:,}"
    return f"{side}, shrinks; level at iteration {end * 2**doublings:,.0f}"


def trend_table(plan: Plan, results: Results) -> list[str]:
    """Markdown lines: for every run the fit over the iterations of the plan's ``trend``; none without one."""
    if plan.trend is None or plan.baseline not in results:
        return []
    first, end = plan.trend
    rows = [
        [label, *_row(group, results[plan.baseline], first, end)]
        for label, group in results.items()
        if label != plan.baseline
    ]
    head = ["run", "seeds", "at the end of the fit", "per doubling of tokens", "scatter", f"against {plan.baseline}"]
    return [
        f"Trend: a straight line through the differences from {plan.baseline} over the logarithm of the iterations "
        f"{first:,} to {end:,}, one for each seed. What the last column says of later iterations is a guess.",
        "",
        *("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]),
        "",
    ]


def _row(group: list[dict[str, Any]], baseline: list[dict[str, Any]], first: int, end: int) -> list[str]:
    seeds = [
        [(iteration, value) for iteration, value in points if first <= iteration <= end]
        for points in curve_differences(group, baseline)
    ]
    if any(not math.isfinite(value) for points in seeds for _, value in points):
        return [str(len(seeds)), "-", "-", "-", "diverged"]
    lines = [line for points in seeds if (line := fit(points))]
    if not lines or len(lines) < len(seeds) or len({line.iteration for line in lines}) > 1:
        return [str(len(seeds)), "-", "-", "-", "not validated at the same iterations" if seeds else "no seed of both"]
    return [
        str(len(seeds)),
        shown([line.last for line in lines], 4),
        shown([line.slope for line in lines], 4),
        f"{statistics.fmean(line.scatter for line in lines):.4f}",
        outlook(lines),
    ]

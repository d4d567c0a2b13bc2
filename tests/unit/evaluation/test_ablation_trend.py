"""The straight line through differences from the baseline, and what a report says of where it leads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_plan import plan_of

from umv2_megatron.evaluation.ablation.plan import read_plan
from umv2_megatron.evaluation.ablation.trend import crossing, fit, trend_table

AT = [100, 200, 300, 400, 600, 800]


def curve(line: tuple[float, float], seed: int, base: float = 0.0) -> dict[str, Any]:
    """A trial whose losses are 2 + base + last + slope log2(n / 800), with garbage outside of 200 to 800."""
    last, slope = line
    points = [[n, 2 + base + last + slope * math.log2(n / 800)] for n in AT]
    return {"seed": seed, "curve": [[50, 9.0 + last], *points, [900, 7.0 - last]]}


def test_the_fit_is_least_squares_in_the_logarithm_of_the_iterations() -> None:
    values = [0.3, 0.1, 0.2, -0.1, 0.0, -0.3]
    line = fit(list(zip(AT, values)))
    assert line is not None and line.iteration == 800
    slope, last = np.polyfit(np.log2(np.array(AT) / 800), values, 1)
    assert (line.slope, line.last) == (pytest.approx(slope), pytest.approx(last))
    rest = np.array(values) - np.polyval([slope, last], np.log2(np.array(AT) / 800))
    assert line.scatter == pytest.approx(np.sqrt((rest**2).mean()))


@pytest.mark.parametrize("points", [[], [(1, 0.1), (2, 0.2)], [(1, 0.1), (2, math.inf), (3, 0.1)]])
def test_too_few_points_and_divergence_have_no_line(points: list[tuple[int, float]]) -> None:
    assert fit(points) is None


@pytest.mark.parametrize(
    ("last", "slope", "told"),
    [
        (0.02, -0.01, "overtakes at 400"),  # two doublings after 100
        (-0.02, 0.02, "falls behind at 200"),
        (0.02, 0.01, "moves away"),
        (-0.02, -0.01, "moves away"),
        (0.5, -0.01, "beyond 1,000"),
        (-0.02, 0.0, "stays"),
    ],
)
def test_where_a_line_meets_the_baseline(last: float, slope: float, told: str) -> None:
    assert crossing(last, slope, 100) == told


def test_the_table_fits_each_seed_and_gives_the_interval_over_them(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trend=[100, 800])
    dense = [curve((0, 0), seed, base=seed) for seed in (1, 2)]  # a seed's own level is in both of a pair
    umv2 = [curve((0.04, -0.02), 1, base=1), curve((0.06, -0.04), 2, base=2), curve((5.0, 5.0), 3)]
    text = "\n".join(trend_table(plan, {"dense": dense, "umv2": umv2}))
    # means of 0.04 and 0.06, -0.02 and -0.04; t(1) sd / sqrt(2) = 12.706 * 0.01; 800 * 2 ** (0.05 / 0.03)
    assert "| umv2 | 2 | +0.0500 ± 0.1271 | -0.0300 ± 0.1271 | 0.0000 | overtakes at 2,540 |" in text
    assert "iterations 100 to 800" in text and "| dense |" not in text
    assert "| umv2 | 0 | - | - | - | - |" in trend_table(plan, {"dense": dense, "umv2": umv2[2:]})
    assert trend_table(plan, {"umv2": umv2}) == []
    assert trend_table(plan_of(tmp_path), {"dense": dense, "umv2": umv2}) == []


def test_another_baseline_than_the_plans(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, trend=[100, 800])
    other = read_plan(plan.path, plan.output, baseline="umv2")
    results = {"dense": [curve((0.0, 0.0), 1)], "umv2": [curve((0.04, -0.02), 1)]}
    assert "| dense | 1 | -0.0400 | +0.0200 | 0.0000 | falls behind at 3,200 |" in trend_table(other, results)
    with pytest.raises(ValueError, match="--baseline is moe; expected one of dense, umv2, the runs of"):
        read_plan(plan.path, plan.output, baseline="moe")

"""The straight line through differences from the baseline, and what a report says of where it leads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_plan import CONTENT, plan_of

from umv2_megatron.evaluation.ablation.plan import Plan, read_plan
from umv2_megatron.evaluation.ablation.report import write_report
from umv2_megatron.evaluation.ablation.trend import Line, fit, outlook, trend_table

AT = [100, 200, 300, 400, 600, 800]


def with_trend(folder: Path) -> Plan:
    return plan_of(folder, trend=[100, 800], common={**CONTENT["common"], "train-iters": 900, "eval-interval": 100})


def curve(line: tuple[float, float], seed: int, base: float = 0.0) -> dict[str, Any]:
    """A trial whose losses are 2 + base + last + slope log2(n / 800), with garbage outside of 200 to 800."""
    last, slope = line
    points = [[n, 2 + base + last + slope * math.log2(n / 800)] for n in AT]
    others = {"activated": 1, "parameters": 1, "flops": 1, "tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}
    return {"seed": seed, "curve": [[50, 9.0 + last], *points, [900, 7.0 - last]], **others}


def test_the_fit_is_least_squares_in_the_logarithm_of_the_iterations() -> None:
    values = [0.3, 0.1, 0.2, -0.1, 0.0, -0.3]
    line = fit(list(zip(AT, values)))
    assert line is not None and line.iteration == 800
    slope, last = np.polyfit(np.log2(np.array(AT) / 800), values, 1)
    assert (line.slope, line.last) == (pytest.approx(slope), pytest.approx(last))
    rest = np.array(values) - np.polyval([slope, last], np.log2(np.array(AT) / 800))
    assert line.scatter == pytest.approx(np.sqrt((rest**2).mean()))


@pytest.mark.parametrize("points", [[], [(1, 0.1), (2, 0.2)]])
def test_too_few_points_have_no_line(points: list[tuple[int, float]]) -> None:
    assert fit(points) is None


@pytest.mark.parametrize(
    ("last", "slope", "told"),
    [
        (0.02, -0.01, "behind, shrinks; level at iteration 400"),  # two doublings after 100
        (-0.02, 0.02, "ahead, shrinks; level at iteration 200"),
        (0.02, 0.01, "behind, grows"),
        (-0.02, -0.01, "ahead, grows"),
        (0.5, -0.01, "behind, shrinks; level beyond iteration 1,000"),
    ],
)
def test_where_a_line_meets_the_baseline(last: float, slope: float, told: str) -> None:
    assert outlook([Line(100, last, slope, 0.0)]) == told
    # the means of two seeds that agree but for a little, and of two that do not: 12.706 sd / sqrt(2) = 12.706 * 0.002
    near, far = ([Line(100, last, slope - d, 0.0), Line(100, last, slope + d, 0.0)] for d in (1e-5, 2e-3))
    assert outlook(near) == told
    assert outlook(far).endswith("; grows or shrinks, the interval says neither")
    apart = [[Line(100, last + d, slope + e, 0.0) for d, e in ((-0.5, -each), (0.5, each))] for each in (1e-5, 2e-3)]
    assert [outlook(lines) for lines in apart] == [
        f"level within the interval; {'falls' if slope < 0 else 'rises'}", "level within the interval",
    ]  # fmt: skip


def test_the_table_fits_each_seed_and_gives_the_interval_over_them(tmp_path: Path) -> None:
    plan = with_trend(tmp_path)
    dense = [curve((0, 0), seed, base=seed) for seed in (1, 2)]  # a seed's own level is in both of a pair
    umv2 = [curve((0.04, -0.029), 1, base=1), curve((0.06, -0.031), 2, base=2), curve((5.0, 5.0), 3)]
    text = "\n".join(trend_table(plan, {"dense": dense, "umv2": umv2}))
    # means of 0.04 and 0.06, -0.029 and -0.031; t(1) sd / sqrt(2) = 12.706 * 0.01 and 0.001; 800 * 2 ** (0.05 / 0.03)
    told = "| umv2 | 2 | +0.0500 ± 0.1271 | -0.0300 ± 0.0127 | 0.0000 | level within the interval; falls |"
    assert told in text and "iterations 100 to 800" in text and "| dense |" not in text
    assert "| umv2 | 0 | - | - | - | no seed of both |" in trend_table(plan, {"dense": dense, "umv2": umv2[2:]})
    assert trend_table(plan, {"umv2": umv2}) == []
    assert trend_table(plan_of(tmp_path), {"dense": dense, "umv2": umv2}) == []


def test_a_seed_that_diverged_or_was_validated_otherwise_is_not_left_out(tmp_path: Path) -> None:
    plan = with_trend(tmp_path)
    dense, umv2 = ([curve((last, 0.01), seed) for seed in (1, 2)] for last in (0.0, 0.04))
    umv2[1]["curve"][5][1] = math.inf
    assert "| umv2 | 2 | - | - | - | diverged |" in trend_table(plan, {"dense": dense, "umv2": umv2})
    del umv2[1]["curve"][2:6]
    row = trend_table(plan, {"dense": dense, "umv2": umv2})[-2]
    assert row == "| umv2 | 2 | - | - | - | not validated at the same iterations |"


def test_another_baseline_than_the_plans(tmp_path: Path) -> None:
    plan = with_trend(tmp_path)
    other = read_plan(plan.path, plan.output, baseline="umv2")
    plan.output.mkdir()
    results: dict[str, Any] = {"dense": [curve((0.0, 0.0), 1)], "umv2": [curve((0.04, -0.02), 1)]}
    row = "| dense | 1 | -0.0400 | +0.0200 | 0.0000 | ahead, shrinks; level at iteration 3,200 |"
    report = write_report(other, results)
    text = report.read_text()
    assert row in text and report.name == "report-umv2.md"
    assert "--baseline umv2`" in text and "![differences-umv2](differences-umv2.png)" in text
    assert not (plan.output / "report.md").exists() and (plan.output / "differences-umv2.png").exists()
    with pytest.raises(ValueError, match="--baseline is umv2, of which no trial is finished in .*; expected one of d"):
        write_report(other, {"dense": results["dense"]})
    with pytest.raises(ValueError, match="--baseline is moe; expected one of dense, umv2, the runs of"):
        read_plan(plan.path, plan.output, baseline="moe")
    assert write_report(read_plan(plan.path, plan.output, baseline="dense"), results).name == "report.md"

"""The report of an ablation: means, spreads, differences paired by seed, and plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from small_plan import plan_of

from umv2_megatron.evaluation.ablation.comparison import mean_difference
from umv2_megatron.evaluation.ablation.paired import t_point
from umv2_megatron.evaluation.ablation.report import spread, write_report


def result(curve: list[list[float]], seed: int = 1, **changes: Any) -> dict[str, Any]:
    sizes = {
        "seed": seed,
        "activated": 10**6,
        "parameters": 2 * 10**6,
        "flops": 10**6,
        "tokens": 640,
        "seconds": 3600.0,
    }
    return {"curve": curve, "tokens_per_second": 100.0, **sizes, **changes}


def test_report_has_means_spreads_differences_and_plots(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan.output.mkdir()
    results = {
        "dense": [result([[1, 5.0], [2, 4.0], [3, 3.0]]), result([[1, 5.0], [2, 4.2], [3, 3.2]], seed=2)],
        "umv2": [
            result([[1, 5.5], [2, 4.0], [3, 2.9], [4, 1.0]], evaluation={"tasks": [task(0.5)]}),
            result([[1, 5.5], [2, 4.0], [3, 2.7]], seed=2, evaluation={"tasks": [task(0.25)]}),
        ],
    }
    # only iterations that every seed has count
    assert mean_difference(results["umv2"], results["dense"]) == [
        (1, pytest.approx(0.5)), (2, pytest.approx(-0.1)), (3, pytest.approx(-0.3)),
    ]  # fmt: skip
    text = write_report(plan, results).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| umv2"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0:2] == ["umv2", "2"] and cells[6:8] == ["-0.3000 ± 2.5412 at iteration 3", "2"]
    assert "| facts | trained | seen 4x | 37.5 (25.0 to 50.0) |" in text and "| task | form | size | umv2 |" in text
    assert "| facts | trained | seen 4x | 1.500 (1.500 to 1.500) |" in text
    assert (plan.output / "facts.png").stat().st_size > 10_000
    assert (plan.output / "losses.png").stat().st_size > 10_000
    assert (plan.output / "differences.png").stat().st_size > 10_000
    assert spread([1.0, 3.0], 1) == "2.0 (1.0 to 3.0)" and spread([2.0], 2) == "2.00"
    json.dumps(results)


def test_the_report_of_unequal_and_of_diverged_runs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan.output.mkdir()
    inf = float("inf")

    def told(dense: dict[str, Any], umv2: dict[str, Any]) -> tuple[str, list[str]]:
        text = write_report(plan, {"dense": [dense], "umv2": [umv2]}).read_text()
        row = next(line for line in text.splitlines() if line.startswith("| umv2"))
        return text, [cell.strip() for cell in row.strip("|").split("|")][5:8]

    text, cells = told(result([[1, 4.0], [2, inf]]), result([[1, 3.0], [2, inf]]))
    assert cells == ["inf", "-", "never"] and ", 640 tokens each, 2.00 hours in all (the last start" in text
    assert told(result([[1, 4.0], [2, inf]]), result([[1, 5.0], [2, 3.0]]))[1] == ["3.0000", "-inf", "2"]
    text, cells = told(result([[1, 4.0], [2, 3.5]]), result([[1, 3.0], [2, 2.0], [3, 1.0]], tokens=960))
    assert cells == ["1.0000", "-1.5000 at iteration 2", "1"] and ", up to 960 tokens each" in text
    assert told(result([[1, 4.0], [2, 3.5]]), result([[1, 3.0], [2, 2.0]]))[1] == ["2.0000", "-1.5000", "1"]


def test_devices_and_bits_per_byte(tmp_path: Path) -> None:
    """Earlier versions recorded neither; bits per byte are of one text, which the results agree on."""
    plan = plan_of(tmp_path)
    plan.output.mkdir()

    def told(*recorded: dict[str, Any]) -> str:
        group = [result([[1, 2.0]], seed, **changes) for seed, changes in enumerate(recorded, 1)]
        return write_report(plan, {"umv2": group}).read_text()

    one = {"devices": ["CPU 1"], "torch": "2.13.0", "bytes_per_token": 4.0}
    text = told(one, one)
    assert "on CPU 1, torch 2.13.0. Mean" in text
    assert "| bits per byte |" in text and f"| {2 / math.log(2) / 4:.4f} (" in text
    text = told(one, {**one, "devices": ["CPU 2"], "bytes_per_token": 3.0})
    assert "on CPU 1 (umv2 seed 1); CPU 2 (umv2 seed 2), torch 2.13.0. Mean" in text and "bits per byte" not in text
    assert "on a device that was not recorded. Mean" in told({}, {})


def test_a_baseline_without_a_finished_trial_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan.output.mkdir()
    both = {"dense": [result([[1, 5.0]])], "umv2": [result([[1, 4.0]])]}
    sentence = "No trial of the baseline dense is finished: no differences."
    assert sentence in write_report(plan, {"umv2": both["umv2"]}).read_text()
    assert sentence not in write_report(plan, both).read_text()


def test_tasks_of_different_difficulty_are_not_averaged(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan.output.mkdir()
    needle = {"task": "needle", "form": "trained", "times_seen": None, "context_length": 64}
    scores = [{**needle, "difficulty": d, "exact_match": 1 / d, "answer_nats": None} for d in (1, 4)]
    group = [result([[1, 5.0]], evaluation={"tasks": [*scores, {**task(0.5), "difficulty": None}]})]
    text = write_report(plan, {"umv2": group}).read_text()
    assert "| task | form | size | difficulty | umv2 |\n| --- | --- | --- | --- | --- |" in text
    assert "| needle | trained | 64 | 1 | 100.0 |\n| needle | trained | 64 | 4 | 25.0 |" in text
    assert "| facts | trained | seen 4x | - | 50.0 |" in text
    group[0]["evaluation"]["tasks"].pop(1)
    assert "| needle | trained | 64 | 100.0 |" in write_report(plan, {"umv2": group}).read_text()


def test_numbers_of_items_are_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row each in the table, and a plot against them in the longest context."""
    from matplotlib.axes import Axes

    plan = plan_of(tmp_path)
    plan.output.mkdir()
    icl = {"task": "icl", "form": "symbols", "times_seen": None, "difficulty": 1, "answer_nats": None}
    scores = [
        {**icl, "context_length": length, "items": items, "exact_match": (items or 10) * length / 1280}
        for length in (64, 128)
        for items in (None, 2, 4)
    ]
    lines = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **more: lines.append((x, y)) or plot(self, x, y, **more))
    text = write_report(plan, {"umv2": [result([[1, 5.0]], evaluation={"tasks": scores})]}).read_text()
    assert "| icl | symbols | 64 | 50.0 |\n| icl | symbols | 64, 2 shots | 10.0 |" in text
    assert "![items](items.png)" in text and lines[-2:] == [([64, 128], [50, 100]), ([2, 4], [20, 40])]


def test_runs_are_compared_over_the_seeds_that_both_have() -> None:
    dense = [result([[1, 5.0]]), result([[1, 3.0]], seed=2)]
    assert mean_difference([result([[1, 2.5]], seed=2)], dense) == [(1, -0.5)]
    assert mean_difference([result([[1, 2.5]], seed=3)], dense) == []


def test_differences_of_tasks_are_paired_by_seed(tmp_path: Path) -> None:
    """A third seed that one run lacks does not count; context tasks are plotted."""
    plan = plan_of(tmp_path)
    plan.output.mkdir()
    needle = {"task": "needle", "form": "trained", "times_seen": None, "context_length": 64, "answer_nats": None}

    def group(scores: list[float]) -> list[dict[str, Any]]:
        made = [{"tasks": [{**needle, "exact_match": score}]} for score in scores]
        return [result([[1, 2.0]], seed=seed, evaluation=each) for seed, each in enumerate(made)]

    text = write_report(plan, {"dense": group([0.1, 0.5]), "umv2": group([0.2, 0.7, 0.9])}).read_text()
    assert "| needle | trained | 64 | 30.0 (10.0 to 50.0) | 60.0 (20.0 to 90.0) |" in text
    # 10 and 20 points: mean 15, t(1) sd / sqrt(2) = 12.706 * 7.071 / 1.414
    assert "The same minus that of dense:" in text and "| needle | trained | 64 | +15.0 ± 63.5 |" in text
    assert (plan.output / "contexts.png").stat().st_size > 10_000


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 10, 30])
def test_the_point_of_students_t_leaves_2_5_percent_above(degrees: int) -> None:
    """By integrating the density from 0; Simpson's rule."""
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)

    def density(x: float) -> float:
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    steps = 2000
    width = t_point(degrees) / steps
    inner = sum((4 if number % 2 else 2) * density(number * width) for number in range(1, steps))
    area = (density(0) + inner + density(steps * width)) * width / 3
    assert area == pytest.approx(0.475, abs=1e-4)


def task(score: float) -> dict[str, Any]:
    kind = {"task": "facts", "form": "trained", "times_seen": 4, "context_length": None}
    return {**kind, "exact_match": score, "answer_nats": 1.5}

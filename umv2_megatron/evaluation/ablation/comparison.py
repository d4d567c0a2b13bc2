"""Results of finished trials, brought together for comparison: curves over shared seeds, and scores of tasks.

Runs are compared over the seeds that both have finished, so that a report on an unfinished plan does not take one
seed's luck for a run's merit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Results = dict[str, list[dict[str, Any]]]
"""By run, what ``result.json`` holds of each finished seed."""


def shared_seeds(
    group: list[dict[str, Any]], baseline: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those results of both whose seed the other has, too."""
    seeds = {result["seed"] for result in group} & {result["seed"] for result in baseline}
    chosen = [[result for result in results if result["seed"] in seeds] for results in (group, baseline)]
    return chosen[0], chosen[1]


def mean_curve(group: list[dict[str, Any]]) -> list[tuple[int, list[float]]]:
    """(iteration, losses of all seeds) wherever every seed was evaluated."""
    curves = [dict(map(tuple, result["curve"])) for result in group]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(iteration, [curve[iteration] for curve in curves]) for iteration in shared]


def mean_difference(group: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(iteration, mean loss of ``group`` minus mean loss of ``baseline``), over the seeds that both have."""
    group, baseline = shared_seeds(group, baseline)
    if not group:
        return []
    other = {iteration: sum(losses) / len(losses) for iteration, losses in mean_curve(baseline)}
    return [
        (iteration, sum(losses) / len(losses) - other[iteration])
        for iteration, losses in mean_curve(group)
        if iteration in other
    ]


def curve_differences(group: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[list[tuple[int, float]]]:
    """(iteration, loss of ``group`` minus loss of ``baseline``) where both were evaluated, for each shared seed."""
    theirs = {result["seed"]: dict(map(tuple, result["curve"])) for result in baseline}
    return [
        [(at, loss - theirs[result["seed"]][at]) for at, loss in result["curve"] if at in theirs[result["seed"]]]
        for result in group
        if result["seed"] in theirs
    ]


def seed_differences(group: list[dict[str, Any]], baseline: list[dict[str, Any]], iteration: int) -> list[float]:
    """Loss of ``group`` minus loss of ``baseline`` at an iteration, of each seed that both have."""
    return [dict(points)[iteration] for points in curve_differences(group, baseline)]


def task_results(results: Results) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(run, seed, one task's result) for everything that was evaluated."""
    for label, group in results.items():
        for result in group:
            for task in result.get("evaluation", {}).get("tasks", []):
                yield label, result["seed"], task

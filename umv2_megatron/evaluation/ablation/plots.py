"""The plots of an ablation's report: losses, differences from the baseline, scores of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from umv2_megatron.evaluation.ablation.comparison import (
    Results,
    mean_curve,
    mean_difference,
    seed_differences,
    task_results,
)
from umv2_megatron.evaluation.ablation.plan import Plan
from umv2_megatron.evaluation.curves import COLOURS, styles
from umv2_megatron.evaluation.tasks.context_tasks import COUNTED


def plot_losses(plan: Plan, results: Results) -> Path:
    """Mean validation loss of every run, with the range of its seeds."""
    figure, axes = _figure()
    for style, (label, group) in zip(styles(), results.items()):
        curve = mean_curve(group)
        if curve:
            iterations = [iteration for iteration, _ in curve]
            axes.plot(iterations, [sum(v) / len(v) for _, v in curve], **style, markersize=3, label=label)
            _band(axes, iterations, [v for _, v in curve], style)
    axes.set(xlabel="iteration", ylabel="validation loss (nats per token)", title=plan.path.stem)
    return _save(figure, axes, plan.output / "losses.png")


def plot_differences(plan: Plan, results: Results, file: str) -> Path:
    """Mean difference of every run from the baseline, paired by seed, with the range of its seeds."""
    assert plan.baseline is not None
    figure, axes = _figure()
    for style, (label, group) in zip(styles(), results.items()):
        difference = mean_difference(group, results[plan.baseline])
        if label != plan.baseline and difference:
            axes.plot(*zip(*difference), **style, markersize=3, label=f"{label} minus {plan.baseline}")
            iterations = [iteration for iteration, _ in difference]
            seeds = [seed_differences(group, results[plan.baseline], iteration) for iteration in iterations]
            _band(axes, iterations, seeds, style)
    axes.axhline(0, color="#57606a", linewidth=1)
    axes.set(xlabel="iteration", ylabel="difference (nats per token)", title=f"{plan.path.stem}: below 0 is better")
    return _save(figure, axes, plan.output / file)


def plot_facts(plan: Plan, results: Results) -> list[Path]:
    """Score and loss of answers against the times that a fact was seen, means over seeds: a row per form."""
    found = [(label, task) for label, _, task in task_results(results) if task.get("times_seen") is not None]
    forms = list(dict.fromkeys(task["form"] for _, task in found))
    if not forms:
        return []
    figure, axes = _figure(len(forms), 2)
    for form, row in zip(forms, axes):
        for name, factor, what, place in (
            ("exact_match", 100, "exact match (%)", row[0]),
            ("answer_nats", 1, "loss of the answer (nats)", row[1]),
        ):
            for style, label in zip(styles(), results):
                points: dict[int, list[float]] = {}
                for owner, task in found:
                    if owner == label and task["form"] == form and task.get(name) is not None:
                        points.setdefault(task["times_seen"], []).append(factor * task[name])
                if points:
                    at = sorted(points)
                    heights = [sum(points[x]) / len(points[x]) for x in at]
                    place.plot(at, heights, **style, markersize=3, label=label)
                    _band(place, at, [points[x] for x in at], style)
            ticks = sorted({task["times_seen"] for _, task in found})
            place.set_xscale("symlog", base=2, linthresh=1)
            place.set_xticks(ticks, [str(tick) for tick in ticks])
            place.set_xlim(-0.3, 1.15 * max(ticks[-1], 1))
            place.minorticks_off()
            place.set(xlabel="times a fact stands in the training documents", ylabel=what, title=f"facts, {form} form")
            if name == "exact_match":
                place.set_ylim(-3, 103)
    return [_save(figure, axes, plan.output / "facts.png")]


def plot_contexts(plan: Plan, results: Results, axis: str, file: str) -> list[Path]:
    """Exact match of context tasks against the length of the context or the number of items ("items") in the longest,
    means over seeds: a panel for each task and form, of its lowest difficulty."""
    asked = [(label, task) for label, _, task in task_results(results) if task.get("times_seen") is None]
    found = [(label, task) for label, task in asked if (task.get("items") is not None) == (axis == "items")]
    panels = sorted({(task["task"], task["form"]) for _, task in found})
    if not panels:
        return []
    columns = min(3, len(panels))
    figure, axes = _figure(-(-len(panels) // columns), columns)
    places = list(axes.flat) if hasattr(axes, "flat") else [axes]
    for place in places[len(panels) :]:
        place.set_axis_off()
    for (name, form), place in zip(panels, places):
        shown_here = [(label, task) for label, task in found if (task["task"], task["form"]) == (name, form)]
        easiest = min(task.get("difficulty") or 0 for _, task in shown_here)
        longest = max(task["context_length"] for _, task in shown_here)
        if axis == "items":
            shown_here = [(label, task) for label, task in shown_here if task["context_length"] == longest]
        for style, label in zip(styles(), results):
            points: dict[int, list[float]] = {}
            for owner, task in shown_here:
                if owner == label and (task.get("difficulty") or 0) == easiest:
                    points.setdefault(task[axis], []).append(100 * task["exact_match"])
            if points:
                at = sorted(points)
                place.plot(at, [sum(points[x]) / len(points[x]) for x in at], **style, markersize=3, label=label)
                _band(place, at, [points[x] for x in at], style)
        what = f"{COUNTED[name]} in a context of {longest} tokens" if axis == "items" else "tokens of context"
        place.set(xlabel=what, ylabel="exact match (%)", title=f"{name}, {form}", ylim=(-3, 103))
    return [_save(figure, axes, plan.output / file)]


def _band(place: Any, at: list[int], seeds: list[list[float]], style: dict[str, str]) -> None:
    """From the lowest to the highest seed at each place."""
    lowest, highest = [min(values) for values in seeds], [max(values) for values in seeds]
    place.fill_between(at, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def _figure(rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure, and its one axes or an array [rows, columns] of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (8, 4.5) if rows == columns == 1 else (5.5 * columns, 3.6 * rows)
    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=rows == columns == 1)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    lines: dict[str, Any] = {}
    for place in getattr(axes, "flat", [axes]):
        place.grid(alpha=0.25)
        handles, labels = place.get_legend_handles_labels()
        lines.update(zip(labels, handles))
    if len(lines) > len(COLOURS):  # it would hide them
        figure.set_figwidth(figure.get_figwidth() + 2.5)
        figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside right center", handlelength=4)
    else:
        for place in getattr(axes, "flat", [axes]):
            if place.get_legend_handles_labels()[0]:
                place.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path

"""The report of an ablation: means, spreads and paired differences over seeds, as Markdown and plots.

Runs are compared over the seeds that both have finished, so that a report on an unfinished plan does not take one
seed's luck for a run's merit.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from umv2_megatron.evaluation.ablation.paired import shown
from umv2_megatron.evaluation.ablation.plan import Plan
from umv2_megatron.evaluation.curves import COLOURS, styles
from umv2_megatron.evaluation.report import size_of
from umv2_megatron.evaluation.tasks.context_tasks import COUNTED

Results = dict[str, list[dict[str, Any]]]


def write_report(plan: Plan, results: Results, bytes_per_token: float | None) -> Path:
    """Write ``report.md`` with ``losses.png`` (and ``differences.png`` with a baseline) into the plan's output.

    ``bytes_per_token``: of the validation text, for bits per byte; None leaves them out. Returns the report's path.
    """
    plots = [_plot_losses(plan, results)]
    if plan.baseline in results and len(results) > 1:
        plots.append(_plot_differences(plan, results))
    plots += _plot_facts(plan, results)
    plots += _plot_contexts(plan, results, "context_length", "contexts.png") + _plot_contexts(
        plan, results, "items", "items.png"
    )
    done = sum(map(len, results.values()))
    counts = {r["tokens"] for group in results.values() for r in group}
    tokens = ("up to " if len(counts) > 1 else "") + f"{max(counts, default=0):,}"
    hours = sum(r["seconds"] for group in results.values() for r in group) / 3600
    lines = [
        f"# {plan.path.stem}",
        "",
        f"{done} of {len(plan.trials)} trials are done, {tokens} tokens each, {hours:.2f} hours in all (the last start "
        f"of a resumed trial counts alone), on {_machine()}. Mean over seeds, in brackets lowest to highest. "
        "Differences: mean over the seeds that both runs have, ± half of its 95% confidence interval (Student's t). "
        "Loss: nats per token on the validation set.",
        "",
        *_main_table(plan, results, bytes_per_token),
        "",
        *_task_tables(results, plan.baseline),
        *(f"![{plot.stem}]({plot.name})\n" for plot in plots),
        "How it was made: " + f"`python tools/ablate.py {plan.path}`.",
        "",
    ]
    report = plan.output / "report.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    return report


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{device}, torch {torch.__version__}"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """ "mean (lowest to highest)", or the one value."""
    mean = f"{sum(values) / len(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def _main_table(plan: Plan, results: Results, bytes_per_token: float | None) -> list[str]:
    head = ["run", "seeds", "activated", "total", "forward MFLOP/token", "validation loss"]
    if bytes_per_token:
        head.append("bits per byte")
    if plan.baseline in results:
        head += [f"minus {plan.baseline}", f"not above {plan.baseline} from iteration"]
    rows = [head + ["tokens/s"], ["---"] * (len(head) + 1)]
    for label, group in results.items():
        final = [result["curve"][-1][1] for result in group if result["curve"]]
        row = [
            label,
            str(len(group)),
            f"{group[0]['activated'] / 1e6:.2f}M",
            f"{group[0]['parameters'] / 1e6:.2f}M",
            f"{group[0]['flops'] / 1e6:.2f}",
            spread(final) if final else "-",
        ]
        if bytes_per_token:
            row.append(spread([loss / math.log(2) / bytes_per_token for loss in final]) if final else "-")
        if plan.baseline in results:
            row += _against(group, results[plan.baseline])
        speeds = [result["tokens_per_second"] for result in group if result["tokens_per_second"]]
        rows.append([*row, spread(speeds, 0) if speeds else "-"])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _against(group: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[str]:
    """The last difference of the mean curves, and the iteration from which on it is never above zero.

    The difference tells its iteration where that is not the last of every run, whose losses stand beside it. It is "-"
    where both diverged.
    """
    difference = mean_difference(group, baseline)
    if group is baseline or not difference:
        return ["-", "-"]
    behind = [iteration for iteration, value in difference if not value <= 0]  # nan included
    later = [iteration for iteration, _ in difference if not behind or iteration > behind[-1]]
    last, _ = difference[-1]
    ends = {result["curve"][-1][0] for result in [*group, *baseline] if result["curve"]}
    told = shown(seed_differences(group, baseline, last), 4)
    if told != "-" and ends != {last}:
        told += f" at iteration {last}"
    return [told, str(later[0]) if later else "never"]


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


def seed_differences(group: list[dict[str, Any]], baseline: list[dict[str, Any]], iteration: int) -> list[float]:
    """Loss of ``group`` minus loss of ``baseline`` at an iteration, of each seed that both have."""
    ours, theirs = (
        {result["seed"]: dict(map(tuple, result["curve"]))[iteration] for result in results}
        for results in shared_seeds(group, baseline)
    )
    return [ours[seed] - theirs[seed] for seed in ours]


def _task_tables(results: Results, baseline: str | None) -> list[str]:
    """Exact match and the answer's loss in every task, by form and size (context length, or times a fact was seen).

    Where there is more than one difficulty, by difficulty, too. With a ``baseline`` the differences from it follow.
    """
    lines = []
    several = len({task.get("difficulty") for _, _, task in _tasks(results)} - {None}) > 1
    head = ["task", "form", "size", *(["difficulty"] if several else [])]
    for name, factor, digits, title in (
        ("exact_match", 100, 1, "Exact match in percent:"),
        ("answer_nats", 1, 3, "Loss of the right answer, in nats for the whole answer:"),
    ):
        # task, form, ... -> run -> seed -> score
        scores: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
        for label, seed, task in _tasks(results):
            if task.get(name) is not None:
                difficulty = [str(task.get("difficulty") or "-")] if several else []
                place = scores.setdefault((task["task"], task["form"], size_of(task), *difficulty), {})
                place.setdefault(label, {})[seed] = factor * task[name]
        if not scores:
            continue
        labels = [label for label in results if any(label in by_label for by_label in scores.values())]
        rows = [[*head, *labels], ["---"] * (len(head) + len(labels))]
        for key, by_label in scores.items():
            told = [spread([*by_label[label].values()], digits) if label in by_label else "-" for label in labels]
            rows.append([*key, *told])
        lines += [title, "", *("| " + " | ".join(row) + " |" for row in rows), ""]
        others = [label for label in labels if label != baseline]
        if baseline in labels and others:
            rows = [[*head, *others], ["---"] * (len(head) + len(others))]
            for key, by_label in scores.items():
                rows.append([*key, *(shown(_paired(by_label, label, baseline), digits) for label in others)])
            lines += [f"The same minus that of {baseline}:", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    return lines


def _paired(by_label: dict[str, dict[int, float]], label: str, baseline: str) -> list[float]:
    other = by_label.get(baseline, {})
    return [score - other[seed] for seed, score in by_label.get(label, {}).items() if seed in other]


def _tasks(results: Results) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(run, seed, one task's result) for everything that was evaluated."""
    for label, group in results.items():
        for result in group:
            for task in result.get("evaluation", {}).get("tasks", []):
                yield label, result["seed"], task


def _plot_losses(plan: Plan, results: Results) -> Path:
    figure, axes = _figure()
    for style, (label, group) in zip(styles(), results.items()):
        curve = mean_curve(group)
        if curve:
            iterations = [iteration for iteration, _ in curve]
            axes.plot(iterations, [sum(v) / len(v) for _, v in curve], **style, markersize=3, label=label)
            lowest, highest = zip(*((min(v), max(v)) for _, v in curve))
            axes.fill_between(iterations, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="iteration", ylabel="validation loss (nats per token)", title=plan.path.stem)
    return _save(figure, axes, plan.output / "losses.png")


def _plot_differences(plan: Plan, results: Results) -> Path:
    assert plan.baseline is not None
    figure, axes = _figure()
    for style, (label, group) in zip(styles(), results.items()):
        difference = mean_difference(group, results[plan.baseline])
        if label != plan.baseline and difference:
            axes.plot(*zip(*difference), **style, markersize=3, label=f"{label} minus {plan.baseline}")
    axes.axhline(0, color="#57606a", linewidth=1)
    axes.set(xlabel="iteration", ylabel="difference (nats per token)", title=f"{plan.path.stem}: below 0 is better")
    return _save(figure, axes, plan.output / "differences.png")


def _plot_facts(plan: Plan, results: Results) -> list[Path]:
    """Score and loss of answers against the times that a fact was seen, means over seeds: a row per form."""
    found = [(label, task) for label, _, task in _tasks(results) if task.get("times_seen") is not None]
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
            ticks = sorted({task["times_seen"] for _, task in found})
            place.set_xscale("symlog", base=2, linthresh=1)
            place.set_xticks(ticks, [str(tick) for tick in ticks])
            place.set_xlim(-0.3, 1.15 * max(ticks[-1], 1))
            place.minorticks_off()
            place.set(xlabel="times a fact stands in the training documents", ylabel=what, title=f"facts, {form} form")
    return [_save(figure, axes, plan.output / "facts.png")]


def _plot_contexts(plan: Plan, results: Results, axis: str, file: str) -> list[Path]:
    """Exact match of context tasks against the length of the context or the number of items ("items") in the longest,
    means over seeds: a panel for each task and form, of its lowest difficulty."""
    asked = [(label, task) for label, _, task in _tasks(results) if task.get("times_seen") is None]
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
                lowest, highest = zip(*((min(points[x]), max(points[x])) for x in at))
                place.fill_between(at, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)
        what = f"{COUNTED[name]} in a context of {longest} tokens" if axis == "items" else "tokens of context"
        place.set(xlabel=what, ylabel="exact match (%)", title=f"{name}, {form}", ylim=(-3, 103))
    return [_save(figure, axes, plan.output / file)]


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

"""What an evaluation leaves: a table for the terminal, JSON, and two plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from umv2_megatron.evaluation.curves import COLOURS
from umv2_megatron.evaluation.tasks.context_tasks import COUNTED

FORMAT = 1
ASKED = ("task", "form", "context_length", "difficulty", "items", "times_seen")
"""What tells the results of one report apart."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns under ``head``; all columns but the first are flush right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def text_table(results: Sequence[dict[str, Any]]) -> str:
    """Loss, perplexity and bits per byte of each text."""
    rows = [
        (
            result["source"],
            result["form"],
            str(result["context"]),
            str(result["tokens"]),
            f"{result['loss']:.4f}",
            _number(result["loss_se"], 4),
            f"{result['perplexity']:.3f}",
            _number(result["bits_per_byte"], 4),
        )
        for result in results
    ]
    return table(("text", "form", "context", "tokens", "loss", "+-", "perplexity", "bits/byte"), rows)


def task_table(results: Sequence[dict[str, Any]]) -> str:
    """Scores of each task with their standard errors and chance levels, in percent; nats per answer."""
    rows = []
    for result in results:
        exact = _percent(result, "exact_match")
        choice = _percent(result, "choice_accuracy")
        nats = (_number(result["answer_nats"], 2), _number(result["answer_nats_se"], 2))
        rows.append(
            (result["task"], result["form"], size_of(result), str(result["difficulty"] or "-"), str(result["examples"]))
            + (*exact, *choice, *nats)
        )
    head = ("task", "form", "context", "difficulty", "n", "exact %", "+-", "chance", "choice %", "+-", "chance")
    return table((*head, "nats", "+-"), rows)


def size_of(result: dict[str, Any]) -> str:
    """The tokens of a task's context, with its items where their number was asked for, or how often facts were seen."""
    if result.get("times_seen") is not None:
        return f"seen {result['times_seen']}x"
    items = result.get("items")  # None: as many as fit; earlier versions did not write it
    return str(result["context_length"]) + (f", {items} {COUNTED[result['task']]}" if items is not None else "")


def over_seeds(reports: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The task results of several seeds of one model as those of one: mean scores of what every one was asked, with the
    lowest and the highest under ``exact_match_range`` and ``choice_accuracy_range``."""
    if len(reports) == 1:
        return list(reports[0])
    by_question = [{tuple(result.get(name) for name in ASKED): result for result in report} for report in reports]
    merged = []
    for question, result in by_question[0].items():
        seeds = [report[question] for report in by_question if question in report]
        if len(seeds) < len(reports):
            continue
        scores: dict[str, Any] = {}
        for score in ("exact_match", "choice_accuracy"):
            known = [each[score] for each in seeds if each[score] is not None]
            scores[score] = sum(known) / len(known) if known else None
            scores[score + "_range"] = (min(known), max(known)) if known else None
        merged.append({**result, **scores})
    return merged


def _percent(result: dict[str, Any], name: str) -> tuple[str, ...]:
    return tuple(_number(result[name + end], 1, 100) for end in ("", "_se", "_chance"))


def _number(value: float | None, digits: int, times: float = 1) -> str:
    return "-" if value is None else f"{times * value:.{digits}f}"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write ``report`` under a temporary name first, so that a file that is there is whole."""
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(json.dumps({"format": FORMAT, **report}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def draw(reports: dict[str, Sequence[dict[str, Any]]], output: Path) -> list[Path]:
    """Plots of task results (label -> results of one model) beside ``output``; returns the files written.

    ``<output>_context.png``: exact match and choice accuracy against context length, a panel per task, where a task
    has several lengths. ``<output>_items.png``: the same against the number of pairs, rounds or shots.
    ``<output>_facts.png``: the same against the number of times a fact was seen.
    """
    everything = [result for results in reports.values() for result in results]
    written = []
    lengths = {r["context_length"] for r in everything if r["context_length"] is not None and r.get("items") is None}
    if len(lengths) > 1:
        written.append(output.with_name(output.name + "_context.png"))
        filled: dict[str, Sequence[dict[str, Any]]] = {
            name: [r for r in results if r.get("items") is None] for name, results in reports.items()
        }
        _panels(filled, "context_length", "context (tokens)", written[-1])
    if any(result.get("items") is not None for result in everything):
        written.append(output.with_name(output.name + "_items.png"))
        _panels(reports, "items", "", written[-1])
    if any(result["times_seen"] is not None for result in everything):
        written.append(output.with_name(output.name + "_facts.png"))
        _panels(reports, "times_seen", "times the fact was seen in training", written[-1])
    return written


def _panels(reports: dict[str, Sequence[dict[str, Any]]], axis: str, label: str, path: Path) -> None:
    """One panel per task and form, and per length against "items"; a line per model and score, with error bars and the
    chance level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_panel: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for name, results in reports.items():
        for result in results:
            if result.get(axis) is not None:
                panel = (result["context_length"] if axis == "items" else 0, result["task"], result["form"])
                by_panel.setdefault(panel, {}).setdefault(name, []).append(result)
    panels = sorted(by_panel, key=lambda panel: panel[0])
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns + 1, 3.4 * rows + 0.7), layout="constrained", squeeze=False
    )
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    colours = dict(zip(reports, cycle(COLOURS)))
    told: dict[str, Any] = {}
    for place, panel in zip(axes.flat, panels):
        length, task, form = panel
        for name, chosen in by_panel[panel].items():
            for difficulty in sorted({r["difficulty"] for r in chosen}):
                of_this = sorted((r for r in chosen if r["difficulty"] == difficulty), key=lambda r: r[axis])
                _lines(place, of_this, axis, colours[name], name)
        if axis == "times_seen":
            place.set_xscale("symlog", base=2, linthresh=1)
        else:
            place.set_xscale("log", base=2)
        ticks = sorted({r[axis] for chosen in by_panel[panel].values() for r in chosen})
        place.set_xticks(ticks, [str(tick) for tick in ticks])
        place.minorticks_off()
        title = f"{task}, {form}"
        if axis == "items":
            label, title = f"{COUNTED[task]} in the context", f"{title}, {length} tokens"
        place.set(xlabel=label, ylabel="score (%)", title=title, ylim=(-3, 103))
        place.grid(alpha=0.25)
        told.update(zip(*reversed(place.get_legend_handles_labels())))
    ncols = 2 * columns
    figure.legend(told.values(), told.keys(), fontsize=8, handlelength=3.5, loc="outside lower center", ncols=ncols)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _reach(result: dict[str, Any], score: str) -> tuple[float, float]:
    """How far an error bar goes down and up: to the lowest and the highest seed, else a standard error."""
    if score + "_range" not in result:
        return (result[score + "_se"] or 0.0,) * 2
    lowest, highest = result[score + "_range"]
    return result[score] - lowest, highest - result[score]


def _lines(place: Any, results: Sequence[dict[str, Any]], axis: str, colour: str, name: str) -> None:
    for score, style in (("exact_match", "-"), ("choice_accuracy", "--")):
        known = [r for r in results if r[score] is not None]
        if not known:
            continue
        at = [r[axis] for r in known]
        heights = [100 * r[score] for r in known]
        errors = [[100 * _reach(r, score)[side] for r in known] for side in (0, 1)]
        what = f"{name}, {score.replace('_', ' ')}" + (
            f", difficulty {known[0]['difficulty']}" if known[0]["difficulty"] not in (None, 1) else ""
        )
        place.errorbar(at, heights, yerr=errors, color=colour, linestyle=style, marker="o", markersize=3, label=what)
        if score == "choice_accuracy" or known[0]["choice_accuracy"] is None:
            chances = [100 * r[score + "_chance"] for r in known]
            place.plot(at, chances, color="#57606a", linestyle=":", linewidth=1, label="chance")

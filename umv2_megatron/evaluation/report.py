"""What an evaluation leaves: a table for the terminal, JSON, and two plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from umv2_megatron.evaluation.curves import COLOURS

FORMAT = 1


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
        size = f"seen {result['times_seen']}x" if result["times_seen"] is not None else str(result["context_length"])
        exact = _percent(result, "exact_match")
        choice = _percent(result, "choice_accuracy")
        nats = (_number(result["answer_nats"], 2), _number(result["answer_nats_se"], 2))
        rows.append(
            (result["task"], result["form"], size, str(result["difficulty"] or "-"), str(result["examples"]))
            + (*exact, *choice, *nats)
        )
    head = ("task", "form", "context", "difficulty", "n", "exact %", "+-", "chance", "choice %", "+-", "chance")
    return table((*head, "nats", "+-"), rows)


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
    has several lengths. ``<output>_facts.png``: the same against the number of times a fact was seen.
    """
    everything = [result for results in reports.values() for result in results]
    written = []
    lengths = {result["context_length"] for result in everything if result["context_length"] is not None}
    if len(lengths) > 1:
        written.append(output.with_name(output.name + "_context.png"))
        _panels(reports, "context_length", "context (tokens)", written[-1])
    if any(result["times_seen"] is not None for result in everything):
        written.append(output.with_name(output.name + "_facts.png"))
        _panels(reports, "times_seen", "times the fact was seen in training", written[-1])
    return written


def _panels(reports: dict[str, Sequence[dict[str, Any]]], axis: str, label: str, path: Path) -> None:
    """One panel per task and form; a line per model and score, with error bars and the chance level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    everything = [result for results in reports.values() for result in results]
    panels = list(dict.fromkeys((r["task"], r["form"]) for r in everything if r[axis] is not None))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns + 1, 3.4 * rows + 0.4), layout="constrained", squeeze=False
    )
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    for place, (task, form) in zip(axes.flat, panels):
        for colour, (name, results) in zip(cycle(COLOURS), reports.items()):
            chosen = [r for r in results if (r["task"], r["form"]) == (task, form) and r[axis] is not None]
            for difficulty in sorted({r["difficulty"] for r in chosen}):
                of_this = sorted((r for r in chosen if r["difficulty"] == difficulty), key=lambda r: r[axis])
                _lines(place, of_this, axis, colour, name)
        if axis == "times_seen":
            place.set_xscale("symlog", base=2, linthresh=1)
        else:
            place.set_xscale("log", base=2)
        ticks = sorted({r[axis] for r in everything if (r["task"], r["form"]) == (task, form)} - {None})
        place.set_xticks(ticks, [str(tick) for tick in ticks])
        place.minorticks_off()
        place.set(xlabel=label, ylabel="score (%)", title=f"{task}, {form}", ylim=(-3, 103))
        place.grid(alpha=0.25)
        place.legend(fontsize=7, handlelength=3.5)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _lines(place: Any, results: Sequence[dict[str, Any]], axis: str, colour: str, name: str) -> None:
    for score, style in (("exact_match", "-"), ("choice_accuracy", "--")):
        known = [r for r in results if r[score] is not None]
        if not known:
            continue
        at = [r[axis] for r in known]
        heights, errors = ([100 * (r[key] or 0) for r in known] for key in (score, score + "_se"))
        what = f"{name}, {score.replace('_', ' ')}" + (
            f", difficulty {known[0]['difficulty']}" if known[0]["difficulty"] not in (None, 1) else ""
        )
        place.errorbar(at, heights, yerr=errors, color=colour, linestyle=style, marker="o", markersize=3, label=what)
        if score == "choice_accuracy":
            place.plot(at, [100 * r[score + "_chance"] for r in known], color="#57606a", linestyle=":", linewidth=1)

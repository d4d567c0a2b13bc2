"""Loss curves of runs from their metrics.jsonl, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

COLOURS = ("#1f6feb", "#d1242f", "#2da44e", "#8250df", "#bf8700", "#0a7e8c", "#6e7781", "#bc4c00")


def styles() -> Iterator[dict[str, str]]:
    """How one run after another is drawn: keyword arguments of ``Axes.plot``, all different for 24 runs."""
    for line, mark in cycle((("-", "o"), ("--", "s"), (":", "^"))):
        for colour in COLOURS:
            yield {"color": colour, "linestyle": line, "marker": mark}


def labelled_paths(flag: str, words: list[str], default: Callable[[Path], str]) -> dict[str, str]:
    """label -> path of each word "[LABEL=]PATH" given to ``flag``; ``default`` makes the label of a path without one.

    Raises ``ValueError`` when two have the same label, of which only one would be drawn.
    """
    paths: dict[str, str] = {}
    for word in words:
        label, separator, path = word.partition("=")
        if not separator:
            label, path = default(Path(word)), word
        if label in paths:
            raise ValueError(
                f"{flag} gives the label {label!r} to {paths[label]} and to {path}; expected a label of its own for "
                f"each; give them as LABEL=PATH"
            )
        paths[label] = path
    return paths


def plot_losses(
    runs: dict[str, list[dict[str, Any]]],
    output: Path,
    *,
    title: str,
    levels: dict[str, float] | None = None,
    marks: list[int] | None = None,
    baseline: str | None = None,
) -> None:
    """Draw training (thin) and validation (dots) loss of each run over iterations.

    Args:
        runs: label -> records of metrics.jsonl ("iteration", "lm loss", "lm loss validation"; a loss of None, which
            was not finite, is a gap).
        output: PNG to write.
        levels: label -> loss, drawn as a dashed line (such as the corpus's unigram entropy).
        marks: iterations to mark, such as interruptions.
        baseline: label of the run that a second panel subtracts from the validation losses of the others.

    Raises ``ValueError`` when ``baseline`` is no label of ``runs``.
    """
    if baseline is not None and baseline not in runs:
        raise ValueError(f"--baseline is {baseline!r}; expected one of {', '.join(runs)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 1 if baseline is None else 2
    figure, panels = pyplot.subplots(
        1, columns, figsize=(8 + 4 * (columns - 1), 4.5), layout="constrained", squeeze=False
    )
    axes = panels[0][0]
    for style, (label, records) in zip(styles(), runs.items()):
        training = _curve(records, "lm loss")
        validation = _curve(records, "lm loss validation")
        if training:
            axes.plot(*zip(*training), **{**style, "marker": ""}, linewidth=1, alpha=0.6, label=f"{label}, training")
        if validation:
            axes.plot(*zip(*validation), **style, markersize=4, label=f"{label}, validation")
    for label, level in (levels or {}).items():
        axes.axhline(level, color="#57606a", linestyle="--", linewidth=1, label=f"{label} ({level:.2f})")
    for index, mark in enumerate(marks or []):
        axes.axvline(mark, color="#bf8700", linestyle=":", label=None if index else "interrupted and resumed")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    if baseline is not None:
        _plot_differences(panels[0][1], runs, baseline)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def _curve(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(iteration, loss) wherever the run has one; nan where it was not finite."""
    return [(r["iteration"], math.nan if r[name] is None else r[name]) for r in records if name in r]


def _plot_differences(axes: Any, runs: dict[str, list[dict[str, Any]]], baseline: str) -> None:
    """Validation loss of each run minus that of ``baseline`` at the same iterations; below zero is better."""
    validation = {label: dict(_curve(records, "lm loss validation")) for label, records in runs.items()}
    for style, (label, losses) in zip(styles(), validation.items()):
        shared = sorted(losses.keys() & validation[baseline].keys())
        if label != baseline and shared:
            differences = [losses[iteration] - validation[baseline][iteration] for iteration in shared]
            axes.plot(shared, differences, **style, markersize=4, label=f"{label} minus {baseline}")
    axes.axhline(0, color="#57606a", linewidth=1)
    axes.set(xlabel="iteration", ylabel="difference (nats per token)", title="validation loss, difference")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)

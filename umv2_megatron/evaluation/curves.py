"""Loss curves of runs from their metrics.jsonl, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#1f6feb", "#d1242f", "#2da44e", "#8250df", "#bf8700")


def plot_losses(
    runs: dict[str, list[dict[str, Any]]],
    output: Path,
    *,
    title: str,
    levels: dict[str, float] | None = None,
    marks: list[int] | None = None,
) -> None:
    """Draw training (thin) and validation (dots) loss of each run over iterations.

    Args:
        runs: label -> records of metrics.jsonl ("iteration", "lm loss", "lm loss validation").
        output: PNG to write.
        levels: label -> loss, drawn as a dashed line (such as the corpus's unigram entropy).
        marks: iterations to mark, such as interruptions.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for colour, (label, records) in zip(COLOURS, runs.items()):
        training = [(record["iteration"], record["lm loss"]) for record in records if "lm loss" in record]
        validation = [(r["iteration"], r["lm loss validation"]) for r in records if "lm loss validation" in r]
        if training:
            axes.plot(*zip(*training), color=colour, linewidth=1, alpha=0.6, label=f"{label}, training")
        if validation:
            axes.plot(*zip(*validation), "o-", color=colour, markersize=4, label=f"{label}, validation")
    for label, level in (levels or {}).items():
        axes.axhline(level, color="#57606a", linestyle="--", linewidth=1, label=f"{label} ({level:.2f})")
    for index, mark in enumerate(marks or []):
        axes.axvline(mark, color="#bf8700", linestyle=":", label=None if index else "interrupted and resumed")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)

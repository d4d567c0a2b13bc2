"""Names of the scores of --eval-tasks in metrics.jsonl: ``lm-eval/<task>/<metric>``.

A metric is written as lm-eval does, ``acc``, with a point before the filter of its answers if it has one,
``exact_match.strict-match``; its standard error is ``acc_stderr``, ``exact_match_stderr.strict-match``.
"""

from __future__ import annotations

PREFIX = "lm-eval/"
_ERROR = "_stderr"


def parts(name: str) -> tuple[str, str] | None:
    """Task and metric of a name; None where it is no score of a task."""
    if not name.startswith(PREFIX):
        return None
    task, slash, metric = name.removeprefix(PREFIX).rpartition("/")
    return (task, metric) if slash else None


def error_of(metric: str) -> str:
    """The standard error's name for a metric's."""
    base, point, chosen = metric.partition(".")
    return f"{base}{_ERROR}{point}{chosen}"


def is_error(metric: str) -> bool:
    """Whether it is a standard error."""
    return metric.partition(".")[0].endswith(_ERROR)

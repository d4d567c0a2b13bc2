"""The page of a run: one self-contained HTML file of bounded size, readable on a phone, light and dark.

    what the run is doing -> curves -> memory layers -> what happened -> blends -> checkpoints -> configuration

Everything that comes from the run's files goes through ``html.tag``, which escapes it.
"""

from __future__ import annotations

import datetime
from importlib import resources
from typing import Any

from umv2_megatron.observation import task_names
from umv2_megatron.observation.charts import Line, Mark, chart, number
from umv2_megatron.observation.heat_maps import heat_map, latest_table, layered
from umv2_megatron.observation.html import Html, joined, tag
from umv2_megatron.observation.run_files import RunFiles
from umv2_megatron.observation.series import Series

MOST_EVENTS, MOST_CHECKPOINTS, MOST_CHANGES, MOST_MAPS, MOST_SCORES = 100, 50, 200, 20, 24
_LONGEST = 2000
"""Characters of one text from the run."""

# name in metrics.jsonl -> title, meaning; in this order. Others follow under their own names.
_HEALTH = {
    "memory/value_coverage": ("rows used", "share of the layer's rows since the last record"),
    "memory/dead_rows": ("dead rows", "rows not picked since the last record"),
    "memory/value_kl_uniform": ("unevenness", "KL divergence of the picks from even use, nats; 0 is even"),
    "memory/output_std": ("output", "standard deviation of the layer's output"),
    "memory/score_top1_mean": ("best score", "mean"),
    "memory/score_topk_mean": ("score of all picks", "mean"),
    "memory/tucker_sigma1": ("sigma 1", "first singular value of the cores"),
    "memory/tucker_sigma2": ("sigma 2", "second singular value of the cores"),
    "memory/row_skew": ("row skew", "picks of the busiest rank over those of an average one"),
}
_NGRAMS = "engram/"
"""Begins the names of n-gram layers beside others."""


def page(run: RunFiles, title: str) -> str:
    """The page as text."""
    sections = [
        _header(run, title),
        _curves(run),
        _tasks(run),
        _memory(run),
        _happened(run),
        _blends(run),
        _checkpoints(run),
        _configuration(run),
    ]
    style, script = (resources.files(__package__).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    ]
    made = _moment(run.read)
    foot = tag("footer", f"Read {made} from {run.directory.resolve()}, written by umv2_megatron's report.py.")
    body = tag("body", tag("main", joined([each for each in sections if each]), foot), tag("script", Html(script)))
    return "<!doctype html>\n" + tag("html", tag("head", *head), body, lang="en") + "\n"


# -- what it is doing --------------------------------------------------------------------------------------------------


def _header(run: RunFiles, title: str) -> Html:
    word, sentence = run.state()
    done, last = run.iteration, run.last_iteration
    facts: list[tuple[str, str | None]] = [
        ("iteration", f"{done:,}" + (f" of {last:,}" if last else "")),
        ("time left", _time_left(run) if word == "running" else None),
        ("loss", _newest(run, "lm loss")),
        ("validation loss", _newest(run, "lm loss validation")),
        ("test loss", _newest(run, "lm loss test")),
        ("tokens/s", _newest_of(_tokens_per_second(run))),
        ("seconds per step", _newest(run, "iteration-time")),
        ("MFU", _percent(run.last("mfu"))),
        ("restarts", str(max(0, len(run.starts) - 1)) if run.starts else None),
    ]
    shown = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts if value is not None]
    share = min(1.0, done / last) if last else 0.0
    bar = tag("div", tag("i", style=f"width:{100 * share:.1f}%"), class_="progress", role="progressbar",
              aria_valuenow=round(100 * share), aria_valuemin=0, aria_valuemax=100)  # fmt: skip
    notes = []
    if not run.events:
        notes.append("There is no events.jsonl: restarts and faults are not known.")
    if run.unreadable:
        notes.append(f"{run.unreadable} lines of metrics.jsonl cannot be read, and are left out.")
    return tag(
        "header",
        tag("h1", title),
        tag("p", tag("b", word, class_=f"state {word}"), f" {_cut(sentence)}"),
        bar if last else None,
        tag("dl", *shown),
        *(tag("p", note, class_="note") for note in notes),
    )


def _time_left(run: RunFiles) -> str | None:
    seconds, last = run.seconds_per_step(), run.last_iteration
    if seconds is None or not last:
        return None
    left = max(0.0, (last - run.iteration) * seconds)
    return f"{duration(left)}, until {_moment(run.read + left)}"


def duration(seconds: float) -> str:
    """``seconds`` in the two largest units: "3 h 12 min"."""
    total = round(seconds)
    units = [(total // 86400, "d"), (total % 86400 // 3600, "h"), (total % 3600 // 60, "min"), (total % 60, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count) or "0 s"


# -- curves ------------------------------------------------------------------------------------------------------------


def _curves(run: RunFiles) -> Html:
    marks = _marks(run)

    def line(label: str, name: str, colour: int = 1) -> Line:
        return Line(label, run.series.get(name, Series()), colour)

    losses = [line("training", "lm loss"), line("validation", "lm loss validation", 2), line("test", "lm loss test", 3)]
    middle = run.iteration // 2
    second = [Line(each.label, each.series.from_iteration(middle), each.colour) for each in losses]
    rates = [line("dense", "learning-rate"), line("tables", "value-learning-rate", 2)]
    charts = [
        chart("loss", "nats per token", losses, marks, from_zero=False),
        chart("loss, second half", "nats per token", second, marks, from_zero=False)
        if len(losses[0].series.values) >= 20 else None,
        *(chart("validation loss by set", "nats per token", lines, marks, from_zero=False) for lines in _by_set(run)),
        chart("learning rates", "per step", rates, marks),
        chart("gradient norm", "before clipping", [line("gradients", "grad-norm")], marks),
        chart("norm of the parameters", "", [line("parameters", "params-norm")], marks),
        chart("throughput", "tokens per second, all ranks", [Line("tokens/s", _tokens_per_second(run), 1)], marks),
        chart("model FLOPs", "TFLOP/s per rank", [line("TFLOP/s", "throughput")], marks),
        chart("model FLOPs utilisation", "share of the device's peak", [line("MFU", "mfu")], marks),
        chart("memory in use", "GiB, the largest so far, last rank", [line("GiB", "memory-gib")], marks),
    ]  # fmt: skip
    shown = [each for each in charts if each is not None]
    kinds = {mark.kind for mark in marks}
    known = [kind for kind in ("restart", "fault", "blend") if kind in kinds]
    told = [tag("span", tag("i", class_=f"key {kind}"), kind) for kind in known]
    return tag(
        "section",
        tag("h2", "Curves"),
        tag("p", "Vertical lines: ", *told, class_="legend") if told else None,
        tag("div", *shown, class_="charts") if shown else tag("p", "No numbers yet.", class_="note"),
    )


def _by_set(run: RunFiles) -> list[list[Line]]:
    """Losses of validation sets with names, as many together as there are colours."""
    prefix, colours = "lm loss validation/", 4
    names = [name for name in run.series if name.startswith(prefix) and not name.endswith(" ppl")][:MOST_SCORES]
    lines = [Line(name.removeprefix(prefix), run.series[name], place % colours + 1) for place, name in enumerate(names)]
    return [lines[first : first + colours] for first in range(0, len(lines), colours)]


def _marks(run: RunFiles) -> list[Mark]:
    """Restarts, faults and changes of the blend, each place once."""
    found = [Mark(_step(event), "restart") for event in run.starts[1:]]
    found += [Mark(_step(event), "fault") for event in run.events if event["event"] in ("fault", "skipped", "rewind")]
    found += [Mark(_step(event), "blend") for event in run.events if event["event"] == "blend"]
    return list(dict.fromkeys(found))[-MOST_EVENTS:]


def _tokens_per_second(run: RunFiles) -> Series:
    """Of all ranks together, from batch, length and time of a step."""
    seconds, batch = run.series.get("iteration-time"), run.series.get("batch-size")
    length = run.config.get("seq_length")
    found = Series()
    if seconds is None or batch is None or not isinstance(length, int):
        return found
    sizes = dict(zip(batch.iterations, batch.values))
    for step, value in zip(seconds.iterations, seconds.values):
        size = sizes.get(step)
        found.add(step, size * length / value if value and size else None)
    return found


# -- tasks -------------------------------------------------------------------------------------------------------------


def _tasks(run: RunFiles) -> Html | None:
    """Scores of --eval-tasks: a curve each, the newest ones as a table."""
    found = {parts: series for name, series in run.series.items() if (parts := task_names.parts(name)) is not None}
    scores = {parts: series for parts, series in found.items() if not task_names.is_error(parts[1]) and series.values}
    if not scores:
        return None
    marks = _marks(run)
    charts = [
        chart(task, metric, [Line(metric, series, 1)], marks, from_zero=False)
        for (task, metric), series in list(scores.items())[:MOST_SCORES]
    ]
    rows = [tag("tr", *(tag("th", head) for head in ("task", "metric", "newest", "standard error", "iteration")))]
    for (task, metric), series in scores.items():
        value, error = series.values[-1], found.get((task, task_names.error_of(metric)))
        spread = error.values[-1] if error is not None and error.values else None
        told = ["not finite" if value is None else number(value), "" if spread is None else number(spread)]
        rows.append(tag("tr", *(tag("td", cell) for cell in (task, metric, *told, f"{series.iterations[-1]:,}"))))
    return tag(
        "section",
        tag("h2", "Tasks"),
        tag("div", *[each for each in charts if each is not None], class_="charts"),
        tag("details", tag("summary", "Newest scores"), tag("div", tag("table", *rows), class_="wide")),
    )


# -- memory layers -----------------------------------------------------------------------------------------------------


def _memory(run: RunFiles) -> Html | None:
    found = layered(run.series)
    first = [name for name in _HEALTH if name in found]
    first += [name for each in _HEALTH if (name := each.replace("memory/", _NGRAMS, 1)) in found]
    known = [*first, *(name for name in found if name not in first)][:MOST_MAPS]
    if not known:
        return None
    maps = []
    for name in known:
        title, meaning = _told(name)
        maps.append(heat_map(title, meaning, found[name]))
    headings = {name: _told(name)[0] for name in known}
    return tag(
        "section",
        tag("h2", "Layers"),
        tag("div", *[each for each in maps if each is not None], class_="charts"),
        tag("details", tag("summary", "Newest numbers of every layer"), latest_table(found, headings)),
    )


def _told(name: str) -> tuple[str, str]:
    """Title and meaning of what metrics.jsonl calls ``name``."""
    if not name.startswith(_NGRAMS):
        return _HEALTH.get(name, (name.removeprefix("memory/"), ""))
    title, meaning = _told(name.replace(_NGRAMS, "memory/", 1))
    return f"{title}, n-grams", meaning


# -- what happened -----------------------------------------------------------------------------------------------------


def _happened(run: RunFiles) -> Html | None:
    told = [event for event in run.events if event["event"] not in ("checkpoint", "tasks")]
    if not told:
        return None
    starts = {id(event): place for place, event in enumerate(run.starts)}
    shown = told[-MOST_EVENTS:]
    faults = {str(event.get("text")) for event in shown if event["event"] == "fault"}
    items = []
    for event in reversed(shown):
        kind, text = _in_words(event, starts.get(id(event), 0), faults)
        items.append(
            tag(
                "li",
                tag("b", kind, class_=f"event {_css(event['event'])}"),
                tag("small", f"{_moment(event.get('time'))}, after iteration {_step(event):,}"),
                tag("p", _cut(text)) if text else None,
            )
        )
    earlier = len(told) - MOST_EVENTS
    return tag(
        "section",
        tag("h2", "Starts, faults, signals"),
        tag("ol", *items, class_="events"),
        tag("p", f"{earlier:,} earlier ones are in events.jsonl.", class_="note") if earlier > 0 else None,
    )


def _in_words(event: dict[str, Any], place: int, faults: set[str]) -> tuple[str, str]:
    """Heading and text of an event; ``place``: which start it is, ``faults``: texts that are shown already."""
    kind = event["event"]
    if kind == "start":
        there = f"{event.get('ranks')} ranks on {event.get('device')} ({event.get('host')})"
        if place == 0 and "reason" not in event:
            return "start", there
        changes = event.get("changes")
        count = len(changes) if isinstance(changes, dict) else 0
        changed = f"; {count} changed setting{'s' * (count > 1)}, see below" if count else ""
        reason = "after the fault told below" if str(event.get("reason")) in faults else event.get("reason")
        return f"restart {place}", f"{reason}; {there}{changed}"
    if kind == "fault":
        return "fault", f"{event.get('text')} (told by rank {event.get('rank')}, exit code {event.get('code')})"
    if kind in ("skipped", "spike", "rewind", "unsaved", "tasks-failed"):
        heading = {
            "skipped": "step skipped",
            "spike": "spike",
            "rewind": "went back to a checkpoint",
            "unsaved": "checkpoint not saved",
            "tasks-failed": "evaluation on tasks failed",
        }
        return heading[kind], str(event.get("text", ""))
    if kind == "blend":
        return "new blend", f"from sample {event.get('from_sample')} on, see below"
    if kind == "stop":
        return "stop", f"asked by {event.get('reason')}"
    if kind == "end":
        return "end", "all iterations are done" if event.get("finished") else "stopped before the last iteration"
    return kind, ""


def _blends(run: RunFiles) -> Html | None:
    """The changes of the training blend; one that was told again, by the start after one that saved nothing, once."""
    told = {str(event.get("from_sample")): event for event in run.events if event["event"] == "blend"}
    if not told:
        return None
    heads = ("from sample", "iteration", "corpus", "samples before", "epochs before", "share before", "share after")
    rows = []
    for sample, event in reversed(told.items()):
        corpora = event.get("corpora")
        for row in corpora if isinstance(corpora, list) else []:
            row = row if isinstance(row, dict) else {}
            pair = row.get("share")
            shares = pair if isinstance(pair, list) and len(pair) == 2 else [None, None]
            cells = [sample, f"{_step(event):,}", row.get("prefix"), row.get("samples"), row.get("epochs"), *shares]
            rows.append(tag("tr", *(tag("td", _value(cell)) for cell in cells)))
    earlier = len(rows) - MOST_CHANGES
    return tag(
        "section",
        tag("h2", "Blend of the training set"),
        tag("div", tag("table", tag("tr", *(tag("th", head) for head in heads)), *rows[:MOST_CHANGES]), class_="wide"),
        tag("p", f"{earlier:,} more lines are in events.jsonl.", class_="note") if earlier > 0 else None,
    )


# -- checkpoints, configuration ----------------------------------------------------------------------------------------


def _checkpoints(run: RunFiles) -> Html | None:
    told = [event for event in run.events if event["event"] == "checkpoint"]
    took = {_step(event): event.get("seconds") for event in told if "kind" not in event}
    others = [event for event in told if "kind" in event]
    if not run.checkpoints and not told:
        return None
    heads = ("iteration", "size", "written", "took")
    rows = [tag("tr", *(tag("th", name) for name in heads))]
    for each in reversed(run.checkpoints[-MOST_CHECKPOINTS:]):
        seconds = took.get(each.iteration)
        shown = f"{seconds:.1f} s" if isinstance(seconds, (int, float)) else ""
        cells = (f"{each.iteration:,}", f"{each.size / 1e6:,.1f} MB", _moment(each.time), shown)
        rows.append(tag("tr", *(tag("td", cell) for cell in cells)))
    gone = len(took.keys() - {each.iteration for each in run.checkpoints})
    more = len(run.checkpoints) - MOST_CHECKPOINTS
    notes = ([f"{more:,} older ones are there, too."] if more > 0 else []) + (
        [f"{gone:,} more were written and have been removed since."] if gone else []
    )
    if others:
        last, seconds = others[-1], others[-1].get("seconds")
        took_it = f" in {seconds:.1f} s" if isinstance(seconds, (int, float)) else ""
        notes.append(
            f"Written besides, and not listed: {len(others):,} non-persistent ({last['kind']}), the last of iteration "
            f"{_step(last):,}{took_it}."
        )
    return tag(
        "section",
        tag("h2", "Checkpoints"),
        tag("div", tag("table", *rows), class_="wide") if run.checkpoints else None,
        *(tag("p", note, class_="note") for note in notes),
    )


def _configuration(run: RunFiles) -> Html | None:
    changed = []
    for place, start in enumerate(run.starts):
        changes = start.get("changes")
        if not isinstance(changes, dict):
            continue
        for key, pair in changes.items():
            old, new = pair if isinstance(pair, list) and len(pair) == 2 else ("?", pair)
            changed.append((str(place), f"{_step(start):,}", key, _value(old), _value(new)))
    if not run.config and not changed:
        return None
    parts = []
    if changed:
        heads = ("restart", "iteration", "setting", "before", "after")
        rows = [tag("tr", *(tag("td", cell) for cell in row)) for row in reversed(changed[-MOST_CHANGES:])]
        parts = [
            tag("h3", "Changes between restarts"),
            tag("div", tag("table", tag("tr", *(tag("th", head) for head in heads)), *rows), class_="wide"),
        ]
    settings = [tag("tr", tag("th", key), tag("td", _value(value))) for key, value in list(run.config.items())[:1000]]
    return tag(
        "section",
        tag("h2", "Configuration"),
        *parts,
        tag("details", tag("summary", f"All {len(run.config)} settings"), tag("table", *settings, class_="settings"))
        if settings
        else None,
    )


# -- words -------------------------------------------------------------------------------------------------------------


def _newest(run: RunFiles, name: str) -> str | None:
    value = run.last(name)
    return None if value is None else number(value)


def _newest_of(series: Series) -> str | None:
    value = series.values[-1] if series.values else None
    return None if value is None else number(value)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"


def _moment(time: Any) -> str:
    """A point in time in this machine's zone."""
    try:
        return datetime.datetime.fromtimestamp(float(time)).strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError, OverflowError, OSError):
        return "at an unknown time"


def _step(event: dict[str, Any]) -> int:
    step = event.get("iteration")
    return step if isinstance(step, int) else 0


def _value(value: Any) -> str:
    return "on" if value is True else "off" if value is False else "none" if value is None else _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _css(kind: str) -> str:
    return kind if kind in ("start", "fault", "skipped", "spike", "rewind", "blend", "stop", "end") else "other"

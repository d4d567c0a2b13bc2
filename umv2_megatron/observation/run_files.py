"""What the directory of a run says about it, also while it goes on: metrics, events, configuration, checkpoints."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import yaml

from umv2_megatron.observation.events import EVENTS_FILE, read_events
from umv2_megatron.observation.json_lines import read_records
from umv2_megatron.observation.series import Series
from umv2_megatron.user_paths import is_remote

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
_CHECKPOINT = re.compile(r"iter_(\d{7,})")
_SHORTEST_SILENCE = 120.0
"""Seconds without a new number after which a run may be gone, at least."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One that is there: finished steps, size in bytes, and when it was written (seconds since 1970)."""

    iteration: int
    size: int
    time: float


@dataclasses.dataclass
class RunFiles:
    """A run as its directory shows it.

    ``series``: name of metrics.jsonl -> its numbers, each iteration once. ``unreadable``: lines of metrics.jsonl that
    are no records. ``written``: when metrics.jsonl was last written to, ``read`` when all this was read; seconds since
    1970.
    """

    directory: Path
    series: dict[str, Series]
    events: list[dict[str, Any]]
    config: dict[str, Any]
    checkpoints: list[Checkpoint]
    unreadable: int
    written: float | None
    read: float

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The events of all starts."""
        return [event for event in self.events if event["event"] == "start"]

    @property
    def iteration(self) -> int:
        """The last step that is known to be done."""
        reached = [int(series.iterations[-1]) for series in self.series.values() if series.iterations]
        return max([*reached, *(each.iteration for each in self.checkpoints)], default=0)

    @property
    def last_iteration(self) -> int | None:
        """The step with which the run ends, if something says so."""
        for start in reversed(self.starts):
            if isinstance(start.get("last_iteration"), int):
                return start["last_iteration"]
        length = self.config.get("train_iters")
        return length if isinstance(length, int) else None

    def last(self, name: str) -> float | None:
        """The newest number of a series."""
        series = self.series.get(name)
        return series.values[-1] if series and series.values else None

    def seconds_per_step(self) -> float | None:
        """Mean of the last ten intervals."""
        series = self.series.get("iteration-time")
        known = [value for value in (series.values[-10:] if series else []) if value is not None]
        return sum(known) / len(known) if known else None

    def state(self) -> tuple[str, str]:
        """``(word, sentence)``: finished, stopped, failed, running or silent, and why that is said."""
        last = self.events[-1] if self.events else None
        kinds = {event["event"] for event in self._since_start()}
        if "fault" in kinds:
            fault = next(event for event in self._since_start() if event["event"] == "fault")
            return "failed", str(fault.get("text", ""))
        if last is not None and last["event"] == "end":
            if last.get("finished"):
                return "finished", "all iterations are done"
            stop = next((event for event in self._since_start() if event["event"] == "stop"), None)
            return "stopped", f"asked by {stop.get('reason')}" if stop else "by --exit-interval"
        latest = max(self.written or 0.0, last.get("time", 0.0) if last else 0.0)
        if not latest:
            return "silent", "nothing says when it last did something"
        silence = max(0.0, self.read - latest)
        interval = self.config.get("log_interval")
        usual = (self.seconds_per_step() or 0.0) * (interval if isinstance(interval, int) else 1)
        if silence <= max(_SHORTEST_SILENCE, 10 * usual):
            return "running", "it has written numbers lately"
        return "silent", "neither numbers nor an end for a long time: killed, hung, or very slow"

    def _since_start(self) -> list[dict[str, Any]]:
        places = [place for place, event in enumerate(self.events) if event["event"] == "start"]
        return self.events[places[-1] :] if places else []


def read_run(directory: Path) -> RunFiles:
    """Read the run in ``directory``, its --save.

    Raises ``ValueError`` where it is no directory of a run.
    """
    if not any((directory / name).is_file() for name in (METRICS_FILE, EVENTS_FILE, CONFIG_FILE)):
        raise ValueError(
            f"RUN is {directory}; expected the --save directory of a run, with its {METRICS_FILE}, {EVENTS_FILE} or "
            f"{CONFIG_FILE}"
        )
    metrics = directory / METRICS_FILE
    series, unreadable = _read_series(metrics)
    return RunFiles(
        directory,
        series,
        read_events(directory),
        _read_config(directory / CONFIG_FILE),
        _checkpoints(directory),
        unreadable,
        _modified(metrics) if metrics.exists() else None,
        time.time(),
    )


def _read_series(path: Path) -> tuple[dict[str, Series], int]:
    found: dict[str, Series] = {}
    unreadable = latest = 0
    for record in read_records(path):
        if record is None:
            unreadable += 1
            continue
        iteration = record["iteration"]
        if iteration < latest:  # a restart has repeated the steps from here on
            for series in found.values():
                series.cut(iteration)
        latest = iteration
        for name, value in record.items():
            if name != "iteration" and (value is None or isinstance(value, (int, float))):
                found.setdefault(name, Series()).add(iteration, _number(value))
    return found, unreadable


def _number(value: float | None) -> float | None:
    """``value`` as a float; None also for an integer that is larger than any."""
    try:
        return None if value is None else float(value)
    except OverflowError:
        return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _checkpoints(directory: Path) -> list[Checkpoint]:
    found = []
    for entry in directory.iterdir():
        match = _CHECKPOINT.fullmatch(entry.name)
        if match is None or not entry.is_dir():
            continue
        try:  # a running job may prune it meanwhile
            found.append(Checkpoint(int(match[1]), *_size_and_time(entry)))
        except OSError:
            continue
    return sorted(found, key=lambda each: each.iteration)


def _size_and_time(directory: Path) -> tuple[int, float]:
    if is_remote(directory):
        # without it, it is being written or removed
        return sum(directory.sizes_below().values()), (directory / "manifest.sha256").modified()
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return size, directory.stat().st_mtime


def _modified(file: Path) -> float:
    return file.modified() if is_remote(file) else file.stat().st_mtime

"""``<save>/events.jsonl``: what happened to a run, one JSON object per line, from its first start to its end.

Every event has ``time`` (seconds since 1970), ``event`` and ``iteration`` (finished steps):

    start        the first process of the run, and every one after it: ``ranks``, ``host``, ``pid``, ``version``,
                 ``device``, ``last_iteration``; of a later one also ``reason``, why the one before has ended, and
                 ``changes``, setting -> [old, new]
    checkpoint   one was published, of ``iteration``; ``seconds`` it took, with --async-save also
                 ``blocked_seconds``, in which training waited; of a non-persistent one ``kind``, local or global
    unsaved      a non-persistent one could not be written, and the run went on; ``text``
    skipped      a step made no update (NaN, spike, --iterations-to-skip); ``text`` says which and why
    spike        a step was one and made its update nevertheless; ``text``
    blend        this start has begun a new blend with sample ``from_sample`` (--allow-new-blend); ``corpora``: each
                 with ``prefix``, ``samples`` and ``epochs`` drawn so far, and its ``share``, [old, new]
    rewind       the run went back to a checkpoint in the same process; ``text``
    stop         the ranks agreed to stop; ``reason``: the signal, or the time limit
    fault        this process ends before its time; ``rank`` that tells it, ``code``, ``text``
    tasks        the model was scored on --eval-tasks: ``seconds``, ``scores`` by name as in metrics.jsonl
    tasks-failed it could not be: ``text``; training goes on
    end          this process ends as it should; ``finished``: all iterations are done

Behind a URL, where nothing can be appended to, the file is written anew at each event, and other ranks than the first
have files of their own, events.RANK.jsonl.

Nothing is ever removed, other than from metrics.jsonl: a step that a restart repeats was trained twice, and that is
part of the history. A process that is killed leaves no event; the next start says so. A history that cannot be written
does not end a run.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from umv2_megatron.observation.json_lines import read_json_lines
from umv2_megatron.user_paths import is_remote

EVENTS_FILE = "events.jsonl"
MOST_FAULTS = 8
"""Faults of one start that are recorded: thousands of ranks may fail for one cause."""

_OF_A_RANK = re.compile(r"events\.\d+\.jsonl")
_current: EventLog | None = None


def current() -> EventLog | None:
    """The log of the run that this process is a rank of, from its start to its end."""
    return _current


def read_events(directory: Path) -> list[dict[str, Any]]:
    """The events of the run in ``directory``, in order; lines that are none are left out."""
    paths, in_one_file = [directory / EVENTS_FILE], not is_remote(directory)
    if not in_one_file:
        paths += [entry for entry in directory.iterdir() if _OF_A_RANK.fullmatch(entry.name)]
    found = [event for path in paths for event in read_json_lines(path)]
    events = [event for event in found if event and isinstance(event.get("event"), str)]
    return events if in_one_file else sorted(events, key=_time)


def _time(event: dict[str, Any]) -> float:
    told = event.get("time")
    return float(told) if isinstance(told, (int, float)) else 0.0


def why_ended(events: list[dict[str, Any]]) -> str | None:
    """Why the last start in ``events`` came to its end, in words; None where there was no start."""
    starts = [place for place, event in enumerate(events) if event["event"] == "start"]
    if not starts:
        return None
    since = events[starts[-1] :]
    faults = [event for event in since if event["event"] == "fault"]
    if faults:
        return str(faults[0].get("text", "a fault"))
    stops = [event for event in since if event["event"] == "stop"]
    if stops:
        return f"stopped as asked by {stops[-1].get('reason', 'a signal')}"
    ends = [event for event in since if event["event"] == "end"]
    if ends:
        return "all iterations were done" if ends[-1].get("finished") else "ended with --exit-interval"
    return "the process ended without a message: killed, out of memory, or its machine was lost"


def changed_settings(saved: Path, values: dict[str, Any]) -> dict[str, list[Any]]:
    """Setting -> [old, new] where ``values`` differ from the config.yaml that the run before has left at ``saved``."""
    try:
        old = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(old, dict):
        return {}
    return {key: [old[key], value] for key, value in values.items() if key in old and old[key] != value}


class EventLog:
    """Appends events to ``directory``'s events.jsonl; without a directory it does nothing.

    Rank 0 tells what all ranks know. Faults are told by every rank that fails on its own account, and by the first and
    the last rank where another one is to blame.

    Args:
        directory: of the run, None without --save.
        rank, ranks: this one, and how many there are.
        iteration: gives the number of finished steps.
    """

    def __init__(self, directory: Path | None, rank: int, ranks: int, iteration: Callable[[], int]):
        self.path = None if directory is None else directory / EVENTS_FILE
        self._own: Path | None = self.path
        if self.path is not None and rank and is_remote(self.path):
            self._own = self.path.with_name(f"events.{rank}.jsonl")  # type: ignore[assignment]
        self.rank, self.ranks = rank, ranks
        self._iteration = iteration
        self._over = False

    def start(self, values: dict[str, Any], version: str, device: str, last_iteration: int) -> None:
        """This process begins. On rank 0, before config.yaml is written anew with ``values``."""
        if self.path is None or self.rank:
            return
        told: dict[str, Any] = {}
        before = why_ended(self._told())
        if before is not None:
            told = {"reason": before, "changes": changed_settings(self.path.parent / "config.yaml", values)}
        self._write("start", ranks=self.ranks, host=socket.gethostname(), pid=os.getpid(), version=version,
                    device=device, last_iteration=last_iteration, **told)  # fmt: skip

    def tell(self, event: str, **fields: Any) -> None:
        """Append an event that all ranks know of."""
        if self.rank == 0:
            self._write(event, **fields)

    def end(self, finished: bool) -> None:
        """This process ends as it should."""
        self.tell("end", finished=finished)
        self._over = True

    def fault(self, text: str, code: int, *, own: bool) -> None:
        """This process ends before its time; ``own``: by what happened on this rank. Only the first is recorded."""
        if self.path is None or self._over or not (own or self.rank in (0, self.ranks - 1)):
            return
        self._over = True
        told = self._told()
        starts = [place for place, event in enumerate(told) if event["event"] == "start"]
        if sum(event["event"] == "fault" for event in told[starts[-1] if starts else 0 :]) < MOST_FAULTS:
            self._write("fault", rank=self.rank, code=code, text=text)

    def _told(self) -> list[dict[str, Any]]:
        """The events so far; none where they cannot be read, which must not hide why a run ends."""
        try:
            return [] if self.path is None else read_events(self.path.parent)
        except OSError as error:
            print(f"WARNING: {self.path} cannot be read ({error.strerror}); the run goes on", file=sys.stderr)
            return []

    def _write(self, event: str, **fields: Any) -> None:
        if self._own is None:
            return
        record = {"time": round(time.time(), 3), "event": event, "iteration": self._iteration(), **fields}
        line = json.dumps(record, default=str).encode() + b"\n"
        try:
            if is_remote(self._own):
                before = self._own.read_bytes() if self._own.exists() else b""
                self._own.write_bytes(before + line)
                return
            # one write to the end of the file: lines of several ranks do not mix
            descriptor = os.open(self._own, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                cut = size and os.pread(descriptor, 1, size - 1) != b"\n"  # by a kill or a full disk
                os.write(descriptor, b"\n" * bool(cut) + line)
            finally:
                os.close(descriptor)
        except OSError as error:
            print(f"WARNING: {self._own} cannot be written ({error.strerror}); the run goes on", file=sys.stderr)

    def __enter__(self) -> EventLog:
        global _current
        _current = self
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        global _current
        if failure is None:  # else the program still has to tell what it means
            _current = None

"""The history of a run: what is written, by whom, and how a start says why the one before has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from umv2_megatron.observation.events import (
    EVENTS_FILE,
    MOST_FAULTS,
    EventLog,
    changed_settings,
    read_events,
    why_ended,
)


def log(directory: Path, rank: int = 0, ranks: int = 4, iteration: int = 7) -> EventLog:
    return EventLog(directory, rank, ranks, lambda: iteration)


def start(directory: Path, **values: Any) -> EventLog:
    """A start on rank 0 that leaves its settings, as the program does."""
    made = log(directory)
    made.start(values, "1.2", "a device", 100)
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    return made


def kinds(directory: Path) -> list[str]:
    return [event["event"] for event in read_events(directory)]


def test_a_restart_says_why_and_what_has_changed(tmp_path: Path) -> None:
    start(tmp_path, lr=0.1, split="9,1", same=None)
    start(tmp_path, lr=0.2, split="9,1", same=None, new_in_this_version=3)
    first, second = read_events(tmp_path)
    assert "reason" not in first and first["last_iteration"] == 100 and first["iteration"] == 7
    assert second["changes"] == {"lr": [0.1, 0.2]}
    assert "without a message" in second["reason"], "nothing tells how the first one ended"


@pytest.mark.parametrize(
    "told, reason",
    [
        (lambda log: log.fault("rank 3 is gone", 1, own=False), "rank 3 is gone"),
        (lambda log: (log.tell("stop", reason="SIGUSR1"), log.end(False)), "stopped as asked by SIGUSR1"),
        (lambda log: log.end(True), "all iterations were done"),
        (lambda log: log.end(False), "ended with --exit-interval"),
    ],
)
def test_why_a_start_ended(tmp_path: Path, told: Any, reason: str) -> None:
    told(start(tmp_path))
    assert why_ended(read_events(tmp_path)) == reason
    start(tmp_path)
    assert read_events(tmp_path)[-1]["reason"] == reason
    assert "without a message" in (why_ended(read_events(tmp_path)) or ""), "the second start has not ended yet"


def test_who_tells_what(tmp_path: Path) -> None:
    start(tmp_path)
    for rank in range(4):
        made = log(tmp_path, rank)
        made.tell("checkpoint", seconds=1.0)
        made.fault("another rank is gone", 1, own=False)
        made.fault("and once more", 1, own=True)
    faults = [event for event in read_events(tmp_path) if event["event"] == "fault"]
    assert kinds(tmp_path).count("checkpoint") == 1
    assert [(event["rank"], event["text"][:7]) for event in faults] == [
        (0, "another"), (1, "and onc"), (2, "and onc"), (3, "another")
    ]  # fmt: skip
    for rank in range(4, 40):
        log(tmp_path, rank, 40).fault("all fail alike", 1, own=True)
    assert kinds(tmp_path).count("fault") == MOST_FAULTS
    start(tmp_path).fault("a new start may tell its own", 1, own=True)
    assert kinds(tmp_path).count("fault") == MOST_FAULTS + 1


def test_a_run_that_has_ended_has_no_fault(tmp_path: Path) -> None:
    made = start(tmp_path)
    made.end(True)
    made.fault("too late", 1, own=True)
    assert kinds(tmp_path) == ["start", "end"]


def test_a_line_cut_by_a_kill_spoils_no_other(tmp_path: Path) -> None:
    start(tmp_path)
    with open(tmp_path / EVENTS_FILE, "a") as file:
        file.write('{"time": 1, "event": "checkp')
    start(tmp_path)
    assert kinds(tmp_path) == ["start", "start"]


def test_without_a_directory_and_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EventLog(None, 0, 1, lambda: 0).end(True)
    assert not list(tmp_path.iterdir())
    EventLog(tmp_path / "gone", 0, 1, lambda: 0).end(True)
    assert "cannot be written (No such file or directory); the run goes on" in capsys.readouterr().err


def test_a_config_that_is_none(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    assert changed_settings(saved, {"lr": 1}) == {}
    for text in ("- a list", "a: [", "a: !!python/object:os.system {}"):
        saved.write_text(text)
        assert changed_settings(saved, {"a": 1}) == {}


def test_a_history_that_cannot_be_read_does_not_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / EVENTS_FILE).mkdir()
    start(tmp_path).fault("the reason", 1, own=True)
    assert capsys.readouterr().err.count(f"{EVENTS_FILE} cannot be read (Is a directory); the run goes on") == 2

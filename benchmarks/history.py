"""The history of the benchmarks' times on each kind of machine, and what became slower since the last run.

    <folder>/intel-r-xeon-r-processor-2-threads.jsonl        one line for each run of a program

A line holds program, options, commit, date and the times as [median, lowest, highest] in seconds. A time has become
slower when all rounds of the new run took longer than all rounds of the last one with the same options. Runs beside
other programs are kept and marked, but nothing is compared with them.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.spread import Spread

ROOT = Path(__file__).resolve().parents[1]
WHERE_RESULTS_GO = ("json", "docs", "history", "plot")
BUSY = 0.2
"""Processors used by other programs above which times are not worth much."""


def file_of(folder: Path, machine: Mapping[str, Any]) -> Path:
    """The file of this kind of machine."""
    kind = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
    return folder / f"{kind}-{machine['threads']}-threads.jsonl"


def keep(
    folder: Path, program: str, options: Mapping[str, Any], machine: Mapping[str, Any], times: Mapping[str, Spread]
) -> list[str]:
    """Add a run to the history; returns sentences about what became slower, or why nothing was compared.

    Args:
        folder: of the history; made where it is not there.
        options: of the program; those that say where results go do not count.
        machine: as ``measure.describe_machine`` gives it.
        times: seconds by name.
    """
    path = file_of(folder, machine)
    settings = {key: str(value) for key, value in options.items() if key not in WHERE_RESULTS_GO}
    run = {
        "program": program, "options": settings, "commit": _commit(), "date": f"{datetime.date.today()}",
        "busy_processors": machine["busy_processors"], "copy_bytes_per_s": machine["copy_bytes_per_s"],
        "times": {name: [each.median, each.lowest, each.highest] for name, each in times.items()},
    }  # fmt: skip
    last = _last(path, program, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")
    if run["busy_processors"] > BUSY:
        return [f"{program}: not compared, because other programs used {run['busy_processors']:.1f} processors."]
    if last is None:
        return [f"{program}: the first quiet run with these options on this kind of machine."]
    found = [
        f"{program}: {name} became slower, {1e3 * now[0]:.3g} ms ({1e3 * now[1]:.3g}-{1e3 * now[2]:.3g}) after "
        f"{1e3 * before[0]:.3g} ms ({1e3 * before[1]:.3g}-{1e3 * before[2]:.3g}) at {last['commit']} on {last['date']}"
        for name, now in run["times"].items()
        if (before := last["times"].get(name)) is not None and now[1] > before[2]
    ]
    return found or [f"{program}: nothing became slower than at {last['commit']} on {last['date']}."]


def _last(path: Path, program: str, settings: dict[str, str]) -> dict[str, Any] | None:
    """The last quiet run of ``program`` with the same options."""
    if not path.exists():
        return None
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    alike = [each for each in runs if each["program"] == program and each["options"] == settings]
    return next((each for each in reversed(alike) if each["busy_processors"] <= BUSY), None)


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""What the fault tests share: helpers of the other folders, a small disk, and the table of figures at the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("functional", "unit/checkpoint")]

from test_resume import corpus  # noqa: E402, F401 - a fixture

FIGURE = "fault figure"


@pytest.fixture
def figure(record_property) -> Callable[[str, str], None]:
    """Call it with a row of the table and what was seen."""
    return lambda row, seen: record_property(FIGURE, f"{row}\t{seen}")


def pytest_terminal_summary(terminalreporter) -> None:
    """Print every figure of a test that passed, and the names of those that failed."""
    stats = terminalreporter.stats
    failed = sorted({report.nodeid for report in stats.get("failed", []) + stats.get("error", [])})
    rows = [[name, "FAILED"] for name in failed if "tests/faults" in name]
    for report in stats.get("", []):  # after the teardown, which may tell a figure, too
        if report.when == "teardown" and report.nodeid not in failed:
            rows += [value.split("\t") for name, value in report.user_properties if name == FIGURE]
    if rows:
        terminalreporter.section("faults")
        width = max(len(row) for row, _ in rows)
        for row, seen in sorted(rows):
            terminalreporter.write_line(f"{row:{width}}  {seen}")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of the given number of bytes, in memory; skips where this user may not mount one."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)

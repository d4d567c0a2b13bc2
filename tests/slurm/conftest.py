"""The table at the end of `make slurm-test`: case, seconds, what was seen, whether it passed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note the case, which is the first line of the test's docstring."""
    report = yield
    text = getattr(item, "function", None).__doc__ or item.name
    report.user_properties.append(("slurm case", text.splitlines()[0].rstrip(".")))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a row for each case."""
    rows: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if hasattr(report, "duration"):  # of the case, and of what it had to wait for
            case = dict(getattr(report, "user_properties", ())).get("slurm case", "")
            seconds[case] = seconds.get(case, 0.0) + report.duration
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            notes = dict(getattr(report, "user_properties", ()))
            if "slurm case" not in notes:
                continue
            seen = notes.get("seen", report.longrepr[2] if outcome == "skipped" else "")
            if outcome in ("failed", "error"):
                crash = getattr(report.longrepr, "reprcrash", None)
                seen = crash.message.splitlines()[0] if crash else str(report.longrepr).splitlines()[-1]
            rows[notes["slurm case"]] = [seen, "pass" if outcome == "passed" else outcome]
    if rows:
        terminalreporter.section(f"SLURM, {time.strftime('%F')}")
        for case, (seen, result) in rows.items():
            terminalreporter.write_line(f"{result:7} {seconds[case]:4.0f} s  {case}: {seen}")

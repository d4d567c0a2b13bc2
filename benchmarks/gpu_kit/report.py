"""What the steps of gpu_check.py leave, the table at its end and the page docs/gpu-results.md.

Needs nothing but Python: the program that starts the steps imports it, and must work where torch does not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.text_table import Table

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, CUT, SKIPPED, NOT_RUN = "done", "failed", "cut", "skipped", "not run"
LOG_LINES = 12
"""Last lines of a failed step's log on the page."""

PEAK_TFLOPS = (
    ("B200", 2250.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("A100", 312.0),
    ("L40S", 362.0),
)  # fmt: skip
"""Dense bfloat16 TFLOP/s that the maker states, by a part of the device's name; the first that fits counts."""


def peak_tflops(device: str) -> float | None:
    """Stated dense bfloat16 TFLOP/s of the device of that name, None where it is not listed."""
    return next((peak for name, peak in PEAK_TFLOPS if name in device), None)


class Record:
    """The figures of a step, in a file that is complete after every call: a step that is cut keeps what it has.

    Args:
        path: the JSON file; None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.key = ""
        self.figures: dict[str, Any] = {}
        self.tables: list[Table] = []

    def keep(self, key: str, figures: dict[str, Any] | None = None, tables: Sequence[Table] | None = None) -> None:
        """Replace the key figure (one line) and, where they are given, the figures and the tables."""
        self.key = key
        self.figures = self.figures if figures is None else figures
        self.tables = self.tables if tables is None else list(tables)
        if self.path is not None:
            content = {"key": key, "figures": self.figures, "tables": [asdict(table) for table in self.tables]}
            write_whole(self.path, json.dumps(content, indent=1) + "\n")


@dataclass
class Outcome:
    """How a step ended: one of the words above, why where it is not "done", seconds, and what its file holds."""

    name: str
    result: str
    seconds: float = 0.0
    limit: float = 0.0
    reason: str = ""
    key: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """Last lines of its output, for steps that failed or were cut."""

    def read(self, path: Path) -> None:
        """Take over what the step wrote to ``path``, if it got that far."""
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.key, self.figures = found["key"], found["figures"]
            self.tables = [Table(**table) for table in found["tables"]]

    @property
    def text(self) -> str:
        """Result and reason."""
        return f"{self.result}: {self.reason}" if self.reason else self.result


@dataclass
class Machine:
    """What the figures belong to; every field is a text for the page."""

    device: str
    driver: str
    versions: dict[str, str]
    """By package; "-" where it is missing."""
    date: str
    commit: str


def overview(outcomes: Sequence[Outcome]) -> Table:
    """One row for each step."""
    rows = [(each.name, each.text, f"{each.seconds:.0f}", each.key) for each in outcomes]
    title = "In their order; seconds are those of the whole process."
    return Table(title, ("step", "result", "seconds", "key figure"), rows)


def page(machine: Machine, outcomes: Sequence[Outcome], dry: bool) -> str:
    """The Markdown page."""
    kept = [each for each in outcomes if each.tables]
    bad = [each for each in outcomes if each.result in (FAILED, CUT)]
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    state = "**Rehearsal on a CPU (`--dry`): sizes are tiny, and the figures mean nothing.**\n\n" if dry else ""
    parts = [
        "# Results on a GPU",
        "What `tools/gpu_check.sh` measured. For people who decide whether the package runs well on their device. How "
        "to read it: [gpu.md](gpu.md#first-ten-minutes). The program writes this page; do not edit it.",
        f"{state}- device: {machine.device}, driver {machine.driver}\n- versions: {versions}\n"
        f"- date: {machine.date}, commit {machine.commit}",
        "## Steps",
        overview(outcomes).markdown(),
        *(part for each in kept for part in (f"## {each.name}", *(table.markdown() for table in each.tables))),
        "## Failures",
        *(part for each in bad for part in (f"### {each.name}: {each.text}", "```\n" + "\n".join(each.log) + "\n```")),
    ]
    if not bad:
        parts.append("No step failed.")
    return "\n\n".join(parts) + "\n"


def results(machine: Machine, outcomes: Sequence[Outcome], dry: bool) -> str:
    """Everything as JSON."""
    document = {"program": "benchmarks/gpu_check.py", "dry": dry, "machine": asdict(machine),
                "steps": [asdict(each) for each in outcomes]}  # fmt: skip
    return json.dumps(document, indent=1) + "\n"


def last_lines(log: str) -> list[str]:
    """The end of a step's output, without what names this machine: a page may be published."""
    text = log.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    text = re.sub(r"(?<![\w.])/\S*?/(?=(?:site|dist)-packages/)", "", text)
    text = re.sub(r"(?<![\w.:/])/(?:tmp|home|root|work|usr)/[^\s:'\")]*/", ".../", text)
    return [line.rstrip()[:200] for line in text.splitlines() if line.strip()][-LOG_LINES:]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def machine_rates(device: str, steps: Sequence[Outcome]) -> dict[str, float]:
    """Rates for ``tools/plan.py --machine`` that the finished steps have measured; empty without the step roofline.

    The rate of rows is that of the lookup of umv2-227m: its forward and backward, by the bytes that must move, with the
    faster of the kernels and PyTorch's functions.
    """
    figures = {step.name: step.figures for step in steps if step.result == DONE}
    roofline = figures.get("roofline")
    if roofline is None:
        return {}
    best = max(rate for name, rate in roofline.items() if name.startswith("gemm_bfloat16"))
    peak = peak_tflops(device) or best
    rates = {"memory_bandwidth": roofline["copy_gb_per_s"], "update_bandwidth": roofline["copy_gb_per_s"],
             "peak_tflops": peak, "flops_efficiency": best / peak}  # fmt: skip
    lookups = [each for name, each in figures.get("lookup", {}).items() if name.startswith("umv2-227m,")]
    if lookups:
        ways = ("forward", "backward")
        rates["row_bandwidth"] = max(
            roofline["copy_gb_per_s"] * sum(each[f"{way}_share"] * each[f"{way}_ms"] for way in ways)
            / sum(each[f"{way}_ms"] for way in ways) for each in lookups
        )  # fmt: skip
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}

"""``metrics.jsonl``: the numbers of a run, one JSON object per line with an ``iteration`` and TensorBoard's names.

A restarted run drops the lines past the checkpoint it resumes from, so a step never appears twice.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
TEST_LOSS = "lm loss test"


class MetricsFile:
    """``metrics.jsonl``: append-only while a run goes on, cut back to its checkpoint when it resumes."""

    def __init__(self, directory: Path, resumed_at: int):
        self.path = directory / METRICS_FILE
        self.resumed: list[dict[str, Any]] = []
        """The records up to ``resumed_at``, which stay."""
        if self.path.exists():
            self._cut(resumed_at)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open as long as the run)

    def _cut(self, iteration: int) -> None:
        """Drop records past ``iteration``, and a last line that a kill left half-written; atomic."""
        records = [record for record in read_metrics(self.path.parent) if record["iteration"] <= iteration]
        # the test set is read after the last checkpoint, so a run that resumes there reads it again
        records = self.resumed = [record for record in records if TEST_LOSS not in record]
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, iteration: int, numbers: dict[str, Any]) -> None:
        """Append one record. What is not finite becomes null: JSON has no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of ``<directory>/metrics.jsonl``; a half-written last line is left out."""
    records = []
    for line in Path(directory, METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records

"""``metrics.jsonl``: the numbers of a run, one JSON object per line with an ``iteration`` and TensorBoard's names.

A restarted run drops the lines past the checkpoint it resumes from, so a step never appears twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umv2_megatron.observation.json_lines import read_records

METRICS_FILE = "metrics.jsonl"
TEST_LOSS = "lm loss test"


class MetricsFile:
    """``metrics.jsonl``: append-only while a run goes on, cut back to its checkpoint when it resumes."""

    def __init__(self, directory: Path, resumed_at: int):
        self.path = directory / METRICS_FILE
        if self.path.exists():
            self._cut(resumed_at)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open as long as the run)

    def records(self) -> Iterator[dict[str, Any]]:
        """What the file holds, read as it is asked for: right after a start, the records that stay."""
        return (record for record in read_records(self.path) if record is not None)

    def _cut(self, iteration: int) -> None:
        """Drop records past ``iteration``, and lines that are none: a kill leaves one half-written. Atomic."""
        temporary = self.path.with_suffix(".jsonl.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            for record in self.records():
                # the test set is read after the last checkpoint, so a run that resumes there reads it again
                if record["iteration"] <= iteration and TEST_LOSS not in record:
                    file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def write(self, iteration: int, numbers: dict[str, Any]) -> None:
        """Append one record. What is not finite becomes null: JSON has no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of ``<directory>/metrics.jsonl``; lines that are none, such as a half-written one, are left out.

    Raises OSError where the file is not there or cannot be read.
    """
    path = Path(directory, METRICS_FILE)
    path.stat()  # where it is not there, read_records has nothing to tell
    return [record for record in read_records(path) if record is not None]

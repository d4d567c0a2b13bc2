"""``metrics.jsonl``: the numbers of a run, one JSON object per line with an ``iteration`` and TensorBoard's names.

A restarted run drops the lines past the checkpoint it resumes from, so a step never appears twice. Behind a URL nothing
can be appended to: there the file is written anew, whole, before every checkpoint, at the end, and now and then.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from umv2_megatron.observation.json_lines import read_records
from umv2_megatron.user_paths import is_remote, user_path

if TYPE_CHECKING:
    from umv2_megatron.remote_path import RemotePath

METRICS_FILE = "metrics.jsonl"
TEST_LOSS = "lm loss test"
_EVERY_S = 60.0
"""Seconds between two times that a file behind a URL is written, at least."""


class MetricsFile:
    """``metrics.jsonl``: append-only while a run goes on, cut back to its checkpoint when it resumes."""

    def __init__(self, directory: Path, resumed_at: int):
        self.path = directory / METRICS_FILE
        self._file: TextIO
        if is_remote(self.path):
            self._file = _RemoteLines(self.path, "".join(self._kept(resumed_at)))
            return
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
            file.writelines(self._kept(iteration))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def _kept(self, iteration: int) -> Iterator[str]:
        for record in self.records():
            # the test set is read after the last checkpoint, so a run that resumes there reads it again
            if record["iteration"] <= iteration and TEST_LOSS not in record:
                yield json.dumps(record) + "\n"

    def write(self, iteration: int, numbers: dict[str, Any]) -> None:
        """Append one record. What is not finite becomes null: JSON has no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")

    def flush(self) -> None:
        """Nothing that was written may be lost from now on."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


class _RemoteLines(io.StringIO):
    """A file behind a URL that grows by lines; a store that fails is warned of, and costs no run."""

    def __init__(self, path: RemotePath, text: str) -> None:
        super().__init__()
        self._path, self._sent, self._next = path, "", time.monotonic() + _EVERY_S
        self.write(text)

    def write(self, text: str) -> int:
        count = super().write(text)
        if time.monotonic() >= self._next:
            self.flush()
        return count

    def flush(self) -> None:
        text, begun = self.getvalue(), time.monotonic()
        if text == self._sent:
            return
        try:
            self._path.write_bytes(text.encode())
            self._sent = text
        except OSError as error:
            print(f"WARNING: {self._path} cannot be written ({error.strerror}); the run goes on", file=sys.stderr)
        # a long file takes long: no more than a hundredth of the time
        self._next = time.monotonic() + max(_EVERY_S, 100 * (time.monotonic() - begun))

    def close(self) -> None:
        if not self.closed:
            self.flush()
        super().close()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of ``<directory>/metrics.jsonl``; lines that are none, such as a half-written one, are left out.

    Raises OSError where the file is not there or cannot be read.
    """
    path = user_path(directory) / METRICS_FILE
    path.stat()  # where it is not there, read_records has nothing to tell
    return [record for record in read_records(path) if record is not None]

"""Files of one JSON object per line that a kill may have cut anywhere: read what can be read."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from umv2_megatron.user_paths import is_remote


def read_json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of ``path`` in order, None for a line that is none; nothing where there is no file.

    Raises OSError where the file is there and cannot be read.
    """
    file: TextIO
    try:
        if is_remote(path):
            file = io.StringIO(path.read_text(errors="replace"))
        else:
            file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            yield found if isinstance(found, dict) else None


def read_records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of a metrics.jsonl: as ``read_json_lines``, but None also where ``iteration`` counts nothing."""
    for found in read_json_lines(path):
        iteration = found.get("iteration") if found else None
        yield found if type(iteration) is int and 0 <= iteration < 1 << 63 else None

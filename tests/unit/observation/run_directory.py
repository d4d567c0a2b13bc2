"""Directories of runs for tests of the page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml


def write_run(
    directory: Path,
    records: list[dict[str, Any]],
    events: list[dict[str, Any]] | None = None,
    **config: Any,
) -> Path:
    """metrics.jsonl, events.jsonl and config.yaml as the training program writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    if events is not None:
        (directory / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    (directory / "config.yaml").write_text(yaml.safe_dump({"seq_length": 32, "train_iters": 100, **config}))
    return directory


def steps(first: int, last: int, layers: int = 0, loss: float = 3.0) -> list[dict[str, Any]]:
    """Records of training steps, and with ``layers`` those of memory layers."""
    found: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        found.append({
            "iteration": step, "lm loss": loss + 1 / step, "learning-rate": 1e-3, "value-learning-rate": 4e-3,
            "batch-size": 8, "grad-norm": 1.0 + step % 3, "iteration-time": 0.5, "throughput": 0.1,
        })  # fmt: skip
        if layers:
            found.append({"iteration": step} | {
                f"memory/{name}/layer_{layer:03d}": layer + step / last
                for name in ("value_coverage", "dead_rows") for layer in range(layers)
            })  # fmt: skip
    return found


def event(kind: str, iteration: int, /, **fields: Any) -> dict[str, Any]:
    """One event, of now."""
    return {"time": time.time(), "event": kind, "iteration": iteration, **fields}


def start(iteration: int, **fields: Any) -> dict[str, Any]:
    """A start."""
    return event("start", iteration, ranks=2, host="node7", device="a device", last_iteration=100, **fields)

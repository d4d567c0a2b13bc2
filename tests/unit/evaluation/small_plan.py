"""A small plan of an ablation for tests: two runs, two seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from umv2_megatron.evaluation.ablation.plan import Plan, read_plan

CONTENT: dict[str, Any] = {
    "common": {"model-preset": "umv2-tiny", "train-iters": 20, "mock-data": True, "tokenizer-type": "NullTokenizer"},
    "seeds": [1, 2],
    "baseline": "dense",
    "runs": {"dense": {"ffn-variant": "dense"}, "umv2": {"memory_topk": 3}},
}


def plan_of(folder: Path, smoke: bool = False, **changes: Any) -> Plan:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **changes}, sort_keys=False))
    return read_plan(path, folder / "out", smoke)

"""A training step on a real GPU waits for it once, as torch's synchronisation debug mode sees it.

Run by `make test-gpu`; skipped where there is no CUDA device. tests/unit/training/test_host_waits.py proves the same
without one, with a fake device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_kit.waits import watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
ROOT = Path(__file__).resolve().parents[2]
MODEL = {"model_preset": "umv2-tiny", "micro_batch_size": 2, "global_batch_size": 4}
COUNT = """
import json, sys
from benchmarks.gpu_kit.waits import waits_of_a_step
found, layers, micro_batches = waits_of_a_step(json.loads(sys.argv[1]))
print("WAITS", json.dumps(found))
"""


def waits(**changes: Any) -> list[tuple[str, str]]:
    """Kind and place of every wait of a step, in a process of its own."""
    command = [sys.executable, "-c", COUNT, json.dumps({**MODEL, **changes})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("WAITS")]
    return [(kind, where) for kind, where in json.loads(told.removeprefix("WAITS"))]


@pytest.mark.parametrize(
    "changes", [{}, {"memory_backend": "triton"}, {"memory_backend": "triton", "memory_stream": True}]
)
def test_a_step_waits_once(changes: dict[str, Any]) -> None:
    (found,) = waits(**changes)
    assert found[1].startswith("umv2_megatron/training/optimizer.py")


def test_the_count_sees_waits() -> None:
    """A read, a size that depends on numbers, a copy that blocks, and waits by name."""
    x = torch.ones(3, device="cuda")
    with watched() as found:
        x * 2
    assert found == []
    with watched() as found:
        x.sum().item()
        x.nonzero()
        x.cpu()
        torch.cuda.synchronize()
        torch.cuda.current_stream().synchronize()
    kinds = [kind for kind, _ in found]
    assert kinds.count("synchronize") == 2 and kinds.count("debug mode") >= 3
    assert torch.cuda.get_sync_debug_mode() == 0

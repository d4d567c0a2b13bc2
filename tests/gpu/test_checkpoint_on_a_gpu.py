"""One NCCL rank saves and goes on from its checkpoint: the weights are those of a run that was not interrupted.

Run by `make test-gpu`; skipped where there is no CUDA device.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_kit.report import Record
from benchmarks.gpu_kit.runs import checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def test_a_resumed_run_has_the_same_weights() -> None:
    record = Record(None)
    checkpoint(record, dry=False)
    assert record.figures["steps"] == [3, 4] and len(set(record.figures["hashes"])) == 1

"""Repairs of mcore that are made with CUDA and without; each in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# A stand-in for CUDA: torch says that there is a device. Nothing below computes on it.
PROGRAM = """
import sys
import torch

if sys.argv[1] == "cuda":
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda *_: type("Properties", (), {"major": 9, "minor": 0, "name": "stand-in"})
    torch.cuda.get_device_capability = lambda *_: (9, 0)
from umv2_megatron.parallel import cpu_platform

cpu_platform.install()
cpu_platform.install()
from megatron.core.tensor_parallel import random
from megatron.core.transformer import TransformerConfig, torch_norm
from megatron.core.transformer.moe import moe_utils

# the bridge is for machines without CUDA only
assert (torch_norm.torch is torch) == (sys.argv[1] == "cuda")
assert moe_utils.te_general_gemm is None
assert random.CheckpointWithoutOutput.__init__.__defaults__ == (None,)
config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm",
                           tensor_model_parallel_size=2, sequence_parallel=True)
norm = torch_norm.WrappedTorchNorm(config, 8)
assert norm.weight.sequence_parallel is True and config.sequence_parallel is True
"""


@pytest.mark.parametrize("machine", [pytest.param("cuda", marks=pytest.mark.slow), "cpu"])
def test_repairs_are_made_on_every_machine(machine: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, machine], env=environ, capture_output=True, text=True, timeout=240
    )
    assert told.returncode == 0, told.stderr

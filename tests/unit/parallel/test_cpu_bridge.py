"""What the bridge changes and, as important, what it leaves alone; each in a fresh interpreter or a harness rank."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from umv2_megatron.parallel import cpu_platform

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the bridge is a no-op with a CUDA device")

CHECKS = """
import torch
from megatron.core import Timers, parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.tensor_parallel import layers

assert not torch.cuda.is_available()
# mcore sees the CPU under the name of CUDA ...
assert layers.torch.cuda.current_device() == torch.device("cpu")
assert layers.torch.zeros(2, device="cuda").device.type == "cpu"
assert layers.torch.empty(2, device="meta").device.type == "meta"
assert layers.torch.Tensor is torch.Tensor and layers.torch.distributed is torch.distributed
# ... nobody else does.
for attempt in (lambda: torch.zeros(2, device="cuda"), torch.cuda.current_device, torch.cuda.Stream):
    try:
        attempt()
    except (AssertionError, RuntimeError):
        pass
    else:
        raise SystemExit("torch itself was changed")
x = torch.ones(2)
assert x.cuda() is x and x.type() == "torch.FloatTensor"
# Nothing is compiled: neither functions nor methods.
assert not hasattr(swiglu, "_torchdynamo_orig_callable") and not hasattr(L2Norm._norm, "_torchdynamo_orig_callable")
# The tracker's states live in the CPU generator: same name, same draws; the default stream is untouched by them.
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
draws = []
for fork in (True, False):
    tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    if fork:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            torch.rand(3)
    draws.append(torch.rand(3))
assert torch.equal(*draws)
timer = Timers(log_level=2, log_option="max")("step")
timer.start()
timer.stop()
"""


@pytest.mark.parametrize("order", ["install first", pytest.param("mcore first", marks=pytest.mark.slow)])
def test_bridge(order: str) -> None:
    install = "from umv2_megatron.parallel import cpu_platform\ncpu_platform.install()\ncpu_platform.install()\n"
    mcore = "import megatron.core.models.gpt\nimport megatron.core.fusions.fused_bias_swiglu\n"
    program = (install if order == "install first" else mcore + install) + textwrap.dedent(CHECKS)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    if order == "install first":
        assert "Apex" not in told.stderr
    assert "CPU RNG state changed" not in told.stderr


def test_helpers_on_cpu() -> None:
    assert cpu_platform.device() == torch.device("cpu")
    assert cpu_platform.backend() == "gloo"
    cpu_platform.set_device(7)
    cpu_platform.synchronize()
    cpu_platform.empty_cache()
    assert 0 < cpu_platform.memory_allocated() <= 1.05 * cpu_platform.max_memory_allocated()
    state = cpu_platform.get_device_rng_state()
    first = torch.rand(4)
    cpu_platform.set_device_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def test_milliseconds_between_two_marks():
    begin = cpu_platform.mark()
    time.sleep(0.02)
    end = cpu_platform.mark()
    assert 20 <= cpu_platform.milliseconds(begin, end) < 10_000
    assert cpu_platform.milliseconds(1.5, 1.75) == 250.0

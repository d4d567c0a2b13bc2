"""What must hold on a CUDA device: the lookup and its gradients equal the CPU's, and a small model trains in bf16.

Run by `make test-gpu`; skipped where there is no CUDA device.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umv2_megatron.ops import get_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
ROOT = Path(__file__).resolve().parents[2]
TOKENS, PICKS, CORES, ROWS, DP, DV = 64, 8, 2, 500, 16, 24


def lookup_on(device: str, backend: str) -> list[torch.Tensor]:
    """Output and gradients of one lookup, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, ROWS, (TOKENS, PICKS), generator=generator).to(device)
    shapes = [(TOKENS, PICKS, CORES), (TOKENS, DP), (ROWS, DP), (ROWS, DV)]
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    upstream = torch.randn(TOKENS, DV, generator=generator).to(device)
    out = get_backend(backend, device).lookup(rows, None, *inputs, 1, "none")
    out.backward(upstream)
    gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
    assert len(gradients) == len(inputs)
    return [tensor.detach().cpu() for tensor in (out, *gradients)]


@pytest.mark.parametrize("backend", ["reference", "scatter", "triton", "auto"])
def test_lookup_equals_the_cpu(backend):
    for found, expected in zip(lookup_on("cuda", backend), lookup_on("cpu", "reference")):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("extra", [[], ["--bf16", "--use-distributed-optimizer"], ["--transformer-impl", "local"]])
def test_a_small_model_trains(extra, tmp_path):
    flags = [
        *("--model-preset", "umv2-tiny", "--mock-data", "--tokenizer-type", "NullTokenizer", "--train-iters", "20"),
        *("--lr", "2e-3", "--micro-batch-size", "8", "--log-interval", "1", "--eval-iters", "0", "--num-workers", "0"),
    ]
    command = [sys.executable, "pretrain_umv2.py", *flags, "--save", str(tmp_path), *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [line.split("lm loss: ")[1].split()[0] for line in done.stdout.splitlines() if "lm loss: " in line]
    assert len(losses) == 20 and float(losses[-1]) < float(losses[0]) - 0.3

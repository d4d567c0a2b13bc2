"""--memory-stream on a real GPU: the same bits as on one stream, with recompute, reductions that overlap the backward,
and in a CUDA graph; and the branch does run beside the FFN.

Run by `make test-gpu`; skipped where there is no CUDA device. tests/unit/parallel/test_streams.py checks the order of
the waits without one.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umv2_megatron.parallel import streams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
ROOT = Path(__file__).resolve().parents[2]
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]


def trained(folder: Path, *extra: str) -> str:
    """Losses and the hash of the weights after ten steps of two micro-batches."""
    flags = [
        *("--model-preset", "umv2-tiny", "--mock-data", "--tokenizer-type", "NullTokenizer", "--train-iters", "10"),
        *("--lr", "2e-3", "--micro-batch-size", "8", "--global-batch-size", "16", "--log-interval", "1"),
        *("--eval-iters", "0", "--num-workers", "0", "--deterministic-mode", "--save", str(folder)),
    ]
    command = [sys.executable, "pretrain_umv2.py", *flags, *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.findall(r"lm loss: \S+|weights of rank 0: sha256 \w+", done.stdout)
    assert len(found) == 11, done.stdout[-3000:]
    return "\n".join(found)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        RECOMPUTE,
        ["--recompute-granularity", "selective", "--recompute-modules", "mlp"],
        ["--bf16", "--overlap-grad-reduce", "--use-distributed-optimizer"],
        ["--memory-sharing", "block", "--memory-sharing-size", "2", "--overlap-grad-reduce", *RECOMPUTE],
        ["--memory-backend", "triton"],
    ],
    ids=["plain", "full recompute", "selective recompute", "overlap", "shared tables", "triton"],
)
def test_training_gives_the_same_bits(extra: list[str], tmp_path: Path) -> None:
    assert trained(tmp_path / "one", *extra) == trained(tmp_path / "two", "--memory-stream", *extra)


class _Slow(torch.autograd.Function):
    """x * 2, and in the backward a late addition to ``table.main_grad``, as the lookup's."""

    @staticmethod
    def forward(ctx, x, table):
        ctx.table = table
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        torch.cuda._sleep(50_000_000)
        ctx.table.main_grad.add_(1.0)
        return grad * 2, None


@pytest.mark.parametrize("fork", [True, False])
def test_a_table_is_complete_when_its_hook_runs(fork: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook reads main_grad on the main stream. Without the fork it reads too early: that this can fail."""
    if not fork:
        monkeypatch.setattr(streams._Fork, "apply", lambda x, *tables: x.view_as(x))
    table = torch.zeros(1000, device="cuda", requires_grad=True)
    table.main_grad = torch.zeros_like(table)
    seen: list[torch.Tensor] = []
    accumulator = table.expand_as(table).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: seen.append(table.main_grad.clone()))
    branch = streams.branch_for(torch.device("cuda", torch.cuda.current_device()), wanted=True)
    x = torch.ones(1000, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    inside = branch.fork(x, [table])
    with branch.beside():
        memory = _Slow.apply(inside, table)
    (x * 3 + branch.join(memory)).sum().backward()
    torch.cuda.synchronize()
    assert len(seen) == 1 and (seen[0].min().item() == 1.0) == fork
    assert torch.equal(x.grad, torch.full_like(x, 5.0))


def test_the_branch_runs_beside() -> None:
    """Two sleeps at once take less than two in a row."""
    branch = streams.branch_for(torch.device("cuda", torch.cuda.current_device()), wanted=True)
    x = torch.ones(1, device="cuda")

    def elapsed(beside: streams.Branch) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        seen = beside.fork(x, [])
        with beside.beside():
            torch.cuda._sleep(100_000_000)
        torch.cuda._sleep(100_000_000)
        beside.join(seen)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    elapsed(branch)
    assert elapsed(branch) < 0.7 * elapsed(streams.INLINE)


def test_a_cuda_graph_holds_both_streams() -> None:
    """Forward and backward of a branch, captured and replayed on other values."""
    device = torch.device("cuda", torch.cuda.current_device())
    weights = [torch.randn(64, 64, device=device, requires_grad=True) for _ in range(2)]
    branch = streams.branch_for(device, wanted=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        seen = branch.fork(x, [])
        with branch.beside():
            memory = (seen @ weights[0]).relu()
        return x @ weights[1] + branch.join(memory)

    static = torch.randn(32, 64, device=device, requires_grad=True)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            torch.autograd.grad(block(static).square().sum(), [static, *weights])
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = block(static)
        found = torch.autograd.grad(output.square().sum(), [static, *weights])
    for seed in range(3):
        x = torch.randn(32, 64, device=device, generator=torch.Generator(device).manual_seed(seed))
        static.data.copy_(x)
        graph.replay()
        again = x.clone().requires_grad_()
        expected = again @ weights[1] + (again @ weights[0]).relu()
        torch.testing.assert_close(output, expected)
        for one, other in zip(found, torch.autograd.grad(expected.square().sum(), [again, *weights]), strict=True):
            torch.testing.assert_close(one, other)

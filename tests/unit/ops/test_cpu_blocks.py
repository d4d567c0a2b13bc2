"""SwiGLU, RMS norm and rotation in one pass against PyTorch's functions in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from umv2_megatron.ops import cpu_blocks

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def angles(positions: int, width: int) -> Tensor:
    half = torch.outer(torch.arange(positions).float(), 1 / 100 ** (torch.arange(0, width, 2) / width))
    return torch.cat([half, half], -1)[:, None, None]


def plain_swiglu(x: Tensor) -> Tensor:
    gate, linear = x.chunk(2, -1)
    return functional.silu(gate) * linear


def plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), gain, 1e-5)


def plain_rotation(x: Tensor, turn: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * turn.cos().to(x.dtype) + torch.cat([-high, low], -1) * turn.sin().to(x.dtype)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES: dict[str, tuple[Callable, Callable, list[Tensor]]] = {
    "swiglu": (cpu_blocks.swiglu, plain_swiglu, [20 * normal(130, 3, 2 * 37)]),
    "swiglu of an expert": (
        cpu_blocks.swiglu,
        lambda x, scale: plain_swiglu(x) * scale[:, None],
        [20 * normal(390, 2 * 37), normal(390, seed=1)],
    ),
    "norm": (lambda x, w: cpu_blocks.rms_norm(x, w, 1e-5), plain_norm, [normal(200, 3, 61), normal(61, seed=1)]),
    # rows of queries among those of keys and values, as mcore cuts them out of one product
    "norm of a part": (
        lambda x, w: cpu_blocks.rms_norm(x[..., 5:21], w, 1e-5),
        lambda x, w: plain_norm(x[..., 5:21], w),
        [normal(50, 3, 4, 48), normal(16, seed=1)],
    ),
    "norm of columns": (
        lambda x, w: cpu_blocks.rms_norm(x.transpose(0, -1), w, 1e-5),
        lambda x, w: plain_norm(x.transpose(0, -1), w),
        [normal(16, 3, 5), normal(16, seed=1)],
    ),
    "rotation": (
        lambda x: cpu_blocks.rotate(x[..., :26], angles(70, 26)),
        lambda x: plain_rotation(x[..., :26], angles(70, 26)),
        [normal(70, 2, 3, 30)],
    ),
}


def outputs_and_grads(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = function(*leaves)
    upstream = normal(*out.shape, seed=7).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, dtype: torch.dtype) -> None:
    ours, plain, inputs = CASES[case]
    inputs = [each.to(dtype) for each in inputs]
    expected = outputs_and_grads(plain, [each.double() for each in inputs])
    for one, other in zip(outputs_and_grads(ours, inputs), expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_on_any_number_of_threads(case: str) -> None:
    ours, _, inputs = CASES[case]
    first = len(inputs[0])  # the rows of all inputs but gains
    inputs = [torch.cat([each] * 9) if len(each) == first and "rotation" not in case else each for each in inputs]
    if case == "norm of columns":
        inputs = CASES[case][2]
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_grads(ours, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_swiglu_of_large_numbers_and_of_nan() -> None:
    gate = torch.tensor([100.0, -100.0, 1e30, -1e30, float("inf"), float("nan"), 0.0])
    found = cpu_blocks.swiglu(torch.cat([gate, torch.ones(7)]))
    assert found[:1].tolist() == [100.0] and abs(found[1]) < 1e-35 and found[2] == 1e30 and abs(found[3]) < 1e-5
    assert found[4] == float("inf") and found[5].isnan() and found[6] == 0


def test_nothing_to_do() -> None:
    for case in ("swiglu", "norm"):
        ours, _, inputs = CASES[case]
        out, *grads = outputs_and_grads(ours, [inputs[0][:0], *inputs[1:]])
        assert out.shape[0] == 0 and all(grad.abs().sum() == 0 for grad in grads)


def test_what_is_taken() -> None:
    x = torch.zeros(2)
    assert cpu_blocks.takes(x, x) and cpu_blocks.takes(x.bfloat16())
    assert not cpu_blocks.takes(x.double()) and not cpu_blocks.takes(x, x.bfloat16())
    assert not cpu_blocks.takes(torch.empty(2, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_blocks.takes(x)

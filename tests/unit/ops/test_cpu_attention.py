"""Compiled causal attention against PyTorch's in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from umv2_megatron.ops import cpu_attention

CASES = [
    # s, b, n, g, D: less than a block of queries; its end and one more; several; odd widths; one of each
    (7, 2, 4, 4, 64),
    (48, 1, 2, 1, 16),
    (49, 3, 6, 2, 20),
    (200, 2, 4, 2, 64),
    (131, 1, 3, 3, 37),
    (1, 1, 1, 1, 1),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(length: int, samples: int, heads: int, groups: int, width: int) -> list[Tensor]:
    """Queries; keys and values as mcore cuts them out of one product."""
    query = normal(length, samples, heads, width)
    both = normal(length, samples, groups, 2 * width, seed=1)
    return [query, *both.split(width, dim=-1)]


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    first = (each.permute(1, 2, 0, 3) for each in (query, key, value))
    out = functional.scaled_dot_product_attention(*first, is_causal=True, scale=scale, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


def outputs_and_grads(function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = function(*leaves, 0.3)
    # a gradient whose numbers do not lie one after the other
    upstream = normal(*out.shape[:2], out.shape[3], out.shape[2], seed=2).to(out.dtype).transpose(2, 3)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: tuple[int, ...]) -> None:
    inputs = operands(*case)
    assert cpu_attention.can(*inputs)
    expected = outputs_and_grads(plain, [each.double() for each in inputs])
    for one, other in zip(outputs_and_grads(cpu_attention.causal_attention, inputs), expected, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() <= 5e-6 * other.abs().max() + 1e-6


def test_large_scores() -> None:
    """The largest of a row is subtracted before the exponential."""
    inputs = [100 * each for each in operands(60, 1, 1, 1, 8)]
    expected = plain(*(each.double() for each in inputs), 0.3)
    found = cpu_attention.causal_attention(*inputs, 0.3)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_the_same_bits_on_any_number_of_threads() -> None:
    inputs, before, results = operands(150, 3, 4, 2, 24), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_grads(cpu_attention.causal_attention, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_what_is_not_taken() -> None:
    query, key, value = operands(5, 1, 2, 2, 4)
    assert not cpu_attention.can(query.double(), key.double(), value.double())
    assert not cpu_attention.can(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert not cpu_attention.can(query[1:], key, value) and not cpu_attention.can(query, key, value[..., 1:])

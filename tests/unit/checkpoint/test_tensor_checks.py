"""The checksum of tensors is the equation of its file and finds small changes; NaN and Inf are found and placed."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from umv2_megatron.checkpoint.tensor_checks import checksum, examine, first_not_finite

WORDS = 1 << 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def by_equation(data: bytes) -> str:
    """The docstring's sums in Python's integers."""
    padded = data + bytes(-len(data) % 8)
    words = struct.unpack(f"<{len(padded) // 8}Q", padded)
    total = len(data)
    for start in range(0, len(words), WORDS):
        block = sum((x ^ (x >> 32)) * (2 * i + 1) for i, x in enumerate(words[start : start + WORDS]))
        total = (total * 0x9E3779B97F4A7C15 + block) % 2**64
    return f"{total:016x}"


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [0, 1, 5, 8 * WORDS, 8 * WORDS + 3])
def test_the_checksum_is_the_equation(dtype, elements):
    tensor = draw(dtype, elements)
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert checksum(tensor) == checksum(data) == by_equation(data)
    assert examine([tensor])[0].checksum == by_equation(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_values_and_their_order_count(dtype):
    """Not where they lie in memory: a part of a buffer may begin between two words."""
    buffer = draw(dtype, 1001)
    part = buffer[3:1000].clone()
    assert checksum(buffer[3:1000]) == checksum(part)
    matrix = draw(dtype, 37, 41)
    assert checksum(matrix.t()) == checksum(matrix.t().contiguous()) != checksum(matrix)


def test_small_changes_are_found():
    tensor = draw(torch.float32, WORDS * 2 + 10)
    before = checksum(tensor)
    bits = tensor.view(torch.int32)
    for place in (0, 1, 77, len(bits) - 1):
        for bit in (0, 13, 30):
            bits[place] ^= 1 << bit
            assert checksum(tensor) != before, (place, bit)
            bits[place] ^= 1 << bit
    for signs in ([1, 3], [0, 2], [1, 3, 5, 7], [1, 2 * WORDS + 1]):
        tensor[signs] *= -1
        assert checksum(tensor) != before, signs
        tensor[signs] *= -1
    for one, other in ((0, 1), (0, 2), (5, 2 * WORDS + 5)):
        tensor[[one, other]] = tensor[[other, one]]
        assert checksum(tensor) != before, (one, other)
        tensor[[one, other]] = tensor[[other, one]]
    assert checksum(tensor) == before
    assert checksum(tensor[:-1]) != before
    assert checksum(torch.zeros(8)) != checksum(torch.zeros(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_and_placed(dtype, value):
    good = draw(dtype, 300, 1000)
    bad = good.clone()
    bad[271, 828] = value
    assert [found.finite for found in examine([good, bad, draw(torch.int64, 3), draw(dtype, 0)])] == [
        True, False, True, True,
    ]  # fmt: skip
    assert first_not_finite(bad) == (271, 828)
    assert not examine([torch.tensor(value, dtype=dtype)])[0].finite
    assert first_not_finite(torch.tensor(value, dtype=dtype)) == ()

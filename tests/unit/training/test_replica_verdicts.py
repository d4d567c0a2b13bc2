"""Checksums of parameters, who is named where they differ, and the line of a straggler report."""

from __future__ import annotations

import pytest
import torch

from umv2_megatron.training import replicas
from umv2_megatron.training.replicas import checksum, verdict
from umv2_megatron.training.stragglers import described


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_every_flipped_bit_changes_the_checksum(dtype, monkeypatch):
    """Compared with the sum by Python's own integers; several chunks, the last one no whole number of words."""
    monkeypatch.setattr(replicas, "_CHUNK", 64)
    generator = torch.Generator().manual_seed(5)
    tensor = (torch.randn(3, 7, generator=generator) * 50).to(dtype)
    data = tensor.view(-1).view(torch.uint8)
    before = checksum(tensor).item()
    expected = 0
    for start in range(0, data.numel(), 64):
        part = bytes(data[start : start + 64].tolist())
        words = [int.from_bytes(part[place : place + 8], "little", signed=True) for place in range(0, len(part), 8)]
        words[-1] = int.from_bytes(part[8 * len(words) - 8 :].ljust(8, b"\0"), "little", signed=True)
        total = sum(word * (place * 0x9E3779B97F4A7C15 | 1) for place, word in enumerate(words))
        expected = (expected * 0x2545F4914F6CDD1D + total) % (1 << 64)
    assert before % (1 << 64) == expected
    for place in range(data.numel()):
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum(tensor).item() != before, (place, bit)
            data[place] ^= 1 << bit
    assert checksum(tensor).item() == before
    assert checksum(tensor.t()).item() != before, "the places count"


def test_a_checksum_does_not_depend_on_where_a_parameter_lies():
    numbers = torch.randn(1000)
    assert checksum(torch.cat([torch.zeros(1), numbers])[1:]) == checksum(numbers)


def test_the_minority_is_named():
    names, members = ["a", "b", "c", "d", "e"], ["0 (x)", "4 (y)", "8 (z)"]
    good = (1, 2, 3, 4, 5)
    assert verdict(names, [good, (1, 9, 3, 4, 5), good], members) == "rank 4 (y) differs from 2 equal replicas in b"
    told = verdict(names, [good, (7, 7, 7, 7, 5), good], members)
    assert told == "rank 4 (y) differs from 2 equal replicas in a, b, c and 1 more parameters"
    two = verdict(names, [good, (1, 2, 3, 4, 6)], members[:2])
    assert two == "ranks 0 (x), 4 (y) differ in e, and no majority tells which is wrong"
    assert verdict(names, [good, (0, 2, 3, 4, 5), (9, 2, 3, 4, 5)], members).startswith(
        "ranks 0 (x), 4 (y), 8 (z) differ"
    )
    five = [good, good, good, (0, 2, 3, 4, 5), (1, 2, 3, 4, 0)]
    assert verdict(names, five, [*members, "9 (v)", "10 (w)"]).startswith("ranks 9 (v), 10 (w) differ from 3 equal")


def test_ranks_are_compared_within_their_stage():
    """Stage 1 works twice as long as stage 0; the slow rank is on stage 0."""
    places = [("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1), ("f", 1)]
    line, numbers = described([0.1, 0.15, 0.1, 0.2, 0.21, 0.2], places, 2)
    assert "slowest rank 1 on b 150.0 ms, 1.50 x median, rank 4 on e 210.0 ms, 1.05 x median | fastest rank 5" in line
    assert numbers == {
        "straggler/rank": 1, "straggler/seconds": 0.15, "straggler/ratio": pytest.approx(1.5),
        "straggler/median-seconds": 0.1,
    }  # fmt: skip

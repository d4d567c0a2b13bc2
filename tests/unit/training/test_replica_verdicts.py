"""Checksums of parameters, who is named where they differ, and the line of a straggler report."""

from __future__ import annotations

import pytest
import torch

from umv2_megatron.training.replicas import fingerprints, verdict
from umv2_megatron.training.stragglers import described


def test_every_change_of_a_parameter_changes_its_fingerprint():
    """Also signs that change in pairs, which sums of words times odd numbers cannot see."""
    small = torch.randn(3, 7, generator=torch.Generator().manual_seed(5)).bfloat16()
    large = torch.randn(1 << 18, generator=torch.Generator().manual_seed(6))
    parameters = [torch.nn.Parameter(small), torch.nn.Parameter(large), torch.nn.Parameter(torch.tensor(2.0))]
    before = fingerprints(parameters)
    assert (before.dtype, before.shape) == (torch.int64, (3,)) and before.unique().numel() == 3
    for place in range(21):
        for bit in range(16):
            small.view(-1).view(torch.int16)[place] ^= 1 << bit if bit < 15 else -(1 << 15)
            assert (fingerprints(parameters) == before).tolist() == [False, True, True], (place, bit)
            small.view(-1).view(torch.int16)[place] ^= 1 << bit if bit < 15 else -(1 << 15)
    for signs in ([1, 3], [1, (1 << 18) - 1], [5, 7, 9, 11]):
        large[signs] *= -1
        assert (fingerprints(parameters) == before).tolist() == [True, False, True], signs
        large[signs] *= -1
    shifted = torch.cat([torch.zeros(1), large])[1:]  # a parameter may begin between two words of a buffer
    assert fingerprints([parameters[0], shifted, parameters[2]]).tolist() == before.tolist()


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

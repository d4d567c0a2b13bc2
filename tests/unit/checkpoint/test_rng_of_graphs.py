"""Random states with --cuda-graph-impl: mcore's tracker then holds generators, a checkpoint tensors all the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from umv2_megatron.parallel import cpu_platform

cpu_platform.install()

from umv2_megatron.checkpoint import rng_state  # noqa: E402


def test_generators_are_saved_as_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    tracker = SimpleNamespace(get_states=lambda: {"graphs": generator, "plain": torch.get_rng_state()})
    monkeypatch.setattr(rng_state.tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    saved = rng_state.sharded_rng_state().data["tracker"]
    assert torch.equal(saved["graphs"], generator.get_state()) and torch.equal(saved["plain"], torch.get_rng_state())

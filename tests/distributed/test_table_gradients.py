"""Table gradients under mcore's real DDP: main_grad after a step equals the mean of autograd's gradients.

Three memory layers, two of which share a table, several micro-batches, both lookups, overlapped reduction on and off,
with and without the distributed optimizer's sharded reduction, one and two data-parallel ranks, float64, fp32 and
bf16. Gradients are reduced in fp32 throughout.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from harness import run_ranks

HIDDEN, TOKENS, MICRO_BATCHES, STEPS = 16, 24, 3, 3


def build(backend: str, dtype: torch.dtype) -> torch.nn.Module:
    from umv2_megatron.config.memory_config import MemoryConfig
    from umv2_megatron.memory.layer import MemoryLayer
    from umv2_megatron.memory.sharing import table_windows

    config = MemoryConfig(num_keys=6, key_dim=8, value_dim=8, pre_value_dim=4, topk=4, backend=backend,
                          sharing="block", sharing_size=2, balance_loss_coeff=0.1)
    layers = torch.nn.ModuleList()
    for index, window in enumerate(table_windows(config, 4)[:3]):
        table = None if window.owner == index else layers[window.owner].table
        layers.append(MemoryLayer(config, HIDDEN, index, 4, 32, 4, window, table, params_dtype=dtype))
    return torch.nn.Sequential(*layers)


def batch(step: int, rank: int, micro: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    return torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    # Not a plain sum, so that every gradient is non-trivial; float, as a training loss is.
    return (x + model(x)).float().square().mean() * 10


def compare_with_autograd(backend: str, overlap: bool, sharded: bool, dtype: torch.dtype) -> list[str]:
    """Run on every rank; returns complaints."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from umv2_megatron.parallel import groups

    groups.initialize_groups()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
    # Two lookups round differently, and the next layer may then pick differently; in float64 no scores are that near.
    plain = build("reference" if dtype == torch.float64 else backend, dtype)
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap,
                                      use_distributed_optimizer=sharded, bucket_size=500 if overlap else None),
        build(backend, dtype),
    )
    complaints = []
    for step in range(STEPS):
        model.zero_grad_buffer()
        plain.zero_grad()
        for micro in range(MICRO_BATCHES):
            last = micro == MICRO_BATCHES - 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss_of(model, batch(step, rank, micro, dtype)).backward()
        model.finish_grad_sync()
        expected = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
        for other in range(world):
            for micro in range(MICRO_BATCHES):
                plain.zero_grad()
                loss_of(plain, batch(step, other, micro, dtype)).backward()
                for name, parameter in plain.named_parameters():
                    if parameter.grad is not None:
                        expected[name] += parameter.grad.float() / world
        complaints += _differences(model, expected, sharded, step, dtype)
    return complaints


def _differences(model, expected, sharded: bool, step: int, dtype: torch.dtype) -> list[str]:
    complaints = []
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for name, parameter in model.module.named_parameters():
        actual, wanted = parameter.main_grad, expected[name]
        if sharded and torch.distributed.get_world_size() > 1:
            # Reduce-scatter leaves this rank's shard only; compare where it has been reduced.
            actual, wanted = _own_shard(model, parameter, wanted)
        if wanted.numel() and (actual - wanted).abs().max() > tolerance * max(expected[name].abs().max(), 1e-12):
            complaints.append(f"step {step}: {name} is off by {(actual - wanted).abs().max():.2e}")
        if parameter.grad is not None:
            complaints.append(f"step {step}: {name}.grad is still there")
        if getattr(parameter, "is_memory_table", False) and not expected[name].any():
            complaints.append(f"step {step}: {name} got no gradient, so nothing was compared")
    return complaints


def _own_shard(model, parameter, wanted):
    """The elements of ``parameter`` in this rank's part of its bucket."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for buffer in model.buffers + model.expert_parallel_buffers:
        if parameter not in buffer.param_index_map:
            continue
        start, end, bucket_id = buffer.param_index_map[parameter]
        bucket = buffer.buckets[bucket_id]
        size = bucket.grad_data.numel() // world
        low = max(start, bucket.offset + rank * size)
        high = max(low, min(end, bucket.offset + (rank + 1) * size))
        part = slice(max(0, low - start), max(0, high - start))
        return parameter.main_grad.flatten()[part], wanted.flatten()[part]
    raise AssertionError("no buffer holds the parameter")


@pytest.mark.parametrize(
    "world,backend,overlap,sharded,dtype",
    [
        (1, "scatter", False, False, torch.float64),
        (1, "scatter", True, False, torch.float64),
        (1, "reference", True, False, torch.float64),
        (1, "scatter", True, True, torch.bfloat16),
        (2, "scatter", True, True, torch.float32),
        (2, "scatter", False, False, torch.float64),
        (2, "scatter", True, True, torch.float64),
        (2, "reference", False, True, torch.float64),
    ],
)
def test_main_grad_equals_autograd(world: int, backend: str, overlap: bool, sharded: bool, dtype: torch.dtype) -> None:
    for complaints in run_ranks(world, compare_with_autograd, backend, overlap, sharded, dtype):
        assert not complaints, "\n".join(complaints)

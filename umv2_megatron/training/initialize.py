"""Start of a run: process groups, seeds, tokenizer, model, optimizer, and the checkpoint it resumes from."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    init_num_microbatches_calculator,
    reconfigure_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import MegatronOptimizer

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.model.builder import build_model_chunks
from umv2_megatron.ops import get_backend, registry
from umv2_megatron.parallel import cpu_platform, groups, launch
from umv2_megatron.training.optimizer import ParamScheduler, build_optimizer, build_scheduler


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint. Counts are totals since the run's first step.

    Samples are numbered in the order of the training set. ``left_out``: ranges [first, end) of those that are in no
    update of the weights. The windows hold losses and gradient norms of the last updates, with --spike-policy.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    nan_iterations: int = 0
    skipped_in_a_row: int = 0
    interval_loss_sum: float = 0.0
    interval_steps: int = 0
    spikes: int = 0
    rewinds: int = 0
    rewound_to: int = -1
    rewinds_to_same: int = 0
    undone_iterations: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    window_losses: list[float] = field(default_factory=list)
    window_grad_norms: list[float] = field(default_factory=list)


@dataclass
class TrainingState:
    """Everything that training changes."""

    chunks: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: ParamScheduler
    progress: Progress = field(default_factory=Progress)


def start_processes(run: RunConfig) -> launch.Launch:
    """Join the process group, make mcore's groups and seed all generators.

    Raises ``UsageError`` before anything is joined where the environment does not suit the run.
    """
    if run.tensor_model_parallel_size > 1 or run.context_parallel_size > 1:
        cpu_platform.start_kernels_in_order()
    if run.deterministic_mode:  # cuBLAS and Transformer Engine read these at their first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    started = launch.initialize_process_group(run.training.distributed_timeout_minutes)
    with launch.ends_at_signals(f"rank {started.rank} makes groups with {started.world_size - 1} others"):
        make_groups(run)
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(
        started.rank, None, run.global_batch_size, run.training.micro_batch_size, run.data_parallel_size
    )
    seed_everything(run.training.seed, in_graphs=run.cuda_graph_impl != "none")
    if run.deterministic_mode:
        torch.use_deterministic_algorithms(True, warn_only=True)
    return started


def tell_batch(run: RunConfig, batch: int) -> None:
    """Tell mcore the samples of the next step, ``batch``: the balance loss (memory/losses.py) and mcore divide by the
    micro-batches of a step. mcore's own ramp-up is not used; since 0.19 it has none, and leaves the flag out silently.
    """
    if batch != get_current_global_batch_size():
        reconfigure_num_microbatches_calculator(
            torch.distributed.get_rank(), None, batch, run.training.micro_batch_size, run.data_parallel_size
        )


def make_groups(run: RunConfig, gloo_twins: bool = True) -> None:
    """mcore's process groups of ``run``, among them the memory-parallel one; the group of the whole run must exist.

    ``gloo_twins``: also gloo twins of the data-parallel groups, for checkpoints.
    """
    groups.initialize_groups(
        tp=run.tensor_model_parallel_size,
        pp=run.pipeline_model_parallel_size,
        vpp=run.virtual_pipeline_size,
        cp=run.context_parallel_size,
        memory_parallel_size=run.memory.parallel_size,
        expert_model_parallel_size=run.expert_model_parallel_size,
        num_distributed_optimizer_instances=run.num_distributed_optimizer_instances,
        timeout_minutes=run.training.distributed_timeout_minutes,
        create_gloo_process_groups=gloo_twins,
    )


def seed_everything(seed: int, in_graphs: bool = False) -> None:
    """Seed Python, NumPy, torch and mcore's tensor-parallel generators; pipeline stages differ, replicas do not.

    ``in_graphs``: CUDA graphs may draw from mcore's generators.
    """
    staged = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(staged)
    np.random.seed(staged % 2**32)
    torch.manual_seed(staged)
    tensor_parallel.model_parallel_cuda_manual_seed(staged, use_cudagraphable_rng=in_graphs)


def build_training_state(run: RunConfig, vocab_size: int) -> TrainingState:
    """Model, optimizer and schedule at step 0.

    Raises ``ValueError`` naming --memory-backend where that lookup cannot run on this machine.
    """
    if run.has_memory:
        get_backend(run.memory.backend, cpu_platform.device())  # may have to be compiled: before the first step
    chunks = build_model_chunks(run, vocab_size)
    optimizer = build_optimizer(run, chunks)
    return TrainingState(chunks, optimizer, build_scheduler(run, optimizer))


def told_backend(run: RunConfig) -> str:
    """Which lookup this run uses, and why ``auto`` does not take a faster one, for the log."""
    if not run.has_memory:
        return "memory backend: none"
    device = cpu_platform.device()
    reason = registry.choice(torch.device(device).type)[1] if run.memory.backend == "auto" else ""
    name = get_backend(run.memory.backend, device).name
    return f"memory backend: {name}{f' ({reason})' if reason else ''}"


def print_rank_0(text: str) -> None:
    """Print on the first rank only."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, flush=True)


def is_last_rank() -> bool:
    """Whether this is the rank that reports: the last one, which sits on the last pipeline stage."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def device_memory_gib() -> float:
    """Largest amount of memory used so far on this rank's device, in GiB."""
    return cpu_platform.max_memory_allocated() / 2**30

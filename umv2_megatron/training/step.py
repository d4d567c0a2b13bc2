"""One training step and one evaluation, through mcore's pipeline schedules (also with a single stage)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.data.batches import next_batch
from umv2_megatron.memory.retrieval import refresh_together
from umv2_megatron.model.builder import evaluation_mode, unwrap
from umv2_megatron.model.ffn_with_memory import gather_before_forks, memory_layers
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.optimizer import ParamScheduler, StepResult, guarded_step
from umv2_megatron.training.ranges import NO_RANGES, NoRanges

LOSS = "lm loss"


def loss_of_microbatch(
    loss_mask: torch.Tensor, per_token: bool, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """What mcore's schedule wants of the last stage: sum of the masked token losses, token count, and both to report.

    ``losses`` and ``loss_mask`` are [b, s/CP]: this rank's part of the sequence. ``per_token``: the schedule divides by
    the tokens of the whole global batch (--calculate-per-token-loss). Otherwise it divides by the count returned here,
    and mcore averages gradients over data- and context-parallel ranks. As the parts of a sequence may bear different
    numbers of losses, the count is then that of the whole micro-batch, and the sum is taken CP times.
    """
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum()
    report = {LOSS: torch.stack([total.detach(), tokens])}
    parts = parallel_state.get_context_parallel_world_size()
    if parts > 1 and not per_token:
        total, tokens = total * parts, tokens.clone()
        torch.distributed.all_reduce(tokens, group=parallel_state.get_context_parallel_group())
    return total, tokens.to(torch.int), report


def forward_step(iterator: Iterator, model: torch.nn.Module, *, ranges: NoRanges = NO_RANGES):
    """mcore's ``forward_step_func``: one micro-batch through this stage."""
    with ranges("data"):
        batch = next_batch(iterator)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        packed_seq_params=batch["packed_seq_params"],
    )
    per_token = get_model_config(model).calculate_per_token_loss
    return output, functools.partial(loss_of_microbatch, batch["loss_mask"], per_token)


def connect(run: RunConfig, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
    """Tell mcore's schedules how this model's gradients are scaled, held back, reduced and finished."""
    config = get_model_config(chunks[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if run.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        starts = [chunk.start_grad_sync for chunk in chunks]
        config.grad_sync_func = starts if len(starts) > 1 else starts[0]
    if run.overlap_param_gather and run.memory.stream:
        for chunk in chunks:
            gather_before_forks(chunk, run.align_param_gather)
    if run.overlap_param_gather and run.align_param_gather:
        gathers = [chunk.start_param_sync for chunk in chunks]
        config.param_sync_func = gathers if len(gathers) > 1 else gathers[0]


def refresh_singular_vectors(chunks: list[torch.nn.Module], *, at_next_forward: bool = False) -> None:
    """u, t of every memory layer from its present cores: before the micro-batches of an optimizer step, after a load,
    and before an evaluation.

    Every rank computes them from equal cores with the same routine, so they stay equal on all ranks.
    ``at_next_forward`` waits for the layer's first forward, where --overlap-param-gather has its cores ready.
    """
    for chunk in chunks:
        retrievals = [layer.retrieval for _, layer in memory_layers(unwrap(chunk)) if layer.retrieval is not None]
        if at_next_forward:
            for retrieval in retrievals:
                retrieval.refresh_due = True
        else:
            refresh_together(retrievals)


def train_step(
    run: RunConfig,
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: ParamScheduler,
    iterator: Any,
    ranges: NoRanges = NO_RANGES,
    wants_to_stop: Callable[[], bool] = lambda: False,
    accepts: Callable[[float, float], bool] = lambda loss, grad_norm: True,
    batch: int | None = None,
) -> StepResult:
    """Gradients of one global batch, the check, and the update; ``ranges`` is told what begins and ends. ``batch``: its
    samples, where --rampup-batch-size makes them fewer than in the end.

    The result's loss is in nats per token, the mean over the global batch, the same on every rank. ``wants_to_stop``,
    ``accepts``: as in ``guarded_step``.
    """
    batch = run.global_batch_size if batch is None else batch
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    if run.overlap_param_gather:
        refresh_singular_vectors(chunks, at_next_forward=True)
    else:
        with ranges("u, t refresh"):
            refresh_singular_vectors(chunks)
    reports = _run_schedule(run, chunks, iterator, forward_only=False, ranges=ranges, batch=batch)
    loss = _mean_loss(reports)
    if run.training.empty_unused_memory_level >= 1 and torch.cuda.is_available():
        torch.cuda.empty_cache()
    with ranges("optimizer"):
        result = guarded_step(optimizer, loss, wants_to_stop, accepts)
    if run.training.empty_unused_memory_level == 2 and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if result.updated:
        scheduler.step(increment=batch)
    return result


def _run_schedule(
    run: RunConfig,
    chunks: list[torch.nn.Module],
    iterator: Any,
    *,
    forward_only: bool,
    ranges: NoRanges = NO_RANGES,
    batch: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """One global batch through mcore's schedule; the last stage's reports, one per micro-batch."""
    joined = run.training.micro_batch_size if run.data.packs_documents else 1  # samples in a row of the model's input
    return get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, ranges=ranges),
        data_iterator=iterator,
        model=chunks,
        num_microbatches=run.num_microbatches if batch is None else run.microbatches_of(batch),
        seq_length=run.model.seq_length * joined,
        micro_batch_size=run.training.micro_batch_size // joined,
        decoder_seq_length=run.model.seq_length * joined,
        forward_only=forward_only,
    )


def _mean_loss(reports: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean loss per token over all micro-batches and data-parallel ranks, a scalar on the device; told to every
    pipeline stage."""
    total = _summed(reports)
    return total[0] / total[1].clamp(min=1)  # no token may bear a loss (--loss-start-token)


def _summed(reports: list[dict[str, torch.Tensor]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sum of losses and number of tokens over all micro-batches and data-parallel ranks, [2] on the device; told to
    every pipeline stage."""
    total = torch.zeros(2, device=cpu_platform.device(), dtype=dtype)
    if reports:
        total = torch.stack([report[LOSS] for report in reports]).to(dtype).sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            total,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return total


def evaluate(run: RunConfig, chunks: list[torch.nn.Module], iterator: Any, batches: int) -> tuple[float, float]:
    """Sum of the losses and number of tokens that bear one, of ``batches`` global batches, the same on every rank."""
    refresh_singular_vectors(chunks)
    reports: list[dict[str, torch.Tensor]] = []
    with evaluation_mode(chunks):
        for _ in range(batches):
            reports += _run_schedule(run, chunks, iterator, forward_only=True)
    total, tokens = _summed(reports, torch.float64).tolist()
    return total, tokens


def non_finite_parameters(chunks: list[torch.nn.Module]) -> list[str]:
    """Names of the parameters whose gradient, or whose value, is not finite on this rank."""
    found = []
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if gradient is not None and not torch.isfinite(gradient).all():
                found.append(f"gradient of {name}")
            if not torch.isfinite(parameter).all():
                found.append(f"value of {name}")
    return found

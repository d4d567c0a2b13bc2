"""Numbers of the log that all ranks find together: of memory layers, of experts, and the norm of the parameters."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

from umv2_megatron.model.builder import unwrap
from umv2_megatron.model.ffn_with_memory import memory_layers
from umv2_megatron.parallel import groups


def start_counting(chunks: list[torch.nn.Module]) -> None:
    """Count the memory layers' row usage afresh from the next training forward on."""
    for chunk in chunks:
        for _, layer in memory_layers(unwrap(chunk)):
            layer.collect_statistics(True)


def memory_statistics(chunks: list[torch.nn.Module]) -> dict[str, float]:
    """Statistics of every memory layer since ``start_counting``, as ``memory/<name>/layer_000``, those of n-gram layers
    beside others as ``engram/<name>/layer_000``; a collective.

    Rows are counted over all tokens of the interval: summed over all ranks of a pipeline stage, and collected from all
    stages. Tables sharded by row also report ``row_skew``: the picks that the busiest rank of a memory-parallel group
    served, over those of an average rank (1 is even, M is all on one rank), the largest of all groups. The auxiliary
    losses are those of this data-parallel rank's last micro-batch.
    """
    here: dict[str, float] = {}
    for chunk in chunks:
        for block, layer in memory_layers(unwrap(chunk)):
            statistics = layer.statistics
            assert statistics is not None, "start_counting was not called"
            numbers = {name: float(loss) for name, loss in layer.last_losses.items()}
            if layer.table.shard.by_row:
                numbers["row_skew"] = _row_skew(statistics.served_picks, layer.table.values.device)
            for tensor in statistics.tensors():
                for group in (groups.get_memory_parallel_group(), groups.get_memory_data_parallel_group()):
                    torch.distributed.all_reduce(tensor, group=group)
            numbers.update(statistics.summary(layer.singular_values()))
            family = layer.config.family
            here.update({f"{family}/{name}/layer_{block:03d}": value for name, value in numbers.items()})
    stages: list[dict[str, float]] = [{} for _ in range(parallel_state.get_pipeline_model_parallel_world_size())]
    torch.distributed.all_gather_object(stages, here, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: value for stage in stages for name, value in stage.items()}


def _row_skew(served: int, device: torch.device) -> float:
    """Picks of the busiest rank over those of an average one, from what this rank ``served``; the worst group's."""
    group = groups.get_memory_parallel_group()
    busiest = torch.tensor(float(served), dtype=torch.float64, device=device)
    total = busiest.clone()
    torch.distributed.all_reduce(busiest, op=torch.distributed.ReduceOp.MAX, group=group)
    torch.distributed.all_reduce(total, group=group)
    skew = busiest * group.size() / total.clamp(min=1)
    torch.distributed.all_reduce(skew, op=torch.distributed.ReduceOp.MAX, group=groups.get_memory_data_parallel_group())
    return float(skew)


def expert_losses(micro_batches: int) -> dict[str, float]:
    """Auxiliary losses of the experts, mean per micro-batch since the last call, as ``moe/<loss>/layer_000``.

    A collective. mcore's routers add each micro-batch's losses, without their coefficients, to one tracker of the
    process, which this clears. The numbers are the same in every layout.

    Args:
        micro_batches: forward passes of this rank since the last call.
    """
    ranks = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    numbers: dict[str, float] = {}
    for name, entry in sorted(get_moe_layer_wise_logging_tracker().items()):
        total = entry["values"].clone()
        torch.distributed.all_reduce(total, group=ranks)
        torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        # A balancing loss is a sum over the ranks that share a micro-batch, or that share the global batch; the others
        # (z-loss) are means over the rank's own tokens.
        if entry.get("reduce_group") is None:
            copies = ranks.size()
        else:
            copies = 1 if entry.get("reduce_group_has_dp") else parallel_state.get_data_parallel_world_size()
        for block, value in enumerate((total / (copies * micro_batches)).tolist()):
            numbers[f"moe/{name}/layer_{block:03d}"] = value
    clear_aux_losses_tracker()
    return numbers


def _sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares in float64 on the CPU, a few rows at a time: no float64 copy of a whole table."""
    flat = tensor.reshape(-1)
    chunk = 1 << 24
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for start in range(0, flat.numel(), chunk):
        total += flat[start : start + chunk].double().square().sum()
    return total.cpu()


def params_norm(chunks: list[torch.nn.Module]) -> float:
    """L2 norm of all parameters of the model, each counted once; a collective."""
    dense = torch.zeros((), dtype=torch.float64)
    tables = torch.zeros((), dtype=torch.float64)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for parameter in chunk.parameters():
            square = _sum_of_squares(parameter.detach())
            if not getattr(parameter, "allreduce", True):
                tables += square
            elif (getattr(parameter, "tensor_model_parallel", False) or tp_rank == 0) and not getattr(
                parameter, "shared", False
            ):
                dense += square
    device = next(chunks[0].parameters()).device
    dense, tables = dense.to(device), tables.to(device)
    torch.distributed.all_reduce(dense, group=parallel_state.get_model_parallel_group())
    torch.distributed.all_reduce(tables, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    return float((dense + tables).sqrt())

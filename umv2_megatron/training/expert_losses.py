"""Auxiliary losses of the experts (--ffn-variant moe) for the log.

mcore's routers add each micro-batch's losses, without their coefficients, to one tracker of the process, which is
cleared when it is read. The numbers are the same in every layout.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker


def take(micro_batches: int) -> dict[str, float]:
    """Mean per micro-batch since the last call, as ``moe/<loss>/layer_000``; clears the tracker. A collective.

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

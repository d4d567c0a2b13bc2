"""Loading the distributed optimizer's state from checkpoints of mcore's type "dp_reshardable".

Checkpoints were saved so until `optimizer_state.py` came. The tensors are those of the gradient buffers, so only the
number of data-parallel ranks may differ between save and load.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.training.optimizer import KERNEL_CHOICES
from umv2_megatron.checkpoint.optimizer_state import allocate_moments, has_step_tensors, optimizer_parts

DP_RESHARDABLE = "dp_reshardable"


def collect(
    optimizer: Any, model_state: ShardedStateDict, metadata: dict[str, Any], *, is_loading: bool
) -> ShardedStateDict:
    """mcore's own sharded state of the optimizer."""
    for part in optimizer_parts(optimizer):
        # mcore asserts that a step count exists; its own remedy, a step with zero gradients, would decay the weights.
        allocate_moments(part)
    return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)


def check(optimizer: Any, saved: dict[str, int], present: dict[str, int], path: Path) -> None:
    """Refuse another layout: gradient buffers may have equal sizes by chance, and moments must not be mixed up."""
    if not all(isinstance(part, DistributedOptimizer) for part in optimizer_parts(optimizer)):
        raise CheckpointError(
            f"{path} was saved with {DP_RESHARDABLE} optimizer shards: load it with --use-distributed-optimizer, or "
            "give --no-load-optim"
        )
    for name, size in present.items():
        if name not in ("world", "context") and saved.get(name) != size:
            raise CheckpointError(
                f"{path} was saved with {name} parallel size {saved.get(name)} and {DP_RESHARDABLE} optimizer shards, "
                f"but this run has {size}: load and save it once with the size it was saved with, or give "
                "--no-load-optim"
            )


@torch.no_grad()  # fp32 main parameters are views of the model's parameters
def restore(optimizer: Any, state: Any) -> None:
    """Put what was loaded for `collect` into the optimizer."""
    parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    for part, part_state in zip(parts, states, strict=True):
        if has_step_tensors(part):
            _restore_part(part, part_state)
        else:
            part.load_state_dict(part_state)


def _restore_part(part: Any, state: dict[str, Any]) -> None:
    """Load in two halves, and keep the step counts out of the second, and the choice of kernels out of both.

    mcore 0.16.1 with torch's Adam makes all parameters share one step tensor (which then counts every parameter's
    update), and with the moments it puts back the step from before the load.
    """
    del state["param_state_sharding_type"]
    moments = state.pop("param_state")
    kernels = [{key: group[key] for key in KERNEL_CHOICES} for group in part.optimizer.param_groups]
    part.load_state_dict(state)
    steps = {param: entry.pop("step") for param, entry in part.optimizer.state.items()}
    part.load_parameter_state_from_dp_reshardable(moments)
    for group, own in zip(part.optimizer.param_groups, kernels, strict=True):
        group.update(own)
        for param in group["params"]:
            device = param.device if group["fused"] else "cpu"  # as in `allocate_moments`
            part.optimizer.state[param]["step"] = steps[param].to(device, copy=True)

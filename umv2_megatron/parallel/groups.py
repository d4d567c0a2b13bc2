"""Process groups of a run: mcore's, and among them the memory-parallel group.

Value tables are split over M ranks as mcore splits experts: the memory-parallel group is laid out like an
expert-parallel group whose expert tensor size is 1, over the TP x CP x DP ranks of one pipeline stage. mcore's DDP and
optimizer then reduce, scale and clip the gradients of parameters marked ``allreduce = False`` over the ranks that hold
the same shard (``get_memory_data_parallel_group``), which is what value tables need.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state


def initialize_groups(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    memory_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    num_distributed_optimizer_instances: int = 1,
    timeout_minutes: float = 10.0,
    create_gloo_process_groups: bool = True,
) -> None:
    """Make all process groups; ``torch.distributed`` must be initialised.

    Args:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        vpp: model chunks per pipeline rank (interleaved schedule), None for one.
        cp: context-parallel size.
        memory_parallel_size: M, the number of ranks that hold one table together.
        expert_model_parallel_size: for ``--ffn-variant moe``; shares its ranks with the memory-parallel group, so at
            most one of the two may be more than 1.
        num_distributed_optimizer_instances: replicas of the distributed optimizer's state.
        timeout_minutes: how long a collective may take (minutes).
        create_gloo_process_groups: also make gloo twins of the data-parallel groups (for CPU-side checkpoint traffic).

    Raises:
        ValueError: sizes that do not fit each other or the number of ranks.
    """
    check_sizes(torch.distributed.get_world_size(), tp, pp, vpp, cp, memory_parallel_size, expert_model_parallel_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=max(memory_parallel_size, expert_model_parallel_size),
        expert_tensor_parallel_size=1,
        num_distributed_optimizer_instances=num_distributed_optimizer_instances,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=create_gloo_process_groups,
    )


def check_sizes(
    world_size: int,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    memory_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
) -> None:
    """Check parallel sizes against each other and the number of ranks; needs no process group.

    Raises:
        ValueError: one sentence that names the flag.
    """
    sizes = {
        "--tensor-model-parallel-size": tp,
        "--pipeline-model-parallel-size": pp,
        "--context-parallel-size": cp,
        "--memory-parallel-size": memory_parallel_size,
        "--expert-model-parallel-size": expert_model_parallel_size,
    }
    for flag, size in sizes.items():
        if size < 1:
            raise ValueError(f"{flag} is {size}, expected 1 or more; give the number of ranks to split over.")
    if world_size % (tp * pp * cp):
        raise ValueError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = "
            f"{tp * pp * cp} does not divide the {world_size} ranks of this run; change the sizes or start another "
            "number of ranks."
        )
    if vpp is not None and (vpp < 2 or pp < 2):
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage makes {vpp} chunks per rank with --pipeline-model-parallel-size "
            f"{pp}, expected 2 or more of both; leave it out or change the sizes."
        )
    per_stage = world_size // pp
    for flag in ("--memory-parallel-size", "--expert-model-parallel-size"):
        if per_stage % sizes[flag]:
            raise ValueError(
                f"{flag} {sizes[flag]} does not divide the {per_stage} ranks of a pipeline stage; "
                f"choose a divisor of {per_stage}."
            )
    if memory_parallel_size > 1 and expert_model_parallel_size > 1:
        raise ValueError(
            f"--memory-parallel-size {memory_parallel_size} and --expert-model-parallel-size "
            f"{expert_model_parallel_size} share their ranks, expected at most one of them above 1; set one to 1."
        )


def destroy_groups() -> None:
    """Forget mcore's process groups (the process group of the whole run stays)."""
    parallel_state.destroy_model_parallel()


def get_memory_parallel_group() -> torch.distributed.ProcessGroup:
    """The M ranks that hold one table together, this rank among them."""
    return parallel_state.get_expert_model_parallel_group()


def get_memory_parallel_rank() -> int:
    """This rank's place in its memory-parallel group, 0 to M - 1; 0 before the groups are made."""
    group = parallel_state.get_expert_model_parallel_group(check_initialized=False)
    return 0 if group is None else group.rank()


def get_memory_parallel_world_size() -> int:
    """M; 1 before the groups are made."""
    group = parallel_state.get_expert_model_parallel_group(check_initialized=False)
    return 1 if group is None else group.size()


def get_memory_data_parallel_group() -> torch.distributed.ProcessGroup:
    """The ranks that hold the same table shard as this one; table gradients are reduced over them."""
    return parallel_state.get_expert_data_parallel_group()


def get_memory_data_parallel_world_size() -> int:
    """Number of ranks that hold the same table shard."""
    return get_memory_data_parallel_group().size()

"""--check-replicas-interval: whether the ranks that hold copies of the same parameters still hold equal bits.

Replicas start equal and get the same gradients, so a difference is a fault: a bit of memory that flipped, a device that
computes wrongly, a collective that delivered other numbers. Training would go on with a normal-looking loss.

Each rank computes one 64-bit checksum per parameter on its device (``checkpoint/tensor_checks.py``); the checksums are
gathered and compared over the replicas: data- and context-parallel ranks for dense parameters, the ranks that hold the
same shard for value tables and experts.

mcore's ``check_param_hashes_across_dp_replicas`` answers yes or no, hashes a float32 copy of every parameter on the
host (SHA-1), and leaves out context-parallel replicas; here the rank and the parameters are named.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from umv2_megatron.checkpoint.save_load import gathered_parameters
from umv2_megatron.checkpoint.tensor_checks import checksums
from umv2_megatron.config.usage import TrainingStopped
from umv2_megatron.model.builder import unwrap
from umv2_megatron.parallel import groups


def check_replicas(chunks: list[torch.nn.Module], iteration: int) -> None:
    """Compare the parameters of ``chunks`` over their replicas. A collective.

    Raises ``TrainingStopped`` on all ranks, with the ranks and the first parameters that differ.
    """
    with gathered_parameters(chunks):
        found = [sentence for sentence in _differences(chunks) if sentence]
    everywhere: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, found)
    told = list(dict.fromkeys(sentence for here in everywhere for sentence in here))
    if told:
        more = f", and {len(told) - 3} more groups of replicas differ" if len(told) > 3 else ""
        raise TrainingStopped(
            f"--check-replicas-interval: after iteration {iteration} {'; '.join(told[:3])}{more}; this state is not "
            "saved: find the faulty host or device, then start the same command, which goes on from the last checkpoint"
        )


def _differences(chunks: list[torch.nn.Module]) -> Iterator[str | None]:
    """A sentence, or None, for the dense parameters and for the shards of tables or experts of this rank."""
    dense: dict[str, torch.Tensor] = {}
    shards: dict[str, torch.Tensor] = {}
    for number, chunk in enumerate(chunks):
        prefix = f"chunk {number}: " if len(chunks) > 1 else ""
        for name, parameter in unwrap(chunk).named_parameters():
            kind = dense if getattr(parameter, "allreduce", True) else shards
            kind[prefix + name] = parameter
    yield _difference(dense, parallel_state.get_data_parallel_group(with_context_parallel=True))
    yield _difference(shards, groups.get_memory_data_parallel_group())


def _difference(parameters: dict[str, torch.Tensor], group: torch.distributed.ProcessGroup) -> str | None:
    if not parameters or group.size() == 1:
        return None
    here = fingerprints(list(parameters.values()))
    gathered = [torch.empty_like(here) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, here, group=group)
    rows = [tuple(row.tolist()) for row in gathered]
    if len(set(rows)) == 1:
        return None
    hosts: list[str] = [""] * group.size()
    torch.distributed.all_gather_object(hosts, socket.gethostname(), group=group)
    members = [f"{rank} ({host})" for rank, host in zip(torch.distributed.get_process_group_ranks(group), hosts)]
    return verdict(list(parameters), rows, members)


def fingerprints(parameters: list[torch.Tensor]) -> torch.Tensor:
    """The checksum of each parameter as int64 [parameters], on their device."""
    found = [number - (1 << 63) for number in checksums(parameters)]
    return torch.tensor(found, dtype=torch.int64, device=parameters[0].device)


def verdict(names: list[str], rows: list[tuple[int, ...]], members: list[str]) -> str:
    """Who differs in what: the minority where more than half of the ranks agree, else all.

    Args:
        names: of the parameters.
        rows: the checksums of every rank, not all equal.
        members: the ranks, for the message.
    """
    common, count = Counter(rows).most_common(1)[0]
    different = [name for place, name in enumerate(names) if len({row[place] for row in rows}) > 1]
    more = f" and {len(different) - 3} more parameters" if len(different) > 3 else ""
    where = ", ".join(different[:3]) + more
    if 2 * count <= len(rows):
        return f"ranks {', '.join(members)} differ in {where}, and no majority tells which is wrong"
    wrong = [member for member, row in zip(members, rows) if row != common]
    ranks = f"rank {wrong[0]} differs" if len(wrong) == 1 else f"ranks {', '.join(wrong)} differ"
    return f"{ranks} from {count} equal replicas in {where}"

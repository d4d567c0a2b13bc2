"""--check-replicas-interval: whether the ranks that hold copies of the same parameters still hold equal bits.

Replicas start equal and get the same gradients, so a difference is a fault: a bit of memory that flipped, a device that
computes wrongly, a collective that delivered other numbers. Training would go on with a normal-looking loss.

Each rank computes one 64-bit checksum per parameter on its device; the checksums are gathered and compared over the
replicas: data- and context-parallel ranks for dense parameters, the ranks that hold the same shard for value tables and
experts. Every change inside one 64-bit word changes the checksum, and any other nearly always.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from umv2_megatron.checkpoint.save_load import gathered_parameters
from umv2_megatron.config.usage import TrainingStopped
from umv2_megatron.model.builder import unwrap
from umv2_megatron.parallel import groups

_CHUNK = 1 << 18
"""Bytes that are multiplied at once: what a core's cache holds."""
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_NEXT = 0x2545F4914F6CDD1D


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all 64-bit words of word times an odd number that depends on its place, modulo 2^64.

    A scalar int64 on the device of ``tensor``. Whole numbers, so that the order of the sum is of no matter.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    places = torch.arange(min(_CHUNK, data.numel() + 7) // 8, dtype=torch.int64, device=data.device)
    odd = places * _STEP | 1
    for start in range(0, data.numel(), _CHUNK):
        part = data[start : start + _CHUNK]
        if part.numel() % 8:
            part = torch.nn.functional.pad(part, (0, -part.numel() % 8))
        elif part.data_ptr() % 8 or part.storage_offset() % 8:
            part = part.clone()
        words = part.view(torch.int64)
        total = total * _NEXT + (words * odd[: words.numel()]).sum()
    return total


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
    here = torch.stack([checksum(parameter) for parameter in parameters.values()])
    gathered = [torch.empty_like(here) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, here, group=group)
    rows = [tuple(row.tolist()) for row in gathered]
    if len(set(rows)) == 1:
        return None
    hosts: list[str] = [""] * group.size()
    torch.distributed.all_gather_object(hosts, socket.gethostname(), group=group)
    members = [f"{rank} ({host})" for rank, host in zip(torch.distributed.get_process_group_ranks(group), hosts)]
    return verdict(list(parameters), rows, members)


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

"""Which collective a stack of frames is in, and where in the code, in words for whoever reads why a run ended."""

from __future__ import annotations

from typing import Any

import torch

_TELLING = ("/megatron/", "/umv2_megatron/")
"""Parts of the names of files whose lines tell a reader more than torch's own."""


def collective(frames: list[tuple[Any, int]], world_size: int) -> tuple[Any, str]:
    """The group of the collective in the innermost of ``frames``, None if it is not told there, and a name for both.

    torch's functions and mcore's buckets keep the group in a variable or attribute.

    Args:
        frames: (frame, line) from the outermost to the innermost.
        world_size: as in ``ranks_of``.
    """
    telling = [item for item in frames if any(part in item[0].f_code.co_filename for part in _TELLING)]
    where = place_in_code(*(telling or frames)[-1]) if frames else "an unknown place"
    values: list[Any] = []
    for frame, _ in reversed(frames):
        values += frame.f_locals.values()
        values += getattr(frame.f_locals.get("self"), "__dict__", {}).values()
    group = next((value for value in values if isinstance(value, torch.distributed.ProcessGroup)), None)
    return group, f"{_name(group)} {told(ranks_of(group, world_size))}: a collective at {where}"


def place_in_code(frame: Any, line: int) -> str:
    """File, line and function for a reader: the file without what leads to packages."""
    file = frame.f_code.co_filename.rpartition("site-packages/")[2]
    return f"{'/'.join(file.split('/')[-4:])}:{line} in {frame.f_code.co_name}"


def ranks_of(group: Any, world_size: int) -> list[int]:
    """The ranks of ``group`` (None: all); those of a run of ``world_size`` ranks where it is not known to torch."""
    try:
        return torch.distributed.get_process_group_ranks(group)
    except (KeyError, ValueError):  # a group in the making, or none any more
        return list(range(world_size))


def told(ranks: list[int]) -> str:
    """``ranks`` in brackets, at most 16 of them."""
    return str(ranks) if len(ranks) <= 16 else f"[{', '.join(map(str, ranks[:15]))}, ... {ranks[-1]}]"


def _name(group: Any) -> str:
    if group is None or group is torch.distributed.group.WORLD:
        return "all ranks"
    return f"group {group.group_desc.removesuffix(':')}"

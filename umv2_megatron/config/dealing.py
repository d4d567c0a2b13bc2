"""How replicas share whole parameters (--optimizer dist_muon); used by training and by the planner."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """For parameters of ``sizes`` elements, which of ``ranks`` ranks updates each: the largest first, each to the rank
    with the fewest elements so far. Depends on sizes and order alone, so that all ranks find the same."""
    loads, owners = [(0, rank) for rank in range(ranks)], [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        load, owners[place] = loads[0]
        heapq.heapreplace(loads, (load + sizes[place], owners[place]))
    return owners

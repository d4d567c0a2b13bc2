"""Sizes that do not fit are named by their flag; the memory groups are laid out as documented."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))

from harness import run_ranks  # noqa: E402


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({"world_size": 4, "tp": 3}, "--tensor-model-parallel-size 3"),
        ({"world_size": 4, "tp": 2, "pp": 4}, "does not divide the 4 ranks"),
        ({"world_size": 4, "cp": 0}, "--context-parallel-size is 0"),
        ({"world_size": 4, "pp": 2, "memory_parallel_size": 4}, "--memory-parallel-size 4"),
        ({"world_size": 6, "expert_model_parallel_size": 4}, "--expert-model-parallel-size 4"),
        ({"world_size": 2, "vpp": 2}, "--num-layers-per-virtual-pipeline-stage"),
        ({"world_size": 2, "pp": 2, "vpp": 1}, "--num-layers-per-virtual-pipeline-stage"),
        ({"world_size": 4, "memory_parallel_size": 2, "expert_model_parallel_size": 2}, "at most one"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], names: str) -> None:
    from umv2_megatron.parallel.groups import check_sizes

    with pytest.raises(ValueError, match=names) as error:
        check_sizes(**sizes)
    assert "\n" not in str(error.value)


def test_two_stages_of_two_chunks_fit() -> None:
    from umv2_megatron.parallel.groups import check_sizes

    check_sizes(world_size=2, pp=2, vpp=2)


def layout(**sizes: Any) -> tuple[int, int, list[int], list[int]]:
    import torch

    from umv2_megatron.parallel import groups

    assert (groups.get_memory_parallel_world_size(), groups.get_memory_parallel_rank()) == (1, 0)
    groups.initialize_groups(**sizes)
    ranks = torch.distributed.get_process_group_ranks
    told = (
        groups.get_memory_parallel_rank(),
        groups.get_memory_parallel_world_size(),
        ranks(groups.get_memory_parallel_group()),
        ranks(groups.get_memory_data_parallel_group()),
    )
    assert groups.get_memory_data_parallel_world_size() == len(told[3])
    groups.destroy_groups()
    return told


def test_memory_groups_span_tensor_and_data_parallel_ranks_of_a_stage() -> None:
    told = run_ranks(4, layout, tp=2, memory_parallel_size=2)
    assert told == [(0, 2, [0, 1], [0, 2]), (1, 2, [0, 1], [1, 3]), (0, 2, [2, 3], [0, 2]), (1, 2, [2, 3], [1, 3])]
    told = run_ranks(4, layout, pp=2, memory_parallel_size=2)
    assert [entry[2] for entry in told] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [entry[3] for entry in told] == [[0], [1], [2], [3]]


def test_whole_tables_are_reduced_over_all_ranks_of_a_stage() -> None:
    assert run_ranks(4, layout, tp=2) == [(0, 1, [rank], [0, 1, 2, 3]) for rank in range(4)]

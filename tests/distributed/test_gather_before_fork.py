"""--memory-stream with --overlap-param-gather: no parameter of a block is still on its way when its streams part."""

from __future__ import annotations

from typing import Any

import torch
from harness import run_ranks
from test_train_step import batches, build

SETTINGS = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
            "memory_stream": True, "global_batch_size": 4, "num_layers": 3, "ddp_bucket_size": 5000}  # fmt: skip


def unfinished_at_forks(gathers: bool, changes: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Buckets that had not arrived at each fork of two steps, and the losses; without waiting if not ``gathers``."""
    from umv2_megatron.model.ffn_with_memory import FFNWithMemory
    from umv2_megatron.parallel import streams
    from umv2_megatron.training import step

    run, state = build(**{**SETTINGS, **changes})
    (chunk,) = state.chunks
    blocks = [module for module in chunk.modules() if isinstance(module, FFNWithMemory)]
    found: list[int] = []
    entered: list[FFNWithMemory] = []

    class Branch(streams.Inline):
        def fork(self, x: torch.Tensor, tables: Any) -> torch.Tensor:
            used = {*entered[-1].parameters(), *tables}
            used &= set(chunk.param_to_bucket_group)
            groups = {id(group): group for group in (chunk.param_to_bucket_group[each] for each in used)}
            found.append(sum(not group.param_gather_dispatched or group.param_gather_handle is not None
                             for group in groups.values()))  # fmt: skip
            return x

    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: entered.append(module))
        if not gathers:
            block.before_fork = None
    streams.branch_for = lambda device, wanted: Branch()
    losses = [
        step.train_step(run, state.chunks, state.optimizer, state.scheduler, batches(run, number)).loss
        for number in (1, 2, 3)
    ]
    return found, losses


def test_all_buckets_of_a_block_have_arrived() -> None:
    for changes in ({}, {"memory_sharing": "ring", "memory_sharing_size": 2}):
        waiting = run_ranks(2, unfinished_at_forks, True, changes)
        without = run_ranks(2, unfinished_at_forks, False, changes)
        for (found, losses), (early, same) in zip(waiting, without):
            assert len(found) == 3 * 3 * 2 and not any(found), "three steps of two micro-batches and three blocks"
            assert any(early), "nothing to wait for: the test shows nothing"
            assert losses == same  # gloo has one order of work, so that nothing is read too early here


def losses_of(changes: dict[str, Any]) -> list[float]:
    """Losses of three steps and of an evaluation in between, for which mcore gathers everything at once."""
    from umv2_megatron.checkpoint.save_load import gathered_parameters
    from umv2_megatron.training import step

    run, state = build(**{**SETTINGS, **changes})
    told = []
    for number in (1, 2, 3):
        told.append(step.train_step(run, state.chunks, state.optimizer, state.scheduler, batches(run, number)).loss)
        with gathered_parameters(state.chunks):
            told += step.evaluate(run, state.chunks, batches(run, 9), 1)
    return told


def test_the_losses_are_those_without_a_second_stream() -> None:
    assert run_ranks(2, losses_of, {}) == run_ranks(2, losses_of, {"memory_stream": False})

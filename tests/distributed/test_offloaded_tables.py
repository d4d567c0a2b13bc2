"""State of the tables' optimizer on the host (--memory-value-optimizer-offload): the same training and the same
checkpoints as without, bit by bit, and each loads in the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from reshard import START, different, layout, open_layout, train, write_start

from umv2_megatron.checkpoint import optimizer_state
from umv2_megatron.checkpoint.save_load import load_checkpoint, weights_digest
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.memory import host_adam
from umv2_megatron.parallel import groups

pytestmark = pytest.mark.thorough

TABLES = {"memory_value_dim": 28, "memory_pre_value_dim": 20, "memory_layer_freq": [1, 1, 1, 0]}
ROW = {"memory_value_second_moment": "row"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout(**TABLES)),
    "dp2-dist-bf16": (2, layout(dist=True, bf16=True, **TABLES)),
    "m2-dim-bf16-decay-in-gradient": (2, layout(m=2, bf16=True, decoupled_weight_decay=False, **TABLES)),
    "pp2-vpp-dist": (2, layout(pp=2, vpp=True, dist=True, **TABLES)),
    "tp2-m2-row-dist-bf16-by-row": (2, layout(tp=2, m=2, mode="row", dist=True, bf16=True, **ROW, **TABLES)),
    "m2-dim-by-row": (2, layout(m=2, **ROW, **TABLES)),
    "dp4-m2-dim-dist-overlap-bf16-by-row": (
        4,
        layout(m=2, dist=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=3000, bf16=True,
               **ROW, **TABLES),
    ),
}  # fmt: skip


def start(directory: str, changes: dict[str, Any]) -> list[tuple[float, float]]:
    """``write_start`` with pieces that are smaller than the tables."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (host_adam.HostAdam, host_adam.HostRowAdam):
            patch.setattr(kind.__init__, "__defaults__", (*(kind.__init__.__defaults__ or ())[:-1], 64))
        return write_start(directory, changes, 2)


def go_on(directory: str, changes: dict[str, Any], load_optim: bool = True) -> Any:
    """Three steps after the checkpoint: losses and norms, the digest of the weights."""
    run, state = open_layout(changes, seed=5)
    load_checkpoint(
        CheckpointStore(directory), state.chunks, state.optimizer, state.scheduler, load_optim=load_optim
    )
    numbers = train(run, state, range(START, START + 3))
    digest = weights_digest(state.chunks)
    groups.destroy_groups()
    return numbers, digest


QUICK = ("m2-dim-by-row",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_the_same_bits_with_and_without(tmp_path: Path, name: str) -> None:
    world, changes = LAYOUTS[name]
    offloaded = {**changes, "memory_value_optimizer_offload": True}
    plain, ours = str(tmp_path / "plain"), str(tmp_path / "offloaded")
    assert run_ranks(world, start, plain, changes) == run_ranks(world, start, ours, offloaded)
    assert different(plain, ours) == []
    common = [torch.load(CheckpointStore(each).path(START) / "common.pt", weights_only=False) for each in (plain, ours)]
    assert str(common[0]) == str(common[1])
    expected = run_ranks(world, go_on, plain, changes)
    assert run_ranks(world, go_on, ours, changes) == expected
    assert run_ranks(world, go_on, plain, offloaded) == expected


@pytest.mark.slow
def test_another_layout_loads_it(tmp_path: Path) -> None:
    """From two ranks with shares of bf16 tables to one rank, which must go on as it does from the plain checkpoint."""
    world, changes = LAYOUTS["dp2-dist-bf16"]
    for name, offload in (("plain", False), ("offloaded", True)):
        run_ranks(world, start, str(tmp_path / name), {**changes, "memory_value_optimizer_offload": offload})
    target = {**layout(m=2, bf16=True, **TABLES), "memory_value_optimizer_offload": True}
    assert run_ranks(2, go_on, str(tmp_path / "offloaded"), target) == run_ranks(
        2, go_on, str(tmp_path / "plain"), {**target, "memory_value_optimizer_offload": False}
    )


@pytest.mark.slow
def test_without_the_saved_state_main_weights_follow_the_weights(tmp_path: Path) -> None:
    world, changes = LAYOUTS["dp2-dist-bf16"]
    run_ranks(world, start, str(tmp_path), changes)
    found = [
        run_ranks(world, go_on, str(tmp_path), {**changes, "memory_value_optimizer_offload": offload}, False)
        for offload in (False, True)
    ]
    assert found[0] == found[1]


def on_the_device(changes: dict[str, Any]) -> tuple[int, int]:
    """(bytes of what mcore's optimizer of the tables updates, those of main weights on the host) after a step."""
    run, state = open_layout({**changes, "memory_value_optimizer_offload": True}, seed=1)
    train(run, state, range(1))
    device = host = 0
    for part in optimizer_state.optimizer_parts(state.optimizer):
        if isinstance(part.optimizer, host_adam.HostAdam):
            for _, inner, _ in optimizer_state.inner_parameters(part):
                device += inner.untyped_storage().nbytes()
                host += host_adam.main_weights(part.optimizer, inner).untyped_storage().nbytes()
            assert part.get_parameters()
    groups.destroy_groups()
    return device, host


@pytest.mark.parametrize("dist", [False, True])
def test_no_main_weights_stay_on_the_device(dist: bool) -> None:
    device, host = run_ranks(1, on_the_device, layout(dist=dist, bf16=True, **TABLES))[0]
    assert device == 4 * 6 and host >= 4 * 25 * (28 + 20) * 3


def moved_when_built(changes: dict[str, Any]) -> int:
    """Tables whose first copy in float32 was made on the host."""
    from umv2_megatron.training import optimizer, table_optimizer

    made = []

    class Watched(table_optimizer.MainWeightsOnHost):
        def __init__(self, chunks: Any) -> None:
            super().__init__(chunks)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "MainWeightsOnHost", Watched)
        open_layout({**changes, "memory_value_optimizer_offload": True}, seed=1)
    groups.destroy_groups()
    return made[0].moved


@pytest.mark.parametrize("dist", [False, True])
def test_mcore_makes_no_main_weights_on_the_device(dist: bool) -> None:
    assert run_ranks(1, moved_when_built, layout(dist=dist, bf16=True, **TABLES)) == [6]

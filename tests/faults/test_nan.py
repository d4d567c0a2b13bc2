"""NaN in a loss, a gradient or a weight of one rank: no update is made of it, and no checkpoint holds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed.checkpoint
from program_runs import tiny_run, train
from torch.distributed.checkpoint import FileSystemReader

from umv2_megatron.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.faults


def plant(what: str, rank: int, at: int) -> None:
    """A NaN in the ``at``-th step of ``rank``."""
    import torch

    from umv2_megatron.training import loop, step

    train_step, guarded, losses, steps = loop.train_step, step.guarded_step, step.loss_of_microbatch, [0]

    def here() -> bool:
        return steps[0] == at and torch.distributed.get_rank() == rank

    def stepped(run, chunks, *arguments, **named):
        steps[0] += 1
        if here() and what == "weight":
            next(p for name, p in chunks[0].named_parameters() if "linear_fc1" in name).data.view(-1)[5] = float("nan")
        result = train_step(run, chunks, *arguments, **named)
        if here() and what == "table row":  # after the update, in a row that the next steps may not pick
            next(p for name, p in chunks[0].named_parameters() if "memory.table" in name).data[7, 3] = float("nan")
        if here() and what == "optimizer state":
            inner = arguments[0].chained_optimizers[0].optimizer
            inner.state[inner.param_groups[0]["params"][0]]["exp_avg"].view(-1)[2] = float("inf")
        return result

    def planted_loss(mask, per_token, found):
        return losses(mask, per_token, found * float("nan") if here() and what == "loss" else found)

    def planted_gradient(optimizer, *arguments):
        if here() and what == "gradient":
            optimizer.param_groups[0]["params"][0].main_grad.view(-1)[0] = float("nan")
        return guarded(optimizer, *arguments)

    loop.train_step, step.loss_of_microbatch, step.guarded_step = stepped, planted_loss, planted_gradient


def holds_nan(checkpoint: Path) -> list[str]:
    """The keys of tensors of a checkpoint, read by torch's own reader, that are not finite."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    state = {
        key: torch.empty(held.size, dtype=held.properties.dtype)
        for key, held in metadata.state_dict_metadata.items()
        if hasattr(held, "chunks") and held.properties.dtype.is_floating_point
    }
    assert len(state) > 20
    torch.distributed.checkpoint.load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]


@pytest.mark.parametrize(
    ("what", "policy"),
    [("loss", "stop"), ("loss", "skip"), ("gradient", "stop"), ("gradient", "skip"), ("weight", "stop")],
)
def test_planted(what, policy, figure, tmp_path):
    save = tmp_path / "run"
    argv = tiny_run(train_iters=6, save=save, save_interval=1, nan_policy=policy, num_layers=1)
    stops = policy == "stop"
    ended = train(2, argv, tmp_path / "o", plant, (what, 1, 4), codes=1 if stops else 0)
    assert re.search(r"iteration 4: loss \S+, gradient norm \S+ is not finite", ended.text), ended.text[-3000:]
    if what != "loss":
        assert re.search(r"iteration 4: .*; rank 1: (gradient|value) of ", ended.text), ended.text[-3000:]
    store = CheckpointStore(save)
    assert store.iterations()[-1] == (3 if stops else 6)
    for iteration in store.iterations():
        assert holds_nan(store.path(iteration)) == []
    told = "stopped before the update" if stops else "left out, went on"
    figure("6  NaN", f"in a {what}, --nan-policy {policy}: {told}, rank and iteration named, no NaN in a checkpoint")


@pytest.mark.parametrize("what", ["weight", "table row", "optimizer state"])
def test_found_by_the_save(what, figure, tmp_path):
    """What no loss or gradient shows, or --nan-policy skip would go on with: the save finds it, and fails."""
    save = tmp_path / "run"
    argv = tiny_run(train_iters=6, save=save, save_interval=1, nan_policy="skip", num_layers=1)
    ended = train(2, argv, tmp_path / "o", plant, (what, 0, 4), codes=1)
    errors = [line for line in ended.text.splitlines() if "pretrain_umv2.py: error: " in line]
    assert errors and "Traceback" not in ended.text, ended.text[-3000:]
    store = CheckpointStore(save)
    assert store.iterations()[-1] == 3
    assert [holds_nan(store.path(iteration)) for iteration in store.iterations()] == [[], []]
    named = {"weight": "linear_fc1", "table row": "memory.table", "optimizer state": "exp_avg"}[what]
    assert re.search(rf"{named}\S* holds (nan|inf) at \[.*\] on rank 0: nothing was saved", errors[0]), errors[0]
    figure("6  NaN", f"in a {what}: the save of that step fails and names it; no NaN in a checkpoint")

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
        return train_step(run, chunks, *arguments, **named)

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


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_planted(what, policy, figure, tmp_path):
    save = tmp_path / "run"
    argv = tiny_run(train_iters=6, save=save, save_interval=1, nan_policy=policy, num_layers=1)
    stops = policy == "stop" or what == "weight"  # which is not finite in any later step either
    if policy == "skip" and stops:
        argv += ["--max-skipped-iterations", "2"]
    ended = train(2, argv, tmp_path / "o", plant, (what, 1, 4), codes=1 if stops else 0)
    assert re.search(r"iteration 4: loss \S+, gradient norm \S+ is not finite", ended.text), ended.text[-3000:]
    if what != "loss":
        assert re.search(r"iteration 4: .*; rank 1: (gradient|value) of ", ended.text), ended.text[-3000:]
    store = CheckpointStore(save)
    if what == "weight" and policy == "skip":
        pytest.skip("a checkpoint of the steps between holds the NaN")
    assert store.iterations()[-1] == (3 if stops else 6)
    for iteration in store.iterations():
        assert holds_nan(store.path(iteration)) == []
    told = "stopped before the update" if stops else "left out, went on"
    figure("6  NaN", f"in a {what}, --nan-policy {policy}: {told}, rank and iteration named, no NaN in a checkpoint")

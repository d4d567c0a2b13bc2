"""A run that is saved, loaded into fresh processes and continued equals the run that went on: bit for bit.

tiny_gpt.py's model (with a table marked as value tables are, so that the optimizer is chained) on spawned gloo ranks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
from typing import Any

import pytest
import tiny_gpt
import torch
from harness import run_ranks
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from tiny_gpt import Layout

from umv2_megatron.checkpoint import publishing, save_load
from umv2_megatron.checkpoint.save_load import load_checkpoint, save_checkpoint, weights_digest
from umv2_megatron.checkpoint.saved_config import read_config
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.parallel import groups

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def make(layout: Layout) -> tuple[list, Any, OptimizerParamScheduler]:
    model, optimizer = tiny_gpt.build(layout)
    for group in optimizer.param_groups:
        group["min_lr"] = 1e-4
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, 1e-3, 1e-4, 2, 20, "cosine", 0.1, 0.1, 20, "constant", use_checkpoint_opt_param_scheduler=True
    )
    return model, optimizer, scheduler


def train(layout: Layout, run: tuple, steps: range) -> list[float]:
    model, optimizer, scheduler = run
    losses = []
    for step in steps:
        losses.append(tiny_gpt.train_step(layout, model, optimizer, step)[0])
        scheduler.step(increment=1)
    return losses


def optimizer_digest(optimizer: Any) -> str:
    """SHA-256 of this rank's main parameters, moments, step counts and group settings."""
    digest = hashlib.sha256()
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            digest.update(repr([group[k] for k in ("lr", "weight_decay", "betas", "is_expert_parallel")]).encode())
            for param in group["params"]:
                state = {"param": param} | part.optimizer.state[param]
                for name in sorted(state):
                    digest.update(f"{name} {state[name].dtype}".encode())
                    digest.update(state[name].detach().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class AsMcoreStores:
    """Stands for `OptimizerState`: saves what this program saved before, in mcore's types (None: without the
    distributed optimizer)."""

    kind: str | None = None

    def __init__(self, optimizer: Any, model_state: dict) -> None:
        self.given = (optimizer, model_state)

    def sharded(self) -> dict:
        metadata = save_load._content_metadata() | ({"distrib_optim_sharding_type": self.kind} if self.kind else {})
        made = tiny_gpt.as_mcore_stores(*self.given, metadata)
        for item in nested_values(made):
            if isinstance(item, ShardedTensor) and item.data is not None and item.data.is_floating_point():
                # mcore's buffers (dp_reshardable) end in padding that nobody has written; a save refuses NaN
                item.data.detach().nan_to_num_(0.0, 0.0, 0.0)
        return made


def save_as_before(root: str, run: tuple, kind: str | None, *others: Any) -> None:
    """A checkpoint of the kind that was written until optimizer state was stored by parameter."""
    preprocess = save_load.save_preprocess
    told = {"distrib_optim_sharding_type": kind} if kind else {}

    def rearranged(state: dict, **kwargs: Any) -> Any:
        state["optimizer"] = state.pop("optimizer_state")
        del state["optimizer_groups"]
        state["content_metadata"] |= told
        return preprocess(state, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsMcoreStores, "kind", kind)
        patch.setattr(save_load, "OptimizerState", AsMcoreStores)
        patch.setattr(save_load, "save_preprocess", rearranged)
        save_checkpoint(CheckpointStore(root), 3, *run, *others)


def saved_and_continued(root: str, layout: Layout, sharding: str | None = "by parameter") -> dict[str, Any]:
    run = make(layout)
    train(layout, run, range(3))
    here = {"weights": weights_digest(run[0]), "optimizer": optimizer_digest(run[1])}
    others = ({"consumed_samples": 12}, {"model": {"tiny": 1}})
    if sharding == "by parameter":
        save_checkpoint(CheckpointStore(root), 3, *run, *others)
    else:
        save_as_before(root, run, sharding, *others)
    assert here == {"weights": weights_digest(run[0]), "optimizer": optimizer_digest(run[1])}, "saving changed the run"
    losses = train(layout, run, range(3, 6))
    return {"saved": here, "losses": losses, "weights": weights_digest(run[0]), "optimizer": optimizer_digest(run[1])}


def resumed(root: str, layout: Layout, used: bool = False) -> dict[str, Any]:
    run = make(layout)
    if used:  # nothing of what a run did before the load may shine through
        train(layout, run, range(50, 51))
    loaded = load_checkpoint(CheckpointStore(root), *run)
    assert loaded.iteration == 3 and loaded.extra_state == {"consumed_samples": 12}
    here = {"weights": weights_digest(run[0]), "optimizer": optimizer_digest(run[1])}
    losses = train(layout, run, range(3, 6))
    return {
        "saved": here,
        "losses": losses,
        "weights": weights_digest(run[0]),
        "optimizer": optimizer_digest(run[1]),
        "rng": loaded.rng_restored,
    }


CASES = {
    "1 rank": (1, Layout()),
    "2 ranks, used": (2, Layout()),
    "2 ranks, bf16, distributed, used": (2, Layout(distributed_optimizer=True, bf16=True)),
    "PP 2, two chunks each": (2, Layout(pp=2, vpp=2, distributed_optimizer=True, untied=True)),
    "2 ranks, distributed, overlap": (2, Layout(distributed_optimizer=True, overlap=True)),
    "TP 2, distributed": (2, Layout(tp=2, distributed_optimizer=True)),
}
SLOW_CASES = {
    "1 rank, distributed": (1, Layout(distributed_optimizer=True)),
    "2 ranks, distributed": (2, Layout(distributed_optimizer=True)),
    "2 ranks, distributed, used": (2, Layout(distributed_optimizer=True)),
    "2 ranks, bf16": (2, Layout(bf16=True)),
    "PP 2, bf16, distributed, used": (2, Layout(pp=2, bf16=True, distributed_optimizer=True)),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_resume_is_bitwise(tmp_path, case):
    world, layout = (CASES | SLOW_CASES)[case]
    layout.table, layout.model = True, DROPOUT
    whole = run_ranks(world, saved_and_continued, str(tmp_path), layout)
    again = run_ranks(world, resumed, str(tmp_path), layout, used="used" in case)
    assert all(result.pop("rng") for result in again)
    assert again == whole
    assert read_config(CheckpointStore(tmp_path), 3) == {"model": {"tiny": 1}}


def finetuned(root: str, layout: Layout) -> tuple[str, str]:
    """Weights after a load without the optimizer's state, and after a step with learning rate 0, which rounds the
    float32 main parameters into them."""
    model, optimizer, scheduler = make(layout)
    load_checkpoint(CheckpointStore(root), model, optimizer, scheduler, load_optim=False, load_rng=False)
    loaded = weights_digest(model)
    train(layout, (model, optimizer, scheduler), range(1))
    return loaded, weights_digest(model)


@pytest.mark.parametrize("distributed", [False, True])
def test_without_optimizer_state_main_parameters_follow_the_weights(tmp_path, distributed):
    """--finetune in bfloat16: the first step starts from the loaded weights, not from those of the initialisation."""
    layout = Layout(bf16=True, table=True, distributed_optimizer=distributed)
    (saved,) = run_ranks(1, saved_and_continued, str(tmp_path), layout)
    assert run_ranks(1, finetuned, str(tmp_path), layout) == [(saved["saved"]["weights"],) * 2]


BEFORE = {
    "fully_reshardable": (Layout(distributed_optimizer=True), "fully_reshardable"),
    "fully_reshardable, bf16": (Layout(distributed_optimizer=True, bf16=True), "fully_reshardable"),
    "no distributed optimizer, bf16": (Layout(bf16=True), None),
}
QUICK_BEFORE = ("fully_reshardable, bf16", "no distributed optimizer, bf16")


@pytest.mark.parametrize(
    "case", [case if case in QUICK_BEFORE else pytest.param(case, marks=pytest.mark.slow) for case in BEFORE]
)
def test_checkpoints_of_before_still_load(tmp_path, case):
    layout, kind = BEFORE[case]
    layout.table, layout.model = True, DROPOUT
    whole = run_ranks(2, saved_and_continued, str(tmp_path), layout, kind)
    again = run_ranks(2, resumed, str(tmp_path), layout, used=True)
    assert all(result.pop("rng") for result in again)
    assert again == whole


@pytest.mark.parametrize(
    "kind, before, after",
    [
        ("fully_reshardable", {"tp": 2, "distributed_optimizer": True, "bf16": True}, {"pp": 2, "bf16": True}),
        pytest.param(None, {}, {"tp": 2, "distributed_optimizer": True}, marks=pytest.mark.slow),
    ],
)
def test_checkpoints_of_before_load_in_other_layouts(tmp_path, kind, before, after):
    whole = run_ranks(2, saved_and_continued, str(tmp_path), Layout(table=True, **before), kind)
    again = run_ranks(2, resumed, str(tmp_path), Layout(table=True, **after))
    precision = 1e-2 if "bf16" in before else 1e-5
    assert again[0]["losses"] == pytest.approx(whole[0]["losses"], rel=precision)


def load_from_before(root: str) -> tuple[set, set]:
    """The kernels and step counts of an optimizer with fused ones that loaded the state of one without."""
    layout = Layout(table=True, distributed_optimizer=True)
    run = make(layout)
    train(layout, run, range(3))
    save_as_before(root, run, "fully_reshardable", {}, {"model": {"tiny": 1}})
    for group in run[1].param_groups:
        group["fused"] = True
    load_checkpoint(CheckpointStore(root), *run)
    train(layout, run, range(3, 4))
    states = [state for part in run[1].chained_optimizers for state in part.optimizer.state.values()]
    return {group["fused"] for group in run[1].param_groups}, {float(state["step"]) for state in states}


def test_checkpoints_of_before_do_not_choose_the_kernels(tmp_path):
    assert run_ranks(1, load_from_before, str(tmp_path)) == [({True}, {4.0})]


def test_dp_reshardable_is_refused(tmp_path):
    layout = Layout(table=True, distributed_optimizer=True, untied=True)
    run_ranks(2, saved_and_continued, str(tmp_path), layout, "dp_reshardable")
    for told in run_ranks(2, refused, str(tmp_path), layout):
        assert "holds optimizer state of mcore's type 'dp_reshardable'" in told[0] and "--no-load-optim" in told[0]


def read_by_mcore(root: str) -> tuple[str, str]:
    layout = Layout()
    model, optimizer, scheduler = make(layout)
    path = save_checkpoint(CheckpointStore(root), 3, model, optimizer, scheduler)
    before = weights_digest(model)
    train(layout, (model, optimizer, scheduler), range(2))  # the first has learning rate 0
    assert weights_digest(model) != before
    state = {"model": model[0].module.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
    model[0].module.load_state_dict(dist_checkpointing.load(state, str(path))["model"])
    return before, weights_digest(model)


def test_mcore_reads_the_format(tmp_path):
    before, after = run_ranks(1, read_by_mcore, str(tmp_path))[0]
    assert before == after


def refused(root: str, *layouts: Layout, **kwargs: Any) -> list[str]:
    """What loading into a fresh run of each layout says."""
    told = []
    for layout in layouts:
        run = make(layout)
        try:
            load_checkpoint(CheckpointStore(root), *run, **kwargs)
            told.append("loaded")
        except CheckpointError as error:
            told.append(f"{type(error).__name__}: {error}")
        groups.destroy_groups()
    return told


def test_nothing_to_load_is_told_alike_on_every_rank(tmp_path):
    first, second = run_ranks(2, refused, str(tmp_path), Layout())
    assert first == second and first[0].startswith("NoCheckpointError: ") and "--load" in first[0]


def test_another_model_is_refused_by_name_on_every_rank(tmp_path):
    layout = Layout(distributed_optimizer=True)
    run_ranks(2, saved_and_continued, str(tmp_path), layout)
    larger = Layout(distributed_optimizer=True, model={"ffn_hidden_size": 96, "num_layers": 5})
    smaller = Layout(distributed_optimizer=True, model={"num_layers": 3})
    for of_larger, of_smaller in run_ranks(2, refused, str(tmp_path), larger, smaller):
        assert "only in the model: " in of_larger and "decoder.layers.4." in of_larger
        assert "other shape: " in of_larger and "decoder.layers.0.mlp.linear_fc1" in of_larger
        assert "only in the checkpoint" not in of_larger
        assert "only in the checkpoint: " in of_smaller and "decoder.layers.3." in of_smaller
    assert run_ranks(2, refused, str(tmp_path), layout, load_optim=False, load_rng=False) == [["loaded"]] * 2


# ---------------------------------------------------------------------- failing saves


def save_with_full_disk(root: str, stages: list[str]) -> list[tuple[str, bool]]:
    """Of one save failing at each stage: the error, and (rank 0) whether only the earlier checkpoint is there."""
    layout = Layout(distributed_optimizer=True)
    run = make(layout)
    store = CheckpointStore(root)
    save_checkpoint(store, 3, *run, {"consumed_samples": 12})
    train(layout, run, range(1))
    rank, join = torch.distributed.get_rank(), publishing.joined_metadata

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_hashed = publishing.write_hashed

    def full_for_common(path: Any, data: bytes) -> Any:
        return (full if path.name == "common.pt" else write_hashed)(path, data)

    def lose(shards: list, whole: bool) -> Any:
        (store.temporary_path(4) / "__1_0.distcp").unlink()
        return join(shards, whole)

    told = []
    for stage in stages:
        with pytest.MonkeyPatch.context() as patch:
            if stage == "shards" and rank == 1:
                patch.setattr(torch.distributed.checkpoint.filesystem.os, "fsync", full)
            elif stage == "common" and rank == 0:
                patch.setattr(publishing, "write_hashed", full_for_common)
            elif stage == "missing shard" and rank == 0:
                patch.setattr(publishing, "joined_metadata", lose)
            try:
                save_checkpoint(store, 4, *run)
                message = "saved"
            except CheckpointError as error:
                message = str(error)
        intact = store.iterations() == [3] and not store.temporary_path(4).exists() if rank == 0 else True
        told.append((message, intact))
    return told


def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path):
    stages = ["common", "shards", "missing shard"]
    for told in run_ranks(2, save_with_full_disk, str(tmp_path), stages):
        for stage, (message, intact) in zip(stages, told, strict=True):
            if stage == "missing shard":
                assert "__1_0.distcp is missing" in message
            else:
                assert "No space left on device" in message, stage
                assert re.search("bytes needed: [1-9].*bytes free: ", message), message
            assert "\n" not in message
            assert intact, stage
    assert CheckpointStore(tmp_path).resolve() == 3


def save_and_kill(root: str, victim: int, stage: str) -> None:
    layout = Layout(distributed_optimizer=True)
    run = make(layout)
    save_checkpoint(CheckpointStore(root), 3, *run, {"consumed_samples": 12})
    train(layout, run, range(1))

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def at_stage(name: str) -> None:
        if name == stage:
            die()

    if torch.distributed.get_rank() == victim and stage == "fsync":
        torch.distributed.checkpoint.filesystem.os.fsync = die  # type: ignore[attr-defined]
    save_checkpoint(CheckpointStore(root, stages=at_stage), 4, *run, {"consumed_samples": 16})


KILLS = [(1, "fsync", 3), pytest.param(0, "fsync", 3, marks=pytest.mark.slow), (0, "manifest-synced", 3)]


@pytest.mark.parametrize("victim, stage, expected", KILLS)
def test_a_rank_killed_while_saving(tmp_path, victim, stage, expected):
    with pytest.raises(AssertionError, match="failed"):
        run_ranks(2, save_and_kill, str(tmp_path), victim, stage, timeout=60)
    store = CheckpointStore(tmp_path)
    with store.lock():
        assert store.resolve() == expected
        assert not list(tmp_path.glob(".tmp_*"))

"""Checkpoints of which every rank has its part on a disk of its own: bit for bit, and what is left of them is named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from test_checkpointing import DROPOUT, make, optimizer_digest, train
from tiny_gpt import Layout

from umv2_megatron.checkpoint.places import LocalPlace
from umv2_megatron.checkpoint.save_load import Candidate, layout, load_first, save_checkpoint, weights_digest
from umv2_megatron.checkpoint.save_lock import SaveLock
from umv2_megatron.durable_files import CheckpointError, DamageError, NotSavedError
from umv2_megatron.training.non_persistent import _remove_strangers


def place_in(root: str, history: str = "h", **changes: Any) -> LocalPlace:
    return LocalPlace(Path(root), history, {**layout(), **changes}, "--non-persistent-local-ckpt-dir")


def end_of(run: tuple, losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "weights": weights_digest(run[0]), "optimizer": optimizer_digest(run[1])}


def saved_twice(root: str, shape: Layout) -> list[dict[str, Any]]:
    """Saves after three and six steps; the ends of the three steps after each."""
    run, place = make(shape), place_in(root)
    train(shape, run, range(3))
    save_checkpoint(place, 3, *run, {"consumed_samples": 12}, {"values": {}})
    ends = [end_of(run, train(shape, run, range(3, 6)))]
    save_checkpoint(place, 6, *run, {"consumed_samples": 24}, {"values": {}})
    return [*ends, end_of(run, train(shape, run, range(6, 9)))]


def gone_on(root: str, shape: Layout) -> tuple[list[int], dict[int, str], int, dict[str, Any]]:
    """What a start finds and loads, and the three steps after it."""
    run, place = make(shape), place_in(root)
    train(shape, run, range(50, 51))  # nothing of what a run did before the load may shine through
    found = place.find()
    loaded = load_first([Candidate(place, each) for each in found.usable], *run)
    assert loaded.rng_restored and loaded.kind == "local" and loaded.extra_state["consumed_samples"] > 0
    at = loaded.iteration
    return found.usable, found.why_not, at, end_of(run, train(shape, run, range(at, at + 3)))


def flip(root: Path, rank: int, iteration: int) -> None:
    file = root / f"rank_{rank:05d}" / f"iter_{iteration:07d}" / f"__{rank}_0.distcp"
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 4096, 64):  # not only the padding between tensors
        data[place] ^= 1
    file.write_bytes(data)


CASES = {
    "distributed": Layout(distributed_optimizer=True, table=True),
    "TP 2, bf16, distributed": Layout(tp=2, bf16=True, distributed_optimizer=True, table=True),
    "replicas": Layout(table=True),
    "PP 2, two chunks each": Layout(pp=2, vpp=2, distributed_optimizer=True, untied=True, table=True),
}


@pytest.mark.parametrize(
    "case", ["distributed", *(pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[1:])]
)
def test_bitwise_then_damaged_on_one_rank_then_lost_on_one(case, tmp_path):
    shape = CASES[case]
    shape.model = DROPOUT
    whole = run_ranks(2, saved_twice, str(tmp_path), shape)
    for rank, (usable, why_not, at, end) in enumerate(run_ranks(2, gone_on, str(tmp_path), shape)):
        assert (usable, why_not, at) == ([6, 3], {}, 6) and end == whole[rank][1]
    flip(tmp_path, 1, 6)  # only reading it shows that
    for rank, (usable, _, at, end) in enumerate(run_ranks(2, gone_on, str(tmp_path), shape)):
        assert (usable, at) == ([6, 3], 3) and end == whole[rank][0]
    shutil.rmtree(tmp_path / "rank_00001" / "iter_0000006")
    for usable, why_not, at, _ in run_ranks(2, gone_on, str(tmp_path), shape):
        assert (usable, at, list(why_not)) == ([3], 3, [6])
        assert why_not[6].startswith("rank 1 on ") and why_not[6].endswith(" has no part of it")


def found_otherwise(root: str, shape: Layout) -> dict[str, Any]:
    """What is found of an other history, in another layout, and where the parts are of two saves."""
    run, place, rank = make(shape), place_in(root), torch.distributed.get_rank()
    save_checkpoint(place, 3, *run, {}, {"values": {}})
    told: dict[str, Any] = {"whole": place.find()}
    told["history"] = place_in(root, history="other").find()
    told["layout"] = place_in(root, **{"tensor": 2}).find()
    part = place.store.path(3)
    if rank == 1:
        shutil.copytree(part, f"{root}/kept")
    save_checkpoint(place, 3, *run, {}, {"values": {}})
    told["again"] = place.find()
    if rank == 1:
        shutil.rmtree(part)
        shutil.move(f"{root}/kept", part)
    torch.distributed.barrier()
    told["mixed"] = place.find()
    if rank == 0:
        (part / "manifest.json").unlink()
    torch.distributed.barrier()
    told["damaged"] = place.find()
    return told


def test_what_is_of_another_time_is_not_taken(tmp_path):
    for told in run_ranks(2, found_otherwise, str(tmp_path), Layout(distributed_optimizer=True, table=True)):
        assert told["whole"].usable == told["again"].usable == [3]
        for name in ("history", "layout", "mixed", "damaged"):
            assert told[name].usable == [] and list(told[name].why_not) == [3], name
        assert "is of another run" in told["history"].why_not[3] and "1 ranks more" in told["history"].why_not[3]
        assert "was saved with tensor 1, here it is 2" in told["layout"].why_not[3]
        assert told["mixed"].why_not[3] == "the ranks' parts are of different saves"
        assert told["damaged"].why_not[3].startswith("rank 0 on ") and "manifest" in told["damaged"].why_not[3]


def failing(root: str, shape: Layout) -> list[Any]:
    """Errors and what is there afterwards: a disk that fails on rank 1, in two places; NaN on rank 1; then a good
    save."""
    run, place, rank = make(shape), place_in(root), torch.distributed.get_rank()
    for iteration in (1, 2):
        save_checkpoint(place, iteration, *run, {}, {"values": {}})
    told: list[Any] = []

    def attempt_it(kind: type[CheckpointError]) -> None:
        with pytest.raises(kind) as caught:
            save_checkpoint(place, 3, *run, {}, {"values": {}})
        there = [entry.name for entry in place.store.root.iterdir() if entry.is_dir()]
        told.append((str(caught.value), sorted(there)))

    for name, made in (("fsync", os.fsync), ("replace", os.replace)):

        def broken(*arguments: Any, made: Any = made) -> None:
            if rank == 1:
                raise OSError(5, "Input/output error")
            return made(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, broken)
            attempt_it(NotSavedError)
    weight = next(run[0][0].parameters())
    kept = weight.detach().clone()
    if rank == 1:
        weight.data.view(-1)[3] = float("nan")
    attempt_it(CheckpointError)
    weight.data.copy_(kept)
    save_checkpoint(place, 3, *run, {}, {"values": {}})
    return [*told, place.find().usable]


def test_a_disk_that_fails_on_one_rank_and_nan(tmp_path):
    for told in run_ranks(2, failing, str(tmp_path), Layout(table=True)):
        *failed, (nan, after_nan), usable = told
        for text, there in failed:  # also after rank 0 had published its part
            assert text.startswith("rank 1 on ") and "Input/output error" in text
            assert there == ["iter_0000001", "iter_0000002"]
        assert "holds nan at" in nan and "on rank 1" in nan and after_nan == ["iter_0000001", "iter_0000002"]
        assert usable == [3, 2]


def nan_is_fatal(root: str) -> str:
    run, place = make(Layout()), place_in(root)
    next(run[0][0].parameters()).data.view(-1)[3] = float("inf")
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(place, 3, *run, {}, {"values": {}})
    return type(caught.value).__name__


def test_nan_ends_the_run(tmp_path):
    """It is no reason to go on without this checkpoint."""
    assert run_ranks(1, nan_is_fatal, str(tmp_path)) == ["CheckpointError"]
    assert issubclass(DamageError, CheckpointError) and not issubclass(DamageError, NotSavedError)


def strangers(root: str) -> list[list[str]]:
    """What is left of three folders of ranks that are none here: one of this host, one of another, one in use."""
    make(Layout())
    place, rank = place_in(root), torch.distributed.get_rank()
    hosts = {7: socket.gethostname(), 8: "another", 9: socket.gethostname()}
    folders = [Path(root) / f"rank_{number:05d}" for number in hosts]
    with contextlib.ExitStack() as stack:
        stack.enter_context(place.store.lock())
        if rank == 1:
            for folder, host in zip(folders, hosts.values()):
                (folder / "iter_0000005").mkdir(parents=True)
                (folder / "iter_0000005" / "shard").write_text("x")
                (folder / ".lock").write_text(json.dumps({"pid": 1, "host": host, "start": "s"}))
            stack.enter_context(SaveLock(folders[2] / ".lock"))
        torch.distributed.barrier()
        _remove_strangers(place)
        torch.distributed.barrier()
        return [sorted(entry.name for entry in folder.iterdir()) for folder in folders]


def test_what_ranks_left_that_are_on_other_nodes_now(tmp_path):
    kept = [".lock", "iter_0000005"]
    assert run_ranks(2, strangers, str(tmp_path)) == [[[".lock"], kept, kept]] * 2


def lock_twice(root: str) -> str:
    make(Layout())
    place = place_in(root)
    with place.store.lock(), pytest.raises(CheckpointError) as caught:
        place.store.lock(timeout_s=0.0)
    return str(caught.value)


def test_a_second_job_on_the_same_disk(tmp_path):
    (told,) = run_ranks(1, lock_twice, str(tmp_path))
    assert told.startswith(f"--non-persistent-local-ckpt-dir {tmp_path}/rank_00000 is in use by process ")

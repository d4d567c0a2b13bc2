"""Faults around checkpoints on the nodes' own disks: killed at every stage of one, a full disk, NaN."""

from __future__ import annotations

import os
import re
import signal

import pytest
from program_runs import Job
from test_kills import STAGES
from test_non_persistent import TWO, Run, assert_same, loaded, warned

from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.observation.events import read_events

pytestmark = pytest.mark.faults
SAVE_MODES = [pytest.param({}, id="blocking"), pytest.param({"async_save": True}, id="async")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("whole"), **TWO)
    return run, run.start()


def die_at(stage: str, iteration: int, victim: int) -> None:
    """Kill the rank ``victim`` at ``stage`` of its part of the local checkpoint of ``iteration``."""
    import torch

    make, begin, now = CheckpointStore.__init__, CheckpointStore.begin, [0]

    def made(self, root, **named):
        def reached(name: str) -> None:
            if name == stage and now[0] == iteration and torch.distributed.get_rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        make(self, root, **{**named, **({"stages": reached} if "rank_" in str(root) else {})})

    def begun(self, number, bytes_needed=None):
        now[0] = number
        return begin(self, number, bytes_needed)

    CheckpointStore.__init__, CheckpointStore.begin = made, begun


@pytest.mark.parametrize("mode", SAVE_MODES)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_stage_of_a_local_one(stage, victim, mode, whole, figure, tmp_path):
    """In that of iteration 10, which also removes an older one; each rank has its own stages."""
    run = Run(tmp_path, **TWO, **mode)
    job = Job(2, run.argv, tmp_path / "o", die_at, (stage, 10, victim))
    try:
        assert job.wait(200).codes[victim] == -signal.SIGKILL, job.output()[-3000:]
    finally:
        job.kill()
    finished = run.start()
    found = loaded(finished)
    assert found in ("local 8", "local 10") and not [*run.disks.rglob(".tmp_*"), *run.save.glob(".tmp_*")]
    assert_same(run, finished, whole)
    figure("9  local checkpoints", f"{stage} of rank {victim}{' (--async-save)' * bool(mode)}: {found}, bitwise")


def fill_disk_of(rank: int, iterations: list[int]) -> None:
    """The disk of ``rank`` has no space in the local checkpoints of ``iterations``."""
    import torch

    begin = CheckpointStore.begin

    def begun(store, number, bytes_needed=None):
        if number in iterations and torch.distributed.get_rank() == rank and "rank_" in str(store.root):
            bytes_needed = 1 << 62
        return begin(store, number, bytes_needed)

    CheckpointStore.begin = begun


@pytest.mark.parametrize("mode", SAVE_MODES)
def test_the_disk_of_one_node_is_full(mode, whole, figure, tmp_path):
    """The run goes on, and says so; the parts that the other ranks have are of no use, and not there."""
    run = Run(tmp_path, **TWO, **mode)
    finished = run.start(prepare=fill_disk_of, arguments=(1, [4, 8, 10]))
    told = re.findall("WARNING: local checkpoint not saved, the run goes on: rank 1 on .*", warned(finished))
    assert len(told) == 3 and all("No space left on device" in each and "bytes free" in each for each in told)
    events = [event["event"] for event in read_events(run.save)]
    assert events.count("unsaved") == 3
    assert_same(run, finished, whole)
    figure("9  local checkpoints", f"one node's disk full{' (--async-save)' * bool(mode)}: told three times, went on")


def test_a_disk_that_is_really_full(small_disk, whole, figure, tmp_path):
    """A file system with room for one part and a half, on one of the nodes."""
    run = Run(tmp_path, **TWO)
    run.killed_in(3)
    size = sum(each.stat().st_size for each in run.rank(1).rglob("*") if each.is_file())
    disk = small_disk(int(1.5 * size) + 65536)
    other = Run(tmp_path / "again", **TWO)
    folder = run.rank(1).parent.name
    other.start("--exit-interval", "1")
    (other_folder,) = other.disks.iterdir()
    assert other_folder.name != folder
    (other_folder / "rank_00001" / ".lock").unlink()
    (other_folder / "rank_00001").rmdir()
    (other_folder / "rank_00001").symlink_to(disk, target_is_directory=True)
    finished = other.start()
    told = re.findall("WARNING: local checkpoint not saved, the run goes on: rank 1 on .*", warned(finished))
    assert told and "No space left on device" in told[0] and not list(disk.glob(".tmp_*"))
    assert_same(other, finished, whole)
    figure("9  local checkpoints", f"a disk with room for 1.5 parts: told {len(told)} times, went on, bitwise")


def test_nan_is_refused_by_a_local_one(figure, tmp_path):
    run = Run(tmp_path, tensor_model_parallel_size=2)
    ended = run.start(prepare=plant_before_local, arguments=(8,), codes=1)
    for output in ended.outputs:
        assert re.search(r"error: decoder.*linear_fc1.* holds nan at .* on rank 1", output), output[-3000:]
    assert run.local(0) == run.local(1) == [2, 4] and CheckpointStore(run.save).iterations() == [6]
    figure("9  local checkpoints", "NaN in a weight: refused, the run ends")


def plant_before_local(iteration: int) -> None:
    """A NaN in a weight of rank 1 when ``iteration`` is to be saved."""
    import torch

    from umv2_megatron.training.saving import Saver

    save = Saver.save_non_persistent

    def planted(saver):
        if saver.state.progress.iteration == iteration and torch.distributed.get_rank() == 1:
            weights = (p for name, p in saver.state.chunks[0].named_parameters() if "linear_fc1" in name)
            next(weights).data.view(-1)[5] = float("nan")
        save(saver)

    Saver.save_non_persistent = planted

"""--non-persistent-save-interval: a run that is killed goes on from the newest checkpoint that all ranks have, on their
own disks or in --save, to the same bits."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from program_runs import Finished, losses, tiny_run, train

from umv2_megatron.checkpoint.posix_storage import PosixStorage
from umv2_megatron.checkpoint.store import TRACKER, CheckpointStore
from umv2_megatron.observation.events import read_events

# Persistent at 6 and 12, local at 2, 4, 8, 10.
RUN: dict[str, Any] = {
    "num_layers": 1, "train_iters": 12, "save_interval": 6, "non_persistent_save_interval": 2, "hidden_dropout": 0.1,
}  # fmt: skip
TWO = {"use_distributed_optimizer": True}


def die_in(iteration: int) -> None:
    """Kill all ranks in the step of ``iteration``."""
    from umv2_megatron.training import loop

    step = loop.Trainer._step

    def stepped(trainer, profiler):
        if trainer.state.progress.iteration + 1 == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, profiler)

    loop.Trainer._step = stepped


class Run:
    """A run of two ranks in a folder, and what it leaves on the nodes' disks."""

    def __init__(self, folder: Path, **changes: Any):
        self.folder, self.save, self.disks = folder, folder / "save", folder / "disks"
        settings = {**RUN, **changes, "save": self.save}
        if settings.get("non_persistent_ckpt_type") != "global":
            settings["non_persistent_local_ckpt_dir"] = self.disks
        self.argv = tiny_run(**settings)
        self.ranks = 2

    def start(self, *more: str, prepare=None, arguments: tuple = (), codes: int | None = 0) -> Finished:
        return train(self.ranks, [*self.argv, *more], self.folder / "o", prepare, arguments, codes=codes)

    def killed_in(self, iteration: int, *more: str) -> Finished:
        return self.start(*more, prepare=die_in, arguments=(iteration,), codes=-signal.SIGKILL)

    def rank(self, number: int) -> Path:
        (folder,) = self.disks.iterdir()
        return folder / f"rank_{number:05d}"

    def local(self, number: int = 0) -> list[int]:
        return CheckpointStore(self.rank(number)).iterations()

    def keep(self) -> Path:
        """A copy of everything, to which ``bring_back`` returns."""
        kept = self.folder / "kept"
        for each in (self.save, self.disks):
            shutil.copytree(each, kept / each.name)
        return kept

    def bring_back(self, kept: Path) -> None:
        for each in (self.save, self.disks):
            shutil.rmtree(each)
            shutil.copytree(kept / each.name, each)


def loaded(finished: Finished) -> str:
    """Kind and iteration of what a start has loaded."""
    found = re.search(r"loaded (local |global )?checkpoint of iteration (\d+) ", finished.text)
    return f"{(found[1] or 'persistent ').strip()} {found[2]}" if found else "nothing"


def warned(finished: Finished) -> str:
    return "\n".join(re.findall("WARNING: .*", finished.text))


def assert_same(run: Run, finished: Finished, whole: tuple[Run, Finished]) -> None:
    assert finished.weights == whole[1].weights
    assert losses(run.save) == losses(whole[0].save)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Run, Finished]:
    run = Run(tmp_path_factory.mktemp("whole"), **TWO)
    return run, run.start()


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Run, Path]:
    """A run that was killed in iteration 11, and a copy of what it has left."""
    run = Run(tmp_path_factory.mktemp("killed"), **TWO)
    run.killed_in(11)
    assert run.local(0) == run.local(1) == [8, 10] and CheckpointStore(run.save).iterations() == [6]
    return run, run.keep()


@pytest.fixture
def left(killed) -> Run:
    killed[0].bring_back(killed[1])
    return killed[0]


@pytest.mark.slow  # stages of such saves are in tests/faults
def test_goes_on_from_the_newest_local_one(left, whole):
    finished = left.start()
    assert loaded(finished) == "local 10" and warned(finished) == ""
    assert_same(left, finished, whole)
    told = [
        (event["iteration"], event.get("kind")) for event in read_events(left.save) if event["event"] == "checkpoint"
    ]
    assert told == [(2, "local"), (4, "local"), (6, None), (8, "local"), (10, "local"), (12, None)]
    assert left.local(0) == left.local(1) == [], "a run that is done gives the space back"


def test_a_node_is_replaced(left, whole):
    """Its rank has nothing: all go on from the persistent one, and what the other rank has is void."""
    shutil.rmtree(left.rank(1))
    finished = left.killed_in(8)
    assert loaded(finished) == "persistent 6"
    assert re.search(r"local checkpoint 10 is not used: rank 1 on \S+ has no part of it", warned(finished))
    assert left.local(0) == left.local(1) == []
    finished = left.start()
    assert loaded(finished) == "persistent 6"
    assert_same(left, finished, whole)


@pytest.mark.slow
def test_one_rank_lacks_the_newest(left, whole):
    shutil.rmtree(left.rank(1) / "iter_0000010")
    finished = left.start()
    assert loaded(finished) == "local 8" and "local checkpoint 10 is not used: rank 1 on" in warned(finished)
    assert_same(left, finished, whole)


@pytest.mark.slow
def test_bits_are_flipped_on_one_rank(left, whole):
    """First in the newest one, then in both."""
    for iteration, expected in ((10, "local 8"), (8, "persistent 6")):
        shard = left.rank(1) / f"iter_{iteration:07d}" / "__1_0.distcp"
        data = bytearray(shard.read_bytes())
        for place in range(len(data) // 2, len(data) // 2 + 4096, 64):  # not only the padding between tensors
            data[place] ^= 1
        shard.write_bytes(data)
        kept = left.folder / "damaged"
        shutil.rmtree(kept, ignore_errors=True)
        for each in (left.save, left.disks):
            shutil.copytree(each, kept / each.name)
        finished = left.start()
        assert loaded(finished) == expected
        assert f"local checkpoint {iteration} cannot be used: " in warned(finished) and "__1_0.distcp" in warned(
            finished
        )
        assert_same(left, finished, whole)
        left.bring_back(kept)


@pytest.mark.slow
def test_another_layout(left, whole):
    finished = left.start("--tensor-model-parallel-size", "2")
    assert loaded(finished) == "persistent 6"
    assert "was saved with tensor parallel 1, here it is 2" in warned(finished)
    left.bring_back(left.folder / "kept")
    left.ranks = 1
    try:
        finished = left.start()
    finally:
        left.ranks = 2
    assert loaded(finished) == "persistent 6" and "was saved with ranks 2, here it is 1" in warned(finished)


@pytest.mark.slow
def test_going_back_by_number(left, whole):
    """--ckpt-step takes a local one, too; what is newer is removed, and does not come back."""
    assert loaded(left.killed_in(9, "--ckpt-step", "8")) == "local 8"
    assert left.local(0) == left.local(1) == [8]
    assert loaded(left.killed_in(8, "--ckpt-step", "6")) == "persistent 6"
    assert left.local(0) == []
    text = left.start("--ckpt-step", "10", codes=1).text
    assert re.search(r"error: .*iter_0000010 does not exist", text), text[-2000:]
    assert_same(left, left.start(), whole)


@pytest.mark.slow
def test_another_run_in_the_same_directories(left, whole, tmp_path):
    """--save is emptied: the run begins anew. Another --save has folders of its own on the disks."""
    shutil.rmtree(left.save)
    finished = left.start()
    assert loaded(finished) == "nothing"
    assert "local checkpoint 10 is not used: " in warned(finished) and "is of another run, or of a time" in warned(
        finished
    )
    assert_same(left, finished, whole)
    other = Run(tmp_path, **TWO)
    other.argv[other.argv.index(str(other.disks))] = str(left.disks)
    finished = other.start()
    assert loaded(finished) == "nothing" and warned(finished) == "" and len(list(left.disks.iterdir())) == 2


@pytest.mark.slow
def test_before_the_first_persistent_one(whole, tmp_path):
    run = Run(tmp_path, **TWO)
    run.killed_in(6)
    assert not (run.save / TRACKER).exists()
    finished = run.killed_in(6)
    assert loaded(finished) == "local 4"
    for iteration in run.local(1):  # nothing whole is left: it begins anew, with clean weights
        shard = run.rank(1) / f"iter_{iteration:07d}" / "__1_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    finished = run.start()
    assert loaded(finished) == "nothing" and "local checkpoint 4 cannot be used: rank 1: " in warned(finished)
    assert_same(run, finished, whole)


@pytest.mark.slow
def test_load_is_save_before_the_first_persistent_one(whole, tmp_path):
    """As scripts of Megatron-LM have it."""
    run = Run(tmp_path, **TWO)
    run.argv += ["--load", str(run.save), "--allow-fresh"]
    run.killed_in(6)
    finished = run.start()
    assert loaded(finished) == "local 4"
    assert_same(run, finished, whole)


@pytest.mark.slow
def test_killed_after_the_last_local_one_when_all_is_done(whole, tmp_path):
    """The end is saved for good, though no step is left."""
    run = Run(tmp_path, **TWO)
    run.killed_in(11)
    finished = run.start("--train-iters", "10", "--lr-decay-iters", "12", "--allow-config-change")
    assert loaded(finished) == "local 10" and (run.save / TRACKER).read_text() == "10" and run.local() == []


LAYOUTS = {
    "M-2-row": {"memory_parallel_size": 2, "memory_parallel_mode": "row", "use_distributed_optimizer": True},
    "M-2-dim": {"memory_parallel_size": 2, "memory_parallel_mode": "dim", "use_distributed_optimizer": True},
    "M-2-row-moments": {"memory_parallel_size": 2, "memory_parallel_mode": "dim", "memory_value_second_moment": "row",
                        "use_distributed_optimizer": True, "bf16": True},
    "row-moments-shared": {"memory_value_second_moment": "row", "use_distributed_optimizer": True},
    "TP-2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP-2": {"pipeline_model_parallel_size": 2, "num_layers": 2},
    "overlapped-bf16": {**TWO, "overlap_grad_reduce": True, "overlap_param_gather": True, "bf16": True},
    "async": {**TWO, "async_save": True},
    "global": {**TWO, "non_persistent_ckpt_type": "global"},
    "global-async": {**TWO, "non_persistent_ckpt_type": "global", "async_save": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_bitwise_in(name, tmp_path):
    reference = Run(tmp_path / "whole", **LAYOUTS[name])
    finished = reference.start()
    run = Run(tmp_path / "killed", **LAYOUTS[name])
    run.killed_in(12)
    again = run.start()
    kind = "global" if "global" in name else "local"
    # the kill may fall before the newest one is published
    assert loaded(again) in (f"{kind} 10", f"{kind} 8" if "async" in name else ""), warned(again)
    assert_same(run, again, (reference, finished))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [7, 10])
def test_a_spike_goes_back_to_a_local_one(stopped, tmp_path):
    """And does the same where the run was stopped and killed in between; at 10 the stop saves what would be local."""
    from test_spikes import spike_run, spoil, warnings

    ends = {}
    for name in ("whole", "killed"):
        disks = {"non_persistent_save_interval": 2, "non_persistent_local_ckpt_dir": tmp_path / name / "disks"}
        argv = spike_run(tmp_path / name / "save", "rewind", save_interval=8, **TWO, **disks)
        if name == "killed":
            train(2, [*argv, "--exit-interval", str(stopped)], tmp_path / "o")
            train(2, argv, tmp_path / "o", spoil_and_die, ([11], 13), codes=-signal.SIGKILL)
        ends[name] = train(2, argv, tmp_path / "o", spoil, ([11],))
        if name == "whole":
            assert "went back to the checkpoint of iteration 10: iterations 11 to 11" in warnings(ends[name])[0]
    assert ends["killed"].weights == ends["whole"].weights
    assert losses(tmp_path / "killed" / "save") == losses(tmp_path / "whole" / "save")


@pytest.mark.slow
def test_a_disk_that_fails_when_all_is_done(whole, tmp_path):
    """All is saved: what cannot be removed is told, and the run has not failed."""
    run = Run(tmp_path, **TWO)
    finished = run.start(prepare=no_removing_on, arguments=(1,))
    assert re.search(r"WARNING: could not remove \S+iter_0000008: Input/output error", finished.text)
    assert_same(run, finished, whole)


def no_removing_on(rank: int) -> None:
    """The disk of ``rank`` removes nothing more once all is done."""
    import torch

    from umv2_megatron.training.saving import Saver

    end = Saver.end

    def ended(saver):
        def failing(storage, iteration):
            raise OSError(5, "Input/output error")

        if torch.distributed.get_rank() == rank:
            PosixStorage.remove = failing
        end(saver)

    Saver.end = ended


def spoil_and_die(spoiled: list[int], iteration: int) -> None:
    from test_spikes import spoil

    spoil(spoiled)
    die_in(iteration)


@pytest.mark.slow
def test_an_exit_saves_for_good(left, whole):
    """Not in a local one, though one is due."""
    shutil.rmtree(left.rank(0) / "iter_0000010")
    finished = left.start("--exit-interval", "10")
    assert loaded(finished) == "local 8" and (left.save / TRACKER).read_text() == "10"
    assert_same(left, left.start(), whole)

"""Faults while a save of --async-save is in flight: the rank or its writer killed, the disk full, NaN, a spike."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest
from program_runs import Job, losses, tiny_run, train
from test_async_save import SETTINGS, gone, hold_writers, writers
from test_nan import holds_nan
from test_spikes import spike_run, spoil, warnings

from umv2_megatron.checkpoint.store import TRACKER, CheckpointStore
from umv2_megatron.observation.events import read_events

pytestmark = pytest.mark.faults

RUN = {**SETTINGS, "train_iters": 12, "save_interval": 4, "async_save": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without a fault: its weights, and the bytes of a checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    finished = train(2, tiny_run(**RUN, save=folder / "run"), folder / "o")
    return finished.weights, sum(each.stat().st_size for each in (folder / "run" / "iter_0000008").iterdir())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed_with_a_save_in_flight(victim, whole, figure, tmp_path):
    """Its writer dies with it, and cannot write into the directory of the next start."""
    save = tmp_path / "run"
    argv = tiny_run(**RUN, save=save)
    job = Job(2, argv, tmp_path / "o", hold_writers, (str(tmp_path), 8))
    try:
        held = writers(tmp_path)
        job.wait_for(r"iteration +10/")
        job.send(signal.SIGKILL, victim)
        deadline = time.monotonic() + 60
        while not all(gone(pid) for pid in held):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        job.kill()
    assert (save / TRACKER).read_text() == "4" and list(save.glob(".tmp_*"))
    finished = train(2, argv, tmp_path / "o")
    assert "loaded checkpoint of iteration 4 " in finished.text and finished.weights == whole[0]
    assert not list(save.glob(".tmp_*"))
    figure("8  --async-save", f"rank {victim} killed with a save in flight: its writer gone, older one, bitwise")


def fill_disk(iteration: int) -> None:
    """Leave 64 KiB on the disk when the save of ``iteration`` has begun."""
    begin = CheckpointStore.begin

    def begun(store, number, bytes_needed=None):
        made = begin(store, number, bytes_needed)
        if number == iteration:
            free = os.statvfs(store.root)
            with open(store.root.parent / "filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 65536)
        return made

    CheckpointStore.begin = begun


def test_the_disk_is_full_in_the_writer(small_disk, whole, figure, tmp_path):
    disk = small_disk(8 * whole[1])
    argv = tiny_run(**RUN, save=disk / "run")
    ended = train(2, argv, tmp_path / "o", fill_disk, (8,), codes=1)
    for output in ended.outputs:
        told = re.search("pretrain_umv2.py: error: (.*)", output)
        assert told and "Traceback" not in output, output[-3000:]
        for part in ("could not write", "No space left on device", "are untouched"):
            assert part in told[1], told[1]
    assert CheckpointStore(disk / "run").resolve() == 4 and not list((disk / "run").glob(".tmp_*"))
    subprocess.run(["rm", str(disk / "filler")], check=True)
    assert train(2, argv, tmp_path / "o").weights == whole[0]
    figure("8  --async-save", "disk full in the writer: named on all ranks, older one intact, bitwise after it")


def plant_at_save(iteration: int) -> None:
    """A NaN in a weight of rank 1 when ``iteration`` is to be saved."""
    import torch

    from umv2_megatron.training.saving import Saver

    save = Saver.save

    def planted(saver, *, wait):
        if saver.state.progress.iteration == iteration and torch.distributed.get_rank() == 1:
            weights = (p for name, p in saver.state.chunks[0].named_parameters() if "linear_fc1" in name)
            next(weights).data.view(-1)[5] = float("nan")
        save(saver, wait=wait)

    Saver.save = planted


def test_nan_is_refused_in_the_step_of_the_save(figure, tmp_path):
    """Tables are sharded over the ranks, so that each writes weights of its own."""
    save = tmp_path / "run"
    changes = {**RUN, "tensor_model_parallel_size": 2, "use_distributed_optimizer": False}
    ended = train(2, tiny_run(**changes, save=save), tmp_path / "o", plant_at_save, (8,), codes=1)
    for output in ended.outputs:
        assert re.search(r"error: decoder.*linear_fc1.* holds nan at .* on rank 1", output), output[-3000:]
    assert losses(save)[-1][0] == 8 and CheckpointStore(save).iterations() == [4]
    assert holds_nan(save / "iter_0000004") == [] and not list(save.glob(".tmp_*"))
    figure("8  --async-save", "NaN in a weight: refused in the step of the save, no NaN in a checkpoint")


def delay_writers(iteration: int, seconds: float) -> None:
    """Hold the writers of the save of ``iteration`` for so long."""
    import threading

    spoil([11])
    from umv2_megatron.checkpoint.background import BackgroundSaves

    start = BackgroundSaves.start

    def held(saves, number, *arguments):
        if number != iteration:
            return start(saves, number, *arguments)
        os.kill(saves.writer_pid, signal.SIGSTOP)
        start(saves, number, *arguments)
        threading.Timer(seconds, os.kill, (saves.writer_pid, signal.SIGCONT)).start()

    BackgroundSaves.start = held


def test_going_back_waits_for_the_save_in_flight(figure, tmp_path):
    """The spike is in iteration 11; the checkpoint of iteration 8 is still being written."""
    ends = {}
    for name, more in {"blocking": {}, "async": {"async_save": True}}.items():
        argv = spike_run(tmp_path / name, "rewind", use_distributed_optimizer=True, **more)
        ends[name] = train(2, argv, tmp_path / "o", *((delay_writers, (8, 3.0)) if more else (spoil, ([11],))))
    assert "went back to the checkpoint of iteration 8: iterations 9 to 11 are left out" in warnings(ends["async"])[0]
    told = [(event["event"], event["iteration"]) for event in read_events(tmp_path / "async")]
    assert told.index(("checkpoint", 8)) < told.index(("rewind", 10))
    assert ends["async"].weights == ends["blocking"].weights
    assert losses(tmp_path / "async") == losses(tmp_path / "blocking")
    figure("8  --async-save", "spike with a save in flight: goes back to that one, as without --async-save")

"""--async-save: training goes on while a checkpoint is written; its files, and a resume, are those of any other."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from program_runs import Job, losses, tiny_run, train

from umv2_megatron.checkpoint.store import TRACKER, CheckpointStore
from umv2_megatron.observation.events import read_events

pytestmark = pytest.mark.thorough

SETTINGS: dict[str, Any] = {"num_layers": 1, "use_distributed_optimizer": True}


def hold_writers(folder: str, iteration: int) -> None:
    """Stop every rank's writer when it is to write the checkpoint of ``iteration``; ``folder``/<rank> has its pid."""
    import torch

    from umv2_megatron.checkpoint.background import BackgroundSaves

    start = BackgroundSaves.start

    def held(saves, number, *arguments):
        if number == iteration:
            os.kill(saves.writer_pid, signal.SIGSTOP)
        start(saves, number, *arguments)
        if number == iteration:
            Path(folder, str(torch.distributed.get_rank())).write_text(str(saves.writer_pid))

    BackgroundSaves.start = held


def writers(folder: Path, ranks: int = 2) -> list[int]:
    """The processes that ``hold_writers`` has stopped, once there are all."""
    deadline = time.monotonic() + 60
    while True:
        pids = [(folder / str(rank)).read_text() if (folder / str(rank)).exists() else "" for rank in range(ranks)]
        if all(pids):
            return [int(pid) for pid in pids]
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for by its parent or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def files(checkpoint: Path) -> dict[str, bytes]:
    """The content of all files that do not depend on the command line, by name."""
    own = {"config.json", "manifest.json", "manifest.sha256"}
    return {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name not in own}


def test_the_files_are_those_of_any_save_and_a_resume_is_bitwise(tmp_path):
    runs = {}
    for name, more in {"blocking": {}, "async": {"async_save": True}}.items():
        argv = tiny_run(**SETTINGS, train_iters=6, save_interval=2, save=tmp_path / name, bf16=True, **more)
        runs[name] = (argv, train(2, argv, tmp_path / "o"))
    save, reference = tmp_path / "async", tmp_path / "blocking"
    assert runs["async"][1].weights == runs["blocking"][1].weights
    assert len(files(save / "iter_0000004")) == 7
    for iteration in ("iter_0000004", "iter_0000006"):
        assert files(save / iteration) == files(reference / iteration), iteration
    told = [event for event in read_events(save) if event["event"] == "checkpoint"]
    assert [event["iteration"] for event in told] == [2, 4, 6]
    assert [event["seconds"] >= event.get("blocked_seconds", 0) for event in told] == [True] * 3
    assert ["blocked_seconds" in event for event in told] == [True, True, False]

    shutil.rmtree(save / "iter_0000006")
    (save / TRACKER).write_text("4")
    resumed = train(2, runs["async"][0], tmp_path / "o")
    assert "loaded checkpoint of iteration 4 " in resumed.text
    assert resumed.weights == runs["blocking"][1].weights and losses(save) == losses(reference)


def test_asked_to_stop_while_a_save_is_in_flight(tmp_path):
    """Steps are made in the meantime, and nothing is published; both checkpoints are there in the end."""
    save = tmp_path / "run"
    argv = tiny_run(**SETTINGS, train_iters=100000, save_interval=10, save=save, async_save=True)
    job = Job(2, argv, tmp_path / "o", hold_writers, (str(tmp_path), 10))
    try:
        held = writers(tmp_path)
        job.wait_for(r"iteration +12/", 60)
        assert not (save / TRACKER).exists() and "saved checkpoint" not in job.output()
        os.killpg(job.pids[1], signal.SIGTERM)  # as torchrun does: it reaches the writer, too
        time.sleep(0.5)
        assert job.codes == [None, None], "it waits for the save in flight"
        for pid in held:
            os.kill(pid, signal.SIGCONT)
        assert job.wait().codes == [0, 0], job.output()[-4000:]
    finally:
        job.kill()
    last = int((save / TRACKER).read_text())
    assert last == losses(save)[-1][0] > 10 and CheckpointStore(save).iterations() == [10, last]
    told = re.findall(r"saved checkpoint of iteration (\d+) ", job.output())
    assert told == ["10", str(last)]
    assert [CheckpointStore(save).verify(each).iteration for each in (10, last)] == [10, last]
    assert all(gone(pid) for pid in held)


@pytest.mark.slow
def test_the_writer_of_a_rank_is_killed(tmp_path):
    """One sentence on both ranks, and the checkpoint before stays."""
    save = tmp_path / "run"
    argv = tiny_run(**SETTINGS, train_iters=100000, save_interval=10, save=save, async_save=True)
    job = Job(2, argv, tmp_path / "o", hold_writers, (str(tmp_path), 20))
    try:
        held = writers(tmp_path)
        os.kill(held[1], signal.SIGKILL)
        os.kill(held[0], signal.SIGCONT)
        ended = job.wait()
    finally:
        job.kill()
    assert ended.codes == [1, 1]
    sentence = rf"error: process {held[1]}, .* of rank 1 \(--async-save\), was ended by SIGKILL.*ones are untouched"
    for output in ended.outputs:
        assert re.search(sentence, output) and "Traceback" not in output, output[-3000:]
    assert CheckpointStore(save).resolve() == 10 and not list(save.glob(".tmp_*"))

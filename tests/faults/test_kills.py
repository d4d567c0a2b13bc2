"""SIGKILL at random moments and at every stage of a save: the same command continues, to the same bits and samples."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from program_runs import Finished, Job, train
from test_resume import assert_same_run, run_on

from umv2_megatron.checkpoint import manifest, posix_storage, store
from umv2_megatron.checkpoint.store import TRACKER, CheckpointStore

pytestmark = pytest.mark.faults

# Settings of every way to save that a run has.
SAVE_MODES = [pytest.param({}, id="blocking"), pytest.param({"async_save": True}, id="async")]
STEPS, EVERY = 24, 4
ON_REPLACING = {"old-set-aside", "old-removed"}
_SOURCES = "".join(Path(each.__file__).read_text() for each in (store, posix_storage, manifest))
STAGES = sorted(set(re.findall(r'stage\("([a-z-]+)"\)', _SOURCES)) - ON_REPLACING)


def tell_samples(folder: str) -> None:
    """Append to ``folder``/<rank> for each micro-batch the iteration and the SHA-256 of its tokens and labels."""
    import torch

    from umv2_megatron.training import loop, step

    next_batch, one_step, now = step.next_batch, loop.Trainer._step, [0]

    def stepped(trainer, profiler):
        now[0] = trainer.state.progress.iteration + 1
        result = one_step(trainer, profiler)
        now[0] = 0  # evaluations read samples, too
        return result

    def told(iterator):
        batch = next_batch(iterator)
        if now[0]:
            read = batch["tokens"].numpy().tobytes() + batch["labels"].numpy().tobytes()
            with open(f"{folder}/{torch.distributed.get_rank()}", "a", encoding="utf-8") as file:
                file.write(f"{now[0]} {hashlib.sha256(read).hexdigest()}\n")
        return batch

    step.next_batch, loop.Trainer._step = told, stepped


def samples(folder: Path) -> dict[tuple[str, str], set[str]]:
    """What each rank has read in each iteration, in whatever start of the program."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in folder.iterdir():
        for line in file.read_text(encoding="utf-8").splitlines():
            iteration, digest = line.split()
            found.setdefault((file.name, iteration), set()).add(digest)
    return found


class Runs:
    """Starts of one command, which record their samples."""

    def __init__(self, folder: Path, ranks: int, corpus: Path, **changes: Any):
        self.save, self.read, self.folder, self.ranks = folder / "save", folder / "read", folder, ranks
        self.read.mkdir(parents=True)
        self.argv = run_on(corpus, self.save, STEPS, save_interval=EVERY, **changes)

    def start(self) -> Job:
        return Job(self.ranks, self.argv, self.folder / "o", tell_samples, (str(self.read),))

    def finish(self) -> Finished:
        return train(self.ranks, self.argv, self.folder / "o", tell_samples, (str(self.read),), timeout=300)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):  # noqa: F811
    """Makes the run without a fault, once for each number of ranks and settings: its files and its end."""
    known: dict[str, tuple[Runs, Finished]] = {}

    def make(ranks: int, changes: dict[str, Any]) -> tuple[Runs, Finished]:
        key = f"{ranks} {changes}"
        if key not in known:
            runs = Runs(tmp_path_factory.mktemp("whole"), ranks, corpus, **changes)
            known[key] = (runs, runs.finish())
        return known[key]

    return make


def assert_same(runs: Runs, finished: Finished, reference: tuple[Runs, Finished]) -> None:
    assert_same_run(finished, runs.save, reference[1], reference[0].save)
    assert samples(runs.read) == samples(reference[0].read)
    assert not list(runs.save.glob(".tmp_*"))


@pytest.mark.parametrize("mode", SAVE_MODES)
@pytest.mark.parametrize("series", range(4))
def test_a_random_rank_at_a_random_time(series, mode, corpus, whole, figure, tmp_path):  # noqa: F811
    """Five kills in each of four runs, two of one rank and two of two ranks."""
    seed = int(os.environ.get("UMV2_TEST_SEED", time.time_ns() % 10**6)) + series
    print(f"UMV2_TEST_SEED={seed - series}")  # pytest shows it with a failure
    numbers = random.Random(seed)
    ranks = 1 + series % 2
    distributed = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    changes = {**mode, **(distributed if series == 3 else {})}
    reference = whole(ranks, changes)
    runs = Runs(tmp_path, ranks, corpus, **changes)
    kills, told = 0, []
    while kills < 5:
        job = runs.start()
        try:
            reach(job, numbers.randrange(1, STEPS))
            time.sleep(numbers.uniform(0, 0.1))
            job.send(signal.SIGKILL, numbers.randrange(ranks))
            ended = job.wait(grace=0.3)
        finally:
            job.kill()
        if set(ended.codes) == {0}:  # before the kill: from the start again
            assert_same(runs, ended, reference)
            shutil.rmtree(runs.save)
            continue
        kills += 1
        tracker = runs.save / TRACKER
        told.append(tracker.read_text() if tracker.exists() else "none")
    assert_same(runs, runs.finish(), reference)
    figure(
        "1  SIGKILL of a random rank at a random time", f"{kills}/{kills} bitwise, {ranks} ranks; saved before {told}"
    )


def reach(job: Job, iteration: int) -> None:
    """Until the run has told that it is at ``iteration`` or later, or has ended."""
    deadline = time.monotonic() + 200
    while job.running and time.monotonic() < deadline:
        told = re.findall(r"iteration +(\d+)/", job.output())
        if told and int(told[-1]) >= iteration:
            return
        time.sleep(0.005)


def die_at(stage: str, iteration: int, folder: str) -> None:
    """Kill the rank that publishes, at ``stage`` of the save of ``iteration``."""
    tell_samples(folder)
    make, begin, now = CheckpointStore.__init__, CheckpointStore.begin, [0]

    def reached(name: str) -> None:
        if name == stage and now[0] == iteration:
            os.kill(os.getpid(), signal.SIGKILL)

    def begun(self, number, bytes_needed=None):
        now[0] = number
        return begin(self, number, bytes_needed)

    CheckpointStore.__init__ = lambda self, root, **named: make(self, root, **{**named, "stages": reached})
    CheckpointStore.begin = begun


@pytest.mark.parametrize("mode", SAVE_MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_at_every_stage_of_a_save(stage, mode, corpus, whole, figure, tmp_path):  # noqa: F811
    """In the third save, of iteration 12, which also removes an older checkpoint."""
    reference = whole(2, mode)
    runs = Runs(tmp_path, 2, corpus, **mode)
    job = Job(2, runs.argv, tmp_path / "o", die_at, (stage, 12, str(runs.read)))
    try:
        assert job.wait(200).codes[0] == -signal.SIGKILL
    finally:
        job.kill()
    found = CheckpointStore(runs.save).resolve()
    assert found in (8, 12)
    finished = runs.finish()
    assert f"loaded checkpoint of iteration {found} " in finished.outputs[0]
    assert_same(runs, finished, reference)
    figure(
        "2  SIGKILL at a stage of a save",
        f"{stage}: went on from {'the new' if found == 12 else 'the old'} one, bitwise",
    )

"""SIGTERM and SIGUSR1 in a step, a save, an evaluation and before the first step; to a rank and to torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from program_runs import ROOT, Job, losses, train
from test_resume import assert_same_run, run_on

from umv2_megatron.checkpoint.store import TRACKER

pytestmark = pytest.mark.faults


def ask(rank: int, number: int, moment: str) -> None:
    """Have ``rank`` send itself a signal in the sixth step, in the second save or evaluation, or at the start."""
    import torch

    from umv2_megatron.training import loop, pretrain

    count = [0]

    def asking(function, at):
        def asked(*arguments, **named):
            count[0] += 1
            if count[0] == at and torch.distributed.get_rank() == rank:
                os.kill(os.getpid(), number)
            return function(*arguments, **named)

        return asked

    if moment == "step":
        loop.train_step = asking(loop.train_step, 6)
    elif moment == "evaluation":
        loop.evaluate = asking(loop.evaluate, 2)
    elif moment == "save":
        pretrain.save_load.save_checkpoint = asking(pretrain.save_load.save_checkpoint, 2)
    else:
        pretrain.build_datasets = asking(pretrain.build_datasets, 1)


SETTINGS = {"save_interval": 5, "eval_interval": 4}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", train(2, run_on(corpus, folder / "run", 16, **SETTINGS), folder / "o")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["step", "save", "evaluation", "start"])
def test_a_rank_is_asked(moment, number, corpus, whole, figure, tmp_path):  # noqa: F811
    argv = run_on(corpus, tmp_path / "run", 16, **SETTINGS)
    job = Job(2, argv, tmp_path / "o", ask, (1, number, moment))
    try:
        stopped = job.wait(200)
    finally:
        job.kill()
    if moment == "start":  # nothing to save yet: the signal ends the rank, and the other one names it
        assert stopped.codes[1] == -number and stopped.codes[0] != 0
        last = 0
    else:
        assert stopped.codes == [0, 0], stopped.text[-5000:]
        last = int((tmp_path / "run" / TRACKER).read_text())
        done = [iteration for iteration, _ in losses(tmp_path / "run")]
        assert done[-1] == last, "a step was made and lost"
        # the signal is heeded at the end of the step in which it came, or of the next one
        assert last in {"step": (6,), "save": (11,), "evaluation": (9,)}[moment]
    finished = train(2, argv, tmp_path / "o")
    if moment == "evaluation":
        assert finished.weights == whole[1].weights and losses(tmp_path / "run") == losses(whole[0])
    else:
        assert_same_run(finished, tmp_path / "run", whole[1], whole[0])
    codes = f"exit codes {stopped.codes}"
    figure("3  signal to a rank", f"{number.name} in {moment}: {codes}, saved iteration {last}, no step lost, bitwise")


def test_torchrun_is_asked(corpus, whole, figure, tmp_path):  # noqa: F811
    """SIGTERM to torchrun reaches the ranks, which save; SIGUSR1 ends torchrun itself (docs/training.md)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "pretrain_umv2.py"), *run_on(corpus, tmp_path / "run", 100000, **SETTINGS)]
    output = tmp_path / "o.txt"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(output, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environ, start_new_session=True)
        try:
            deadline = time.monotonic() + 200
            while not re.search(r"iteration +6/", output.read_text()) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            process.wait(100)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = output.read_text()
    assert "as asked by a signal" in text, text[-4000:]
    saved = int((tmp_path / "run" / TRACKER).read_text())
    assert losses(tmp_path / "run")[-1][0] == saved >= 6
    figure(
        "3  signal to torchrun", f"SIGTERM: saved iteration {saved}, no step lost; torchrun's code {process.returncode}"
    )

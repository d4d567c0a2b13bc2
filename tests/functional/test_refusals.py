"""What a run refuses, in one line that names it: no checkpoint, another run's checkpoint, a taken directory, NaN."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from program_runs import ROOT, Job, tiny_run, train

from umv2_megatron.training.metrics import read_metrics


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A finished run of two steps."""
    save = tmp_path_factory.mktemp("saved") / "run"
    train(1, tiny_run(train_iters=2, save=save), save.parent / "o")
    return save


def refusal(argv: list[str], folder: Path, world_size: int = 1, code: int = 2) -> str:
    """The one line of error that a run ends with; rank 0 alone tells it."""
    ended = train(world_size, argv, folder, codes=code)
    lines = [line for line in ended.text.splitlines() if line.startswith("pretrain_umv2.py: error: ")]
    assert len(lines) == 1 and "Traceback" not in ended.text, ended.text[-4000:]
    return lines[0]


def test_load_without_a_checkpoint(tmp_path):
    text = refusal(tiny_run(train_iters=2, load=tmp_path / "nowhere"), tmp_path / "o", world_size=2)
    assert f"--load is '{tmp_path}/nowhere'" in text and "--allow-fresh" in text
    train(1, tiny_run(train_iters=1, load=tmp_path / "nowhere", allow_fresh=True), tmp_path / "o")


def test_nothing_to_load(saved, tmp_path):
    assert "--finetune needs --load" in refusal(tiny_run(train_iters=2, finetune=True), tmp_path / "o")
    assert "--ckpt-step is 2" in refusal(tiny_run(train_iters=2, ckpt_step=2, save=tmp_path / "new"), tmp_path / "o")
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "latest_checkpointed_iteration.txt").write_text("2")
    assert "none is there" in refusal(tiny_run(train_iters=2, save=lost), tmp_path / "o")


def test_own_run_continues_with_its_optimizer(saved, tmp_path):
    """--no-load-optim, --no-load-rng and --finetune concern --load; --save alone is the run itself."""
    argv = tiny_run(train_iters=2, save=saved, no_load_optim=True, no_load_rng=True, finetune=True)
    text = train(1, argv, tmp_path / "o").text
    assert "continuing at iteration 2" in text and "not restored" not in text


@pytest.mark.parametrize(
    "changes, told, override",
    [
        ({"seed": 5}, ["seed is 5", "1234"], "allow_config_change"),
        ({"seq_length": 16}, ["--seq-length is 16", "with 32"], "allow_config_change"),
        ({"global_batch_size": 4}, ["--global-batch-size is 4", "with 8"], "allow_config_change"),
        ({"memory_topk": 3}, ["--memory-topk is 3", "with 4"], "allow_config_change"),
        ({"rotary_base": 500}, ["--rotary-base is 500", "with 10000"], "allow_config_change"),
        ({"lr_decay_iters": 3}, ["over 2 iterations", "say 3"], "override_opt_param_scheduler"),
        (
            {"train_iters": 3, "lr_decay_iters": 2},
            ["has 24 samples", "has 16", "--train-iters", "--train-samples", "--global-batch-size"],
            "allow_config_change",
        ),
        ({"clip_grad": 2.0}, ["--clip-grad is 2.0", "with 1.0"], "allow_config_change"),
        ({"adam_beta2": 0.9}, ["--adam-beta2 is 0.9", "with 0.95"], "override_opt_param_scheduler"),
        ({"lr": 5e-4}, ["--lr is 0.0005", "with 0.001"], "override_opt_param_scheduler"),
        # --no-load-optim concerns --load: the run itself goes on with its optimizer
        ({"lr": 5e-4, "no_load_optim": True}, ["--lr is 0.0005", "with 0.001"], "override_opt_param_scheduler"),
    ],
)
def test_resume_of_another_run(changes, told, override, saved, tmp_path):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file() and path.name != ".lock"}
    argv = {"train_iters": 2, "save": saved, **changes}
    text = refusal(tiny_run(**argv), tmp_path / "o")
    for part in (*told, "--" + override.replace("_", "-")):
        assert part in text, text
    assert {path: path.read_bytes() for path in before} == before
    settings = {**argv, "save": None, "load": saved, override: True}
    assert "loaded checkpoint of iteration 2" in train(1, tiny_run(**settings), tmp_path / "o").text


def test_two_jobs_in_one_directory(tmp_path):
    job = Job(1, tiny_run(train_iters=10000, save=tmp_path / "run"), tmp_path / "first")
    try:
        job.wait_for(r"iteration +1/")
        text = refusal(tiny_run(train_iters=2, save=tmp_path / "run"), tmp_path / "second", code=1)
        assert f"--save {tmp_path}/run is in use by process {job.pids[0]}" in text
        job.send(signal.SIGTERM)
        assert job.wait().codes == [0]
    finally:
        job.kill()


def poison(iterations: tuple[int, ...]) -> None:
    """Make a row of the first table's gradient NaN in the given optimizer steps, counted from 1."""
    from umv2_megatron.training import step

    original, count = step.guarded_step, [0]

    def guarded(optimizer, *arguments):
        count[0] += 1
        if count[0] in iterations:
            table = next(p for group in optimizer.param_groups if "value_lr_mult" in group for p in group["params"])
            table.main_grad[3] = float("nan")
        return original(optimizer, *arguments)

    step.guarded_step = guarded


def test_nan_stops_before_the_update(tmp_path):
    argv = tiny_run(train_iters=6, save=tmp_path / "run", save_interval=1)
    ended = train(2, argv, tmp_path / "o", poison, ((4,),), codes=1)
    assert "iteration 4: loss" in ended.text and "gradient of decoder.layers.0.mlp.memory.table" in ended.text
    assert "Traceback" not in ended.text
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert not (tmp_path / "run" / "iter_0000004").exists()
    # without the fault the same command goes on as if it had not been there
    finished = train(2, argv, tmp_path / "o")
    assert finished.weights == train(2, tiny_run(train_iters=6), tmp_path / "whole").weights


def test_nan_is_skipped(tmp_path):
    argv = tiny_run(train_iters=5, save=tmp_path / "run", nan_policy="skip")
    ended = train(1, argv, tmp_path / "o", poison, ((2, 3),))
    counts = re.findall(r"number of skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \|", ended.text)
    assert [(int(skipped), int(nan)) for skipped, nan in counts] == [(0, 0), (1, 1), (1, 1), (0, 0), (0, 0)]
    lines = read_metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines if "lm loss" in line] == [1, 4, 5]
    assert lines[1]["grad-norm"] is None


def test_too_many_skipped(tmp_path):
    argv = tiny_run(train_iters=9, nan_policy="skip", max_skipped_iterations=2)
    assert "--max-skipped-iterations 2" in refusal_of_run(argv, tmp_path)


def refusal_of_run(argv: list[str], folder: Path) -> str:
    return train(1, argv, folder / "o", poison, (tuple(range(2, 9)),), codes=1).text


def test_torchrun_shows_the_sentence_of_a_usage_error():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["pretrain_umv2.py", "--model-preset", "umv2-tiny", "--mock-data", "--lr", "high"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    sentence = "pretrain_umv2.py: error: --lr is 'high'; expected a number"
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines.count(sentence) <= 1, done.stderr
    # torchrun ends the other rank when one has failed; that may be rank 0, which would have printed the sentence
    assert f"  traceback : {sentence}" in lines[lines.index("Root Cause (first observed failure):") :], done.stderr

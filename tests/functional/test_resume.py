"""A run that is killed and started again by the same command ends as if nothing had happened: equal weights, equal
losses, equal samples, to the last bit. On real text, with real signals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program_runs import ROOT, Finished, Job, losses, tiny_run, train

from umv2_megatron.training.metrics import read_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Prefix of token files of 300 short documents, bytes as tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    words = (ROOT / "docs").glob("*.md")
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(words)).split() or ["some", "text"] * 500
    numbers = random.Random(1)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for _ in range(300):
            start = numbers.randrange(len(text))
            file.write(json.dumps({"text": " ".join(text[start : start + numbers.randrange(5, 40)])}) + "\n")
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(folder / "text.jsonl"),
         "--output-prefix", str(folder / "p"), "--tokenizer-type", "ByteLevelTokenizer", "--append-eod"],
        check=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return folder / "p_text_document"


def run_on(corpus: Path, save: Path, train_iters: int | None, **changes) -> list[str]:
    return tiny_run(
        **{
            "mock_data": None, "tokenizer_type": "ByteLevelTokenizer", "vocab_size": None, "data_path": corpus,
            "split": "90,5,5", "train_iters": train_iters, "save": save, "save_interval": 5, "eval_interval": 8,
            "eval_iters": 1, "hidden_dropout": 0.1, "memory_balance_loss_coeff": 0.01, **changes,
        }
    )  # fmt: skip


def record(save: Path) -> list:
    """What a run recorded per iteration, without the times."""
    clocks = {"iteration-time", "throughput"}
    return [{key: value for key, value in line.items() if key not in clocks} for line in read_metrics(save)]


def assert_same_run(finished: Finished, save: Path, reference: Finished, reference_save: Path) -> None:
    assert losses(save) == losses(reference_save)
    assert record(save) == record(reference_save)
    assert finished.weights == reference.weights


def killed_run(world_size: int, argv: list[str], folder: Path, kills: int, numbers: random.Random, longest: float):
    """Start the command, kill a random rank after a random time, start it again ...; the last one runs to its end.

    The times are drawn afresh for every start, from the moment of the first step on, up to ``longest`` seconds. Returns
    the last run and where the kills fell.
    """
    told = []
    while len(told) < kills:
        job = Job(world_size, argv, folder)
        try:
            job.wait_for(r"iteration +\d+/", 100)
            time.sleep(numbers.uniform(0, longest))
            job.send(signal.SIGKILL, numbers.randrange(world_size))
            job.wait(grace=0.3)
        finally:
            job.kill()
        told.append(job.output().rstrip().rsplit("\n", 1)[-1][:80])
    return train(world_size, argv, folder), told


def check_killed_runs(world_size, corpus, tmp_path, iterations, kills, **changes) -> None:
    seed = int(os.environ.get("UMV2_TEST_SEED", time.time_ns() % 10**6))
    print(f"UMV2_TEST_SEED={seed}")  # pytest shows it with a failure
    started = time.monotonic()
    whole = train(world_size, run_on(corpus, tmp_path / "whole", iterations, **changes), tmp_path / "o1", timeout=200)
    longest = (time.monotonic() - started) / kills  # so that the kills spread over the run
    argv = run_on(corpus, tmp_path / "killed", iterations, **changes)
    finished, told = killed_run(world_size, argv, tmp_path / "o2", kills, random.Random(seed), longest)
    print("killed after:", *told, sep="\n  ")
    assert [iteration for iteration, _ in losses(tmp_path / "whole")] == list(range(1, iterations + 1))
    assert_same_run(finished, tmp_path / "killed", whole, tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".tmp_*"))


@pytest.mark.slow  # tests/faults has 40 such kills
def test_killed_twice_at_random_on_two_ranks(corpus, tmp_path):
    changes = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    check_killed_runs(2, corpus, tmp_path, iterations=24, kills=2, save_interval=4, **changes)


@pytest.mark.slow  # make faults kills 40 times; the test above twice
@pytest.mark.parametrize("world_size", [1, 2])
def test_200_steps_killed_three_times_at_random(world_size, corpus, tmp_path):
    check_killed_runs(world_size, corpus, tmp_path, iterations=200, kills=3, save_interval=10)


def test_killed_while_saving(corpus, tmp_path):
    """The save directory is seen between a checkpoint's first file and its publication; then the kill falls."""
    argv = run_on(corpus, tmp_path / "killed", 12)
    whole = train(1, run_on(corpus, tmp_path / "whole", 12), tmp_path / "o")
    job = Job(1, argv, tmp_path / "o")
    try:
        deadline = time.monotonic() + 60
        unpublished = tmp_path / "killed" / ".tmp_iter_0000010"
        while not unpublished.exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        job.send(signal.SIGKILL)
        job.wait(grace=0.1)
    finally:
        job.kill()
    assert (tmp_path / "killed" / "latest_checkpointed_iteration.txt").read_text() in ("5", "10")
    finished = train(1, argv, tmp_path / "o")
    assert "loaded checkpoint of iteration" in finished.outputs[0]
    assert_same_run(finished, tmp_path / "killed", whole, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_asked_to_stop(number, corpus, tmp_path):
    """One rank is asked; all save the same step and end with 0. The loaders, asked too, hold out until then."""
    changes = {"num_workers": 1, "log_interval": 2, "save_interval": 100}
    argv = run_on(corpus, tmp_path / "asked", 30, **changes)
    job = Job(2, argv, tmp_path / "o")
    try:
        job.wait_for(r"iteration +2/", 100)
        os.killpg(job.pids[1], number)  # rank 1 and the loaders it started
        stopped = job.wait()
    finally:
        job.kill()
    assert stopped.codes == [0, 0], stopped.text[-5000:]
    saved = int((tmp_path / "asked" / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= saved < 30 and "as asked by a signal" in stopped.text
    finished = train(2, argv, tmp_path / "o")
    assert f"loaded checkpoint of iteration {saved} " in finished.outputs[0]
    if number == signal.SIGTERM:
        whole = train(2, run_on(corpus, tmp_path / "whole", 30, **changes), tmp_path / "o")
        # a stopping run leaves out the evaluation that is due after its last step
        records = [
            [line for line in record(tmp_path / name) if line["iteration"] != saved or "lm loss" in line]
            for name in ("asked", "whole")
        ]
        assert records[0] == records[1]
        assert finished.weights == whole.weights


def tell_evaluations() -> None:
    """Print what is evaluated before it is."""
    from umv2_megatron.training.loop import Trainer

    evaluate = Trainer.evaluate

    def told(trainer, what, sets):
        print(f"evaluating: {what}", flush=True)
        return evaluate(trainer, what, sets)

    Trainer.evaluate = told


@pytest.mark.parametrize("what", ["validation", "test"])
def test_asked_to_stop_with_nothing_to_save(what, tmp_path):
    """An evaluation that is not part of the training does not outlive a signal."""
    save = tmp_path / "run"
    train(1, tiny_run(train_iters=1, save=save), tmp_path / "o")
    training = {"skip_train": True} if what == "validation" else {"train_iters": 1}
    job = Job(1, tiny_run(save=save, eval_iters=1000, **training), tmp_path / "o", tell_evaluations)
    try:
        job.wait_for(f"evaluating: {what}")
        job.send(signal.SIGTERM)
        assert job.wait().codes == [-signal.SIGTERM]
    finally:
        job.kill()


def ask_at_last_save(rank: int) -> None:
    """Have ``rank`` be sent SIGTERM before it saves, when the ranks have agreed to go on."""
    import torch

    from umv2_megatron.training.loop import Trainer

    save_now = Trainer.save_now

    def asked(trainer, **named):
        if torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        save_now(trainer, **named)

    Trainer.save_now = asked


def test_asked_to_stop_during_the_last_save(tmp_path):
    """Both ranks save and leave out the test set, which the same command makes up for."""
    argv = tiny_run(train_iters=2, save=tmp_path / "run", eval_iters=1)
    stopped = train(2, argv, tmp_path / "o", ask_at_last_save, (0,))
    assert "stopping after iteration 2 as asked" in stopped.text and "test loss" not in stopped.text
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert "test loss at iteration 2" in train(2, argv, tmp_path / "o").text


def start_slowly() -> None:
    """Have the start, from the model on, take a minute by the clock."""
    from umv2_megatron.training import pretrain

    build, now = pretrain.build_training_state, time.monotonic

    def slow(*arguments):
        time.monotonic = lambda: now() + 60
        return build(*arguments)

    pretrain.build_training_state = slow


def test_time_limit_counts_from_the_start_of_the_program(tmp_path):
    argv = tiny_run(train_iters=4, save=tmp_path / "run", exit_duration_in_mins=1)
    assert "stopping after iteration 1 as asked" in train(1, argv, tmp_path / "o", start_slowly).text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "batch", "last", "consumed"),
    [({"train_iters": 16}, 4, 16, 64 + 8 * 4), ({"train_iters": None, "train_samples": 128}, 16, 12, 128)],
    ids=["iterations", "samples"],
)
def test_another_batch_from_the_middle_on(length, batch, last, consumed, corpus, tmp_path):
    """The run goes on to its length, on a corpus of fewer samples than it takes; so does one that is interrupted."""
    changes = {**length, "split": "1,9,90", "eval_iters": 0, "save_interval": None}
    first = run_on(corpus, tmp_path / "run", **{**changes, "exit_interval": 8})
    train(1, first, tmp_path / "o")
    shutil.copytree(tmp_path / "run", tmp_path / "interrupted")
    changes |= {"global_batch_size": batch}
    done = train(1, run_on(corpus, tmp_path / "run", **changes, allow_config_change=True), tmp_path / "o")
    assert f"iteration {last:8d}/{last:8d} | consumed samples: {consumed:12d} |" in done.text
    argv = run_on(corpus, tmp_path / "interrupted", **changes, exit_interval=10, allow_config_change=True)
    train(1, argv, tmp_path / "o")
    again = train(1, run_on(corpus, tmp_path / "interrupted", **changes), tmp_path / "o")
    assert "loaded checkpoint of iteration 10 " in again.text
    assert_same_run(again, tmp_path / "interrupted", done, tmp_path / "run")


def test_exit_interval_and_a_finished_run_started_again(corpus, tmp_path):
    save = tmp_path / "run"
    for expected in (4, 8, 10):
        train(1, run_on(corpus, save, 10, exit_interval=4), tmp_path / "o")
        assert (save / "latest_checkpointed_iteration.txt").read_text() == str(expected)
    before, whole = record(save), train(1, run_on(corpus, tmp_path / "whole", 10), tmp_path / "o")
    again = train(1, run_on(corpus, save, 10), tmp_path / "o")
    assert record(save) == before == record(tmp_path / "whole")
    assert again.weights == whole.weights
    assert [line["iteration"] for line in before if "lm loss test" in line] == [10]


def test_hash_of_a_finished_run_started_again_without_evaluations(corpus, tmp_path):
    """u and t of the last cores are hashed and saved, whatever ran after the last step."""
    changes = {"eval_iters": 0, "save_interval": 2}
    first = train(1, run_on(corpus, tmp_path / "run", 4, **changes), tmp_path / "o")
    again = train(1, run_on(corpus, tmp_path / "run", 4, **changes), tmp_path / "o")
    unsaved = train(1, run_on(corpus, None, 4, **{**changes, "save_interval": None}), tmp_path / "o")
    evaluated = train(1, run_on(corpus, tmp_path / "evaluated", 4), tmp_path / "o")
    assert first.weights == again.weights == unsaved.weights == evaluated.weights


def test_evaluation_alone_leaves_the_run_as_it_is(corpus, tmp_path):
    save = tmp_path / "run"
    train(1, run_on(corpus, save, 5), tmp_path / "o")
    files = {path: path.read_bytes() for path in save.rglob("*") if path.is_file() and path.name != ".lock"}
    done = train(1, run_on(corpus, save, None, skip_train=True), tmp_path / "o")
    assert {path: path.read_bytes() for path in files} == files
    expected = [line["lm loss validation"] for line in read_metrics(save) if "lm loss validation" in line][-1]
    assert f"lm loss value: {expected:.6E}" in done.text


@pytest.mark.slow
def test_killed_after_starting_from_another_run(corpus, tmp_path):
    """--load A --finetune --save B: the second time the command goes on in B, with B's optimizer and counters."""
    train(1, run_on(corpus, tmp_path / "a", 2), tmp_path / "o")
    command = run_on(corpus, tmp_path / "b", 6, load=tmp_path / "a", finetune=True, save_interval=3, lr_decay_iters=6)
    through = train(1, command, tmp_path / "o")
    stopped = run_on(corpus, tmp_path / "c", 6, load=tmp_path / "a", finetune=True, exit_interval=3, lr_decay_iters=6)
    train(1, stopped, tmp_path / "o")
    resumed = train(1, stopped, tmp_path / "o")
    assert "continuing at iteration 3" in resumed.text
    assert_same_run(resumed, tmp_path / "c", through, tmp_path / "b")

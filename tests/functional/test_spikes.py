"""--spike-policy and --iterations-to-skip: a run meets samples of random tokens among ones that it has learned."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from program_runs import Finished, Job, losses, tiny_run, train

from umv2_megatron.checkpoint.torch_dist_io import load_common
from umv2_megatron.training.metrics import read_metrics

BATCH = 8


class Spiked:
    """A training set of which some samples are of random tokens."""

    def __init__(self, dataset: Any, samples: list[int]):
        self._dataset, self._samples = dataset, set(samples)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        sample = dict(self._dataset[index])
        if index in self._samples:
            numbers = torch.Generator().manual_seed(index)
            for key in ("tokens", "labels"):
                sample[key] = torch.randint(0, 200, sample[key].shape, generator=numbers)
        return sample


def spoil(iterations: list[int]) -> None:
    """Random tokens in all samples of these iterations."""
    from umv2_megatron.training import pretrain

    build = pretrain.build_datasets
    samples = [sample for each in iterations for sample in range((each - 1) * BATCH, each * BATCH)]

    def spoiled(*arguments):
        train_set, *others = build(*arguments)
        return [Spiked(train_set, samples), *others]

    pretrain.build_datasets = spoiled


def spike_run(save: Path | None, policy: str, **changes: Any) -> list[str]:
    settings = {
        "train_iters": 17, "save": save, "save_interval": 4 if save else None, "spike_policy": policy,
        "spike_window": 6, "spike_loss_threshold": 2, "lr": 5e-3, "hidden_dropout": 0.1,
    }  # fmt: skip
    return tiny_run(**{**settings, **changes})


def plain_run(save: Path | None, **changes: Any) -> list[str]:
    return spike_run(save, "off", **{"spike_window": None, "spike_loss_threshold": None, **changes})


def progress_of(save: Path, iteration: int) -> dict[str, Any]:
    return load_common(save / f"iter_{iteration:07d}")["extra_state"]


def warnings(finished: Finished) -> list[str]:
    return re.findall("WARNING: spike at .*", finished.text)


TWO_RANKS = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [pytest.param(1, {"bf16": True}, id="one-bf16"), pytest.param(2, TWO_RANKS, id="two")],
)
@pytest.mark.slow
def test_going_back_is_as_if_the_steps_had_not_been(ranks, changes, tmp_path):
    """Weights, losses and random states are those of a run that is told to leave out these steps."""
    argv = spike_run(tmp_path / "rewind", "rewind", **changes)
    finished = train(ranks, argv, tmp_path / "o", spoil, ([11, 15],))
    told = warnings(finished)
    assert len(told) == 2, finished.text[-4000:]
    assert "went back to the checkpoint of iteration 8: iterations 9 to 11 are left out" in told[0]
    assert "samples 64 to 87 of the training order are left out" in told[0]
    assert "(24 so far); training goes on with iteration 12" in told[0]
    assert "checkpoint of iteration 12: iterations 13 to 15 are left out" in told[1] and "(48 so far)" in told[1]
    left_out = [9, 10, 11, 13, 14, 15]
    skipping = plain_run(tmp_path / "skip", iterations_to_skip=" ".join(map(str, left_out)), **changes)
    reference = train(ranks, split_list(skipping), tmp_path / "o", spoil, ([11, 15],))
    assert finished.weights == reference.weights
    trained = [each for each in range(1, 18) if each not in left_out]
    assert [losses_by_iteration(tmp_path / "rewind")[each] for each in trained] == [
        losses_by_iteration(tmp_path / "skip")[each] for each in trained
    ]
    saved = progress_of(tmp_path / "rewind", 17)
    assert saved["left_out"] == [[64, 88], [96, 120]] == progress_of(tmp_path / "skip", 17)["left_out"]
    assert (saved["iteration"], saved["consumed_samples"]) == (17, 136)
    assert (saved["spikes"], saved["rewinds"], saved["undone_iterations"]) == (2, 2, 4)
    records = [line for line in read_metrics(tmp_path / "rewind") if "rewinds" in line]
    assert records == [
        {"iteration": 11, "spikes": 1, "rewinds": 1, "left-out-samples": 24},
        {"iteration": 15, "spikes": 2, "rewinds": 2, "left-out-samples": 48},
    ]


def split_list(argv: list[str]) -> list[str]:
    """The numbers after --iterations-to-skip as arguments of their own."""
    place = argv.index("--iterations-to-skip") + 1
    return [*argv[:place], *argv[place].split(), *argv[place + 1 :]]


def losses_by_iteration(save: Path) -> dict[int, float]:
    return dict(losses(save))


@pytest.mark.slow
def test_killed_and_stopped_around_a_rewind(tmp_path):
    """Before it, just after it, and with a checkpoint of a stop in between: all go back to the same checkpoint."""
    spoiled = ([11],)
    whole = train(2, spike_run(tmp_path / "whole", "rewind"), tmp_path / "o", spoil, spoiled)
    argv = spike_run(tmp_path / "killed", "rewind")
    seed = int(os.environ.get("UMV2_TEST_SEED", time.time_ns() % 10**6))
    print(f"UMV2_TEST_SEED={seed}")  # pytest shows it with a failure
    numbers = random.Random(seed)
    for pattern, number in ((r"iteration +9/", signal.SIGTERM), ("went back", signal.SIGKILL)):
        job = Job(2, argv, tmp_path / "o", spoil, spoiled)
        try:
            job.wait_for(pattern)
            time.sleep(numbers.uniform(0, 0.1))
            job.send(number, numbers.randrange(2))
            job.wait(grace=0.3)
        finally:
            job.kill()
    finished = train(2, argv, tmp_path / "o", spoil, spoiled)
    assert finished.weights == whole.weights
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert progress_of(tmp_path / "killed", 17) == progress_of(tmp_path / "whole", 17)


def test_a_spike_is_skipped_or_only_told(tmp_path):
    changes = {"train_iters": 13, "hidden_dropout": None}  # dropout draws in a step that a spike makes left out, too
    skipped = train(1, spike_run(None, "skip", **changes), tmp_path / "o", spoil, ([11],))
    assert "the update is left out (--spike-policy skip); samples 80 to 87" in warnings(skipped)[0]
    counts = re.findall(r"number of skipped iterations: +(\d+) ", skipped.text)
    assert [number for number, count in enumerate(counts, 1) if count == "1"] == [11]
    by_number = train(1, plain_run(None, iterations_to_skip="11", **changes), tmp_path / "o", spoil, ([11],))
    assert "iteration 11 is left out by --iterations-to-skip; samples 80 to 87" in by_number.text
    assert skipped.weights == by_number.weights
    told = train(1, spike_run(None, "warn", **changes), tmp_path / "o", spoil, ([11],))
    assert "the update was made (--spike-policy warn)" in warnings(told)[0]
    silent = train(1, plain_run(None, **changes), tmp_path / "o", spoil, ([11],))
    assert told.weights == silent.weights != skipped.weights


@pytest.mark.slow
def test_without_a_checkpoint_the_step_is_left_out_and_a_damaged_one_is_passed_over(tmp_path):
    early = train(1, spike_run(tmp_path / "a", "rewind", save_interval=16), tmp_path / "o", spoil, ([11],))
    assert "the update is left out (there is no checkpoint yet to go back to)" in warnings(early)[0]
    argv = spike_run(tmp_path / "b", "rewind")
    damaged = train(1, argv, tmp_path / "o", spoil_and_damage, ([11], str(tmp_path / "b" / "iter_0000008")))
    assert "checkpoint 8 cannot be used" in damaged.text
    assert "went back to the checkpoint of iteration 4: iterations 5 to 11" in warnings(damaged)[0]


def spoil_and_damage(iterations: list[int], checkpoint: str) -> None:
    """``spoil``, and a byte of ``checkpoint`` flipped before the run looks for it."""
    from umv2_megatron.training import step_policies

    spoil(iterations)
    look = step_policies.checkpoint_before

    def damage_and_look(*arguments):
        shard = next(Path(checkpoint).glob("*.distcp"))
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        return look(*arguments)

    step_policies.checkpoint_before = damage_and_look


def test_too_often_to_the_same_checkpoint(tmp_path):
    argv = spike_run(tmp_path / "run", "rewind", max_rewinds=2)
    ended = train(2, argv, tmp_path / "o", spoil, ([10, 11, 12],), codes=1)
    errors = re.findall("pretrain_umv2.py: error: (.*)", ended.outputs[0])
    assert len(errors) == 1 and "Traceback" not in ended.text
    assert errors[0].startswith("spike at iteration 12: loss ")
    assert "checkpoint of iteration 8 2 times, as often as --max-rewinds 2 allows" in errors[0]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "8"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"spike_policy": "rewind"}, "--spike-policy is rewind; expected --save and --save-interval too"),
        ({"spike_window": 5}, "--spike-window is 5; expected no value with --spike-policy off"),
        ({"max_skipped_iterations": 3}, "--max-skipped-iterations is 3; expected no value without --nan-policy skip"),
        ({"spike_policy": "skip", "max_rewinds": 4}, "--max-rewinds is 4; expected no value without --spike-policy"),
        ({"spike_policy": "skip", "spike_grad_norm_factor": 0.5}, "--spike-grad-norm-factor is 0.5; expected 0, or"),
        (
            {"spike_policy": "warn", "spike_grad_norm_factor": 0, "spike_loss_threshold": 0},
            "--spike-policy is warn; expected off, or --spike-loss-threshold or --spike-grad-norm-factor above 0",
        ),
    ],
)
def test_flags_that_do_not_fit(changes, told, tmp_path):
    assert told in train(1, tiny_run(train_iters=2, **changes), tmp_path / "o", codes=2).text

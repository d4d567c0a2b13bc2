"""--rampup-batch-size: the batch of each step against megatron-core's calculator, and sums over steps by counting."""

from __future__ import annotations

import pytest
from megatron.core import num_microbatches_calculator

from umv2_megatron.config.batch_rampup import BatchRampup
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.usage import UsageError

CALCULATOR = getattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None)
RAMPS = [(32, 8, 8, 100), (1536, 16, 16, 5859), (24, 4, 10, 33), (16, 8, 8, 1), (8, 8, 1, 1)]


@pytest.mark.skipif(CALCULATOR is None, reason="this megatron-core has no ramp-up")
@pytest.mark.parametrize("numbers", RAMPS, ids=str)
def test_sizes_are_those_of_megatron_core(numbers: tuple[int, int, int, int]) -> None:
    full, start, increment, samples = numbers
    ramp = BatchRampup(*numbers)
    seen = {ramp.size(consumed) for consumed in range(samples + 3)}
    assert seen <= set(ramp.sizes()) and ramp.size(10**9) == full
    if start == full:
        return
    theirs = CALCULATOR(full, 1, 1, False, 1, start, increment, samples)
    for consumed in range(samples + 3):
        theirs.update(consumed, consistency_check=True)
        assert theirs.get_current_global_batch_size() == ramp.size(consumed), consumed


@pytest.mark.parametrize("numbers", RAMPS, ids=str)
def test_sums_over_steps(numbers: tuple[int, int, int, int]) -> None:
    ramp = BatchRampup(*numbers)
    for begin in (0, ramp.start, 50):
        used = [begin]
        for _ in range(30):
            used.append(used[-1] + ramp.size(used[-1]))
        assert [ramp.samples_after(steps, begin) for steps in range(31)] == used
        for total in (begin, begin + 1, begin + ramp.start, used[10], used[10] + 1, used[30]):
            expected = max(steps for steps, each in enumerate(used) if each <= total)
            assert ramp.steps_to(total, begin) == expected


TINY = ["--model-preset", "umv2-tiny", "--mock-data", "--tokenizer-type", "NullTokenizer", "--global-batch-size", "8"]


def test_length_of_a_run() -> None:
    """Steps of 2, 2, 4, 4, 6, 6 samples and so on, or as many samples as were asked for."""
    ramp = ["--rampup-batch-size", "2", "2", "18"]
    by_steps = resolve([*TINY, "--train-iters", "5", *ramp], 1)
    assert (by_steps.train_iters, by_steps.samples) == (5, 2 + 2 + 2 + 4 + 4)
    by_samples = resolve([*TINY, "--train-samples", "30", *ramp], 1)
    assert by_samples.samples <= 30 < by_samples.samples + 8
    assert by_samples.train_iters == by_samples.rampup.steps_to(30, 0)


@pytest.mark.parametrize("ramp, told", [
    (["2", "2"], "expected three numbers"),
    (["8", "2", "10"], "a first batch below --global-batch-size (8)"),
    (["2", "4", "10"], "an increment that divides their difference"),
    (["2", "3", "10"], "to be multiples of --micro-batch-size x data-parallel size = 2"),
    (["0", "4", "10"], "--rampup-batch-size is 0"),
])  # fmt: skip
def test_ramps_that_cannot_be(ramp: list[str], told: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve([*TINY, "--micro-batch-size", "2", "--train-iters", "5", "--rampup-batch-size", *ramp], 1)
    assert told in str(error.value) and "--rampup-batch-size" in str(error.value)


def test_interleaved_stages_need_whole_groups_at_every_size() -> None:
    flags = ["--pipeline-model-parallel-size", "2", "--num-layers", "4", "--num-layers-per-virtual-pipeline-stage", "1"]
    resolve([*TINY, "--train-iters", "5", "--rampup-batch-size", "2", "2", "10", *flags], 2)
    with pytest.raises(UsageError, match="--rampup-batch-size is 5"):
        resolve([*TINY, "--train-iters", "5", "--rampup-batch-size", "2", "3", "10", *flags], 2)

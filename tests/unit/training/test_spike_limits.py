"""Limits of a spike by hand-made windows, and ranges of samples."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from umv2_megatron.config.training_config import TrainingConfig
from umv2_megatron.training.initialize import Progress
from umv2_megatron.training.spikes import limits, remember
from umv2_megatron.training.step_policies import joined, left_out_samples


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(**{"spike_policy": "skip", "spike_window": 5, **changes})


def window(*losses: float, norms: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 50.0)) -> Progress:
    return Progress(window_losses=list(losses), window_grad_norms=list(norms))


def test_limits_by_hand():
    """Median 3.0; deviations 0.2, 0.1, 0, 0.1, 6.0 with median 0.1; so 3.0 + 6 * 0.14826. Norms: 10 * 3."""
    found = limits(settings(), window(2.8, 2.9, 3.0, 3.1, 9.0))
    assert found.loss == pytest.approx(3.0 + 6 * 0.14826)
    assert found.grad_norm == 30.0
    assert found.exceeded(3.88, 30.0) is None
    assert found.exceeded(3.9, 1.0) == "loss 3.9 is above 3.88956 (median 3, standard deviation 0.148)"
    assert found.exceeded(2.0, 31.0) == "gradient norm 31 is above 30 (median 3)"
    assert found.exceeded(9.0, 99.0).count(" is above ") == 2


def test_equal_losses_do_not_make_a_spike_of_every_difference():
    assert limits(settings(), window(4.0, 4.0, 4.0, 4.0, 4.0)).loss == pytest.approx(4.0 + 6 * 0.04)


def test_what_is_not_judged():
    nothing = (math.inf, math.inf)
    for training, progress in (
        (settings(spike_policy="off"), window(1, 1, 1, 1, 1)),
        (settings(spike_window=6), window(1, 1, 1, 1, 1)),
    ):
        found = limits(training, progress)
        assert (found.loss, found.grad_norm) == nothing and found.exceeded(1e9, 1e9) is None
    assert limits(settings(spike_loss_threshold=0.0), window(1, 1, 1, 1, 1)).loss == math.inf
    assert limits(settings(spike_grad_norm_factor=0.0), window(1, 1, 1, 1, 1)).grad_norm == math.inf


def test_the_window_holds_the_last_updates():
    progress, training = Progress(), settings(spike_window=3)
    for step in range(5):
        remember(training, progress, float(step), float(10 * step))
    assert progress.window_losses == [2.0, 3.0, 4.0] and progress.window_grad_norms == [20.0, 30.0, 40.0]
    remember(settings(spike_policy="off"), progress, 9.0, 9.0)
    assert progress.window_losses == [2.0, 3.0, 4.0]
    # a shorter window at a resume looks at the last ones
    assert limits(settings(spike_window=2), progress).grad_norm == 10 * 35.0


def test_false_alarms_on_noise():
    """On normal noise around a falling loss, six standard deviations are passed less than once in 20,000 steps."""
    numbers, progress, training = random.Random(3), Progress(), settings(spike_window=100)
    alarms = 0
    for step in range(20000):
        loss = 3.0 + 4.0 * math.exp(-step / 2000) + numbers.gauss(0, 0.05)
        alarms += limits(training, progress).exceeded(loss, 1.0) is not None
        remember(training, progress, loss, 1.0)
    assert alarms == 0 and statistics.median(progress.window_losses) == pytest.approx(3.0, abs=0.05)


def test_ranges_of_samples_are_joined():
    assert joined([[8, 16], [0, 8], [24, 32], [10, 12], [32, 40]]) == [[0, 16], [24, 40]]
    assert joined([[0, 40], [8, 16]]) == [[0, 40]] and joined([]) == []
    assert left_out_samples(Progress(left_out=[[0, 16], [24, 40]])) == 32
